"""Does the loop learn? One supervised start per training seed, and from each the same rollouts spent several ways.

    python -m benchmarks.learning [--seeds 0,1,2] [--arms sft,dpo-lora,dpo-dora] [--recipe configs/libero_object.yaml]
    python -m benchmarks.learning --recipe configs/tiny_pi05.yaml --name tiny_pi05 --arms sft,dpo-dora

Every run is `launch.py train` on the recipe with the overrides below, called NAME-ARM-sSEED. It writes every held-out
episode to docs/results/NAME.jsonl and the table to docs/results/NAME.md. What is in that file, or has finished under
runs/, is not run again, so the benchmark can be stopped and continued; remove both to measure everything anew.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from configs.loader import load_recipe
from envs.fingerprint import read_fingerprint
from envs.significance import mcnemar, paired_difference, wilson
from trajectories.journal import Journal, read_journal

START = "start"
ARMS: dict[str, tuple[str, ...]] = {
    "demos": (
        "preference.preference_weight=0",
        "preference.anchor_weight=0",
        "preference.success_weight=0",
        "preference.demo_weight=1",
    ),
    "sft": ("preference.preference_weight=0", "preference.anchor_weight=0"),
    "dpo-dora": ("adapter.method=dora",),
    "dpo-lora": ("adapter.method=lora",),
}
"""What each arm changes in the recipe. `sft` is likelihood of the successes (and demonstrations) alone, and `demos`,
the control, the same steps on the demonstrations alone: what more training of the start would have given."""

Outcomes = dict[tuple[int, int, int], bool]
"""(task, initial state, sampling seed) -> success."""


def run_name(name: str, arm: str, seed: int) -> str:
    return f"{name}-{arm}-s{seed}"


def run_arm(recipe: Path, prefix: str, arm: str, seed: int, root: Path, changes: Sequence[str]) -> None:
    """Run one arm of one training seed, unless it has finished."""
    name = run_name(prefix, arm, seed)
    if (root / name / "result.json").is_file():
        return
    command = [sys.executable, "launch.py", "train", str(recipe), f"name={name}", f"seed={seed}"]
    command += [f"demonstrations.seed={seed}", *changes]
    if arm == START:
        command.append("rollouts.rounds=0")
    else:
        command += [f"start={root / run_name(prefix, START, seed)}", *ARMS[arm]]
    typer.echo(" ".join(command))
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def held_out(folder: Path, version: int) -> list[dict[str, Any]]:
    """The evaluation episodes of one version, each cell once."""
    lines = [e for e in read_journal(folder / "episodes.jsonl") if e["phase"] == "evaluation"]
    return list({cell_of(e): e for e in lines if e["policy_version"] == version}.values())


def cell_of(episode: Mapping[str, Any]) -> tuple[int, int, int]:
    return episode["task_id"], episode["init_state"], episode["seed"]


def last_version(folder: Path) -> int:
    promoted = [e["version"] for e in read_journal(folder / "events.jsonl") if e["event"] == "promoted"]
    return promoted[-1] if promoted else 0


def rows_of(folder: Path, arm: str, seed: int, version: int) -> list[dict[str, Any]]:
    """Every raw held-out outcome of one version of a run; an episode that ended in a fault has none."""
    paradigm = load_recipe(folder / "recipe.yaml").policy.paradigm
    return [
        {
            "paradigm": paradigm,
            "arm": arm,
            "training_seed": seed,
            "suite": e["suite"],
            "task": e["task_id"],
            "init_state": e["init_state"],
            "sampling_seed": e["seed"],
            "success": e["success"],
            "policy_version": e["policy_version"],
            "policy_hash": e["policy_hash"],
        }
        for e in held_out(folder, version)
        if e["outcome"] != "fault"
    ]


def measure(
    recipe: Path,
    arms: Sequence[str],
    seeds: Sequence[int],
    file: Path,
    root: Path,
    changes: Sequence[str],
) -> None:
    """Run what `file` does not hold yet, seed by seed, and add each run's outcomes to it as it finishes."""
    name = file.stem
    journal = Journal(file, fsync=True)
    held = {(row["arm"], row["training_seed"]) for row in read_journal(file)}
    for seed in seeds:
        missing = [arm for arm in arms if (arm, seed) not in held]
        if missing or (START, seed) not in held:
            run_arm(recipe, name, START, seed, root, changes)
        if (START, seed) not in held:
            journal.extend(rows_of(root / run_name(name, START, seed), START, seed, 0))
        for arm in missing:
            run_arm(recipe, name, arm, seed, root, changes)
            folder = root / run_name(name, arm, seed)
            journal.extend(rows_of(folder, arm, seed, last_version(folder)))


