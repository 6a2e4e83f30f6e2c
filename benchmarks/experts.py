"""How often each scripted expert reaches its goal over a task's official initial states, calm and pushed.

    python -m benchmarks.experts [--suite libero_object --tasks 0 --tasks 1] [--states 50] [--noise 0.3] [--output FILE]

Episodes run without drawing (one picture each). Tasks already measured with the same assets and settings in the
output file are kept and not run again, so a measurement can be stopped and taken up.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.fingerprint import software_fingerprint, write_json
from configs.world import DemonstrationPart, EnvironmentPart
from envs.assets import ResolvedAssets, resolve_assets
from envs.demonstrations import demonstrate
from envs.experts import EXPERT_TASKS
from envs.libero import LiberoEnv
from envs.significance import wilson


def main(
    suite: Annotated[str | None, typer.Option(help="one suite; none: every suite with experts")] = None,
    tasks: Annotated[
        list[int] | None, typer.Option(help="task ids of that suite; none: all with experts")
    ] = None,
    states: Annotated[int, typer.Option(min=1, max=50, help="official initial states, from the first")] = 50,
    noise: Annotated[
        float, typer.Option(min=0, help="standard deviation of the pushes")
    ] = DemonstrationPart().noise,
    assets: Annotated[str | None, typer.Option(help="folder with LIBERO's assets")] = None,
    output: Annotated[Path, typer.Option(help="JSON file")] = Path("docs/results/experts.json"),
) -> None:
    """Measure, print a table, and write the JSON file after every task."""
    found = resolve_assets(assets)
    settings = {
        "assets": {"kind": found.kind, "digest": found.digest},
        "states": states,
        "noises": [0.0, noise],
    }
    rows = _kept(output, settings)
    for name in [suite] if suite else list(EXPERT_TASKS):
        for task_id in tasks or EXPERT_TASKS[name]:
            if not any((row["suite"], row["task_id"]) == (name, task_id) for row in rows):
                rows.append(_measure(name, task_id, found, states=states, noise=noise))
                rows.sort(key=lambda row: (list(EXPERT_TASKS).index(row["suite"]), row["task_id"]))
                write_json(
                    output, {"settings": settings, "fingerprint": software_fingerprint(), "tasks": rows}
                )
    Console().print(_table(rows))


def _kept(output: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """What an earlier run with the same settings has measured."""
    if not output.exists():
        return []
    earlier = json.loads(output.read_text(encoding="utf-8"))
    return list(earlier["tasks"]) if earlier["settings"] == settings else []


def _measure(
    suite: str, task_id: int, assets: ResolvedAssets, *, states: int, noise: float
) -> dict[str, Any]:
    environment = EnvironmentPart(image_size=16, geometry="collision")
    env = LiberoEnv(suite=suite, task_id=task_id, environment=environment, assets=assets)
    try:
        return {
            "suite": suite,
            "task_id": task_id,
            "instruction": env.instruction,
            "calm": _rate(env, states=states, noise=0.0),
            "pushed": _rate(env, states=states, noise=noise),
        }
    finally:
        env.close()


def _rate(env: LiberoEnv, *, states: int, noise: float) -> dict[str, Any]:
    """Successes over the first `states` initial states, each with its own seed."""
    runs = [
        demonstrate(env, init_state=state, seed=state, noise=noise, chunk=1, stride=env.max_steps)
        for state in range(states)
    ]
    steps = [run.env_steps for run in runs if run.success]
    low, high = wilson(len(steps), states)
    return {
        "successes": len(steps),
        "episodes": states,
        "wilson95": [round(low, 3), round(high, 3)],
        "mean_steps": round(statistics.fmean(steps), 1) if steps else None,
        "longest_steps": max(steps, default=None),
        "failed_states": [run.cell.init_state for run in runs if not run.success],
    }


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table("suite", "task", "instruction", "calm", "steps", "pushed", "95 %", "steps")
    for row in rows:
        calm, pushed = row["calm"], row["pushed"]
        table.add_row(
            row["suite"],
            str(row["task_id"]),
            row["instruction"],
            f"{calm['successes']}/{calm['episodes']}",
            f"{calm['mean_steps']}",
            f"{pushed['successes']}/{pushed['episodes']}",
            "{:.2f}-{:.2f}".format(*pushed["wilson95"]),
            f"{pushed['mean_steps']}",
        )
    return table


if __name__ == "__main__":
    typer.run(main)