def outcomes(rows: Sequence[Mapping[str, Any]], arm: str, seed: int) -> Outcomes:
    return {
        (r["task"], r["init_state"], r["sampling_seed"]): r["success"]
        for r in rows
        if r["arm"] == arm and r["training_seed"] == seed
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: each arm's success by seed and pooled, and its paired comparison with the start and with `sft`."""
    arms = list(dict.fromkeys(r["arm"] for r in rows))
    seeds = sorted({r["training_seed"] for r in rows})
    lines = [
        "| arm | "
        + " | ".join(f"seed {s}" for s in seeds)
        + " | pooled (95 % Wilson) | over the start | p | over sft | p |",
        "|---|" + "---|" * (len(seeds) + 5),
    ]
    for arm in arms:
        mine = {s: outcomes(rows, arm, s) for s in seeds if outcomes(rows, arm, s)}
        cells = [f"{_percent(mine[s])} ({len(mine[s])})" if s in mine else "-" for s in seeds]
        wins = sum(sum(o.values()) for o in mine.values())
        total = sum(len(o) for o in mine.values())
        low, high = wilson(wins, total)
        against = [cell for other in (START, "sft") for cell in _against(rows, mine, arm, other)]
        pooled = f"{100 * wins / total:.1f} % ({100 * low:.1f}-{100 * high:.1f})"
        lines.append("| " + " | ".join([arm, *cells, pooled, *against]) + " |")
    return "\n".join(lines) + "\n"


def _percent(cells: Outcomes) -> str:
    return f"{100 * sum(cells.values()) / len(cells):.1f} %"


def _against(
    rows: Sequence[Mapping[str, Any]], mine: Mapping[int, Outcomes], arm: str, other: str
) -> tuple[str, str]:
    """Difference in points with its 95 % paired interval, and the pooled exact McNemar p."""
    theirs = {s: outcomes(rows, other, s) for s in mine}
    if arm in (START, other) or not all(theirs.values()):
        return "", ""
    pooled_mine = {(s, *c): v for s, o in mine.items() for c, v in o.items()}
    pooled_theirs = {(s, *c): v for s, o in theirs.items() for c, v in o.items()}
    shared = pooled_mine.keys() & pooled_theirs.keys()
    before, after = {c: pooled_theirs[c] for c in shared}, {c: pooled_mine[c] for c in shared}
    test = mcnemar(before, after)
    both = sum(before[c] and after[c] for c in shared)
    gain, low, high = paired_difference(
        both=both,
        only_after=test.better,
        only_before=test.worse,
        neither=len(shared) - both - test.better - test.worse,
    )
    return (
        f"{100 * gain:+.1f} ({100 * low:+.1f} to {100 * high:+.1f}; {test.better} better, {test.worse} worse)",
        f"{test.p_value:.2g}",
    )


def write_table(file: Path, run: Path) -> None:
    """Write and say the table of everything in a file of outcomes, with the stack that `run` recorded."""
    text = table(read_journal(file))
    stack = json.dumps(read_fingerprint(run) or "not recorded here")
    file.with_suffix(".md").write_text(f"{text}\nStack: `{stack}`\n")
    typer.echo(text)


def main(
    changes: Annotated[list[str] | None, typer.Argument(help="settings to change in every run")] = None,
    recipe: Annotated[Path, typer.Option(help="recipe of every run")] = Path("configs/libero_object.yaml"),
    seeds: Annotated[str, typer.Option(help="training seeds")] = "0,1,2",
    arms: Annotated[str, typer.Option(help="arms to run")] = ",".join(ARMS),
    name: Annotated[
        str, typer.Option(help="of the files written, and the first part of every run's")
    ] = "learning",
    output: Annotated[Path, typer.Option(help="folder of the table and the episodes")] = Path("docs/results"),
    report_only: Annotated[bool, typer.Option(help="write from finished runs, run nothing")] = False,
) -> None:
    root = Path("runs")
    chosen, numbers = arms.split(","), [int(s) for s in seeds.split(",")]
    unknown = [arm for arm in chosen if arm not in ARMS]
    if unknown:
        raise typer.BadParameter(f"unknown arm {unknown[0]!r}; known: {', '.join(ARMS)}")
    output.mkdir(parents=True, exist_ok=True)
    file = output / f"{name}.jsonl"
    if not report_only:
        measure(recipe, chosen, numbers, file, root, changes or [])
    write_table(file, root / run_name(name, START, numbers[0]))


if __name__ == "__main__":
    typer.run(main)
