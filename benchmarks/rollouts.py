"""Environment steps per second: LIBERO's own OffScreenRenderEnv beside Pairloom's, on the same states and actions.

    python -m benchmarks.rollouts [--suite libero_object] [--task-id 0] [--steps 40] [--repeats 5] [--output FILE]

All ways of stepping alternate in one run, so that a busy machine slows them alike; medians and ranges over the
repeats are reported, and the processor time of a step, which other processes disturb least. Resets are not timed.
Before timing, the run checks that LIBERO's environment and Pairloom's show the same pictures.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.fingerprint import software_fingerprint, write_json
from configs.world import EnvironmentPart
from envs.assets import ResolvedAssets, resolve_assets
from envs.fingerprint import stack_fingerprint
from envs.libero import HOLD, LiberoEnv
from envs.tasks import init_states

INIT_STATE, SEED, SETTLE = 0, 0, 10


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One way of stepping. `start` resets and settles (untimed); `run` executes all actions [N, 7]."""

    name: str
    start: Callable[[], Any]
    run: Callable[[np.ndarray], Any]


class LiberoOwn:
    """OffScreenRenderEnv with its two default cameras."""

    def __init__(self, env: LiberoEnv, *, side: int) -> None:
        from libero.libero.envs import OffScreenRenderEnv  # only importable once a LiberoEnv has prepared it

        self._state = init_states(env.task)[INIT_STATE]
        self.env = OffScreenRenderEnv(
            bddl_file_name=str(env.task.bddl_file), camera_heights=side, camera_widths=side, hard_reset=False
        )

    def start(self) -> dict[str, np.ndarray]:
        # robosuite draws into whatever GL context is current.
        self.env.sim._render_context_offscreen.gl_ctx.make_current()
        self.env.seed(SEED)
        self.env.reset()
        self.env.set_init_state(self._state)
        return self.run(np.tile(HOLD, (SETTLE, 1)))

    def run(self, actions: np.ndarray) -> dict[str, np.ndarray]:
        for action in actions:
            obs, *_ = self.env.step(action)
        return obs


def contenders(suite: str, task_id: int, chunk: int, assets: ResolvedAssets) -> list[Contender]:
    """LIBERO's environment first, then Pairloom's ways. Raises RuntimeError should the two disagree."""

    def build(side: int, geometry: str) -> LiberoEnv:
        part = EnvironmentPart.model_validate(
            {"image_size": side, "geometry": geometry, "settle_steps": SETTLE, "max_steps": 10**6}
        )
        return LiberoEnv(suite=suite, task_id=task_id, environment=part, assets=assets)

    visual, collision = build(128, "visual"), build(64, "collision")
    own = LiberoOwn(visual, side=128)
    check_agreement(own, visual)

    def start(env: LiberoEnv) -> Callable[[], Any]:
        return lambda: env.reset(seed=SEED, options={"init_state": INIT_STATE})

    def chunked(env: LiberoEnv) -> Callable[[np.ndarray], Any]:
        return lambda actions: [env.step_chunk(part) for part in actions.reshape(-1, chunk, 7)]

    return [
        Contender(name="LIBERO", start=own.start, run=own.run),
        Contender(
            name="Pairloom, step",
            start=start(visual),
            run=lambda actions: [visual.step(action) for action in actions],
        ),
        Contender(name=f"Pairloom, chunks of {chunk}", start=start(visual), run=chunked(visual)),
        Contender(
            name="  ... collision, 64 px",
            start=start(collision),
            run=chunked(collision),
        ),
        Contender(name="  ... nothing drawn", start=start(visual), run=visual.advance),
    ]


def check_agreement(own: LiberoOwn, env: LiberoEnv) -> None:
    """Raises RuntimeError unless both environments show the same after the same ten random actions."""
    actions = random_actions(10, seed=1)
    own.start()
    expected = own.run(actions)
    env.reset(seed=SEED, options={"init_state": INIT_STATE})
    found, *_ = env.step_chunk(actions)
    apart = float(np.abs(own.env.get_sim_state() - env.sim.get_state().flatten()).max())
    pixels = int((expected["agentview_image"][::-1] != found["agentview"]).sum())
    if apart > 1e-6 or pixels:
        raise RuntimeError(
            f"LIBERO's environment and Pairloom's disagree after {len(actions)} steps: states by {apart:g}, "
            f"{pixels} values of the agentview picture; expected none"
        )


def random_actions(count: int, *, seed: int) -> np.ndarray:
    """float64 [count, 7]: slow random motion with the gripper open, so that the goal is not reached."""
    actions = np.random.default_rng(seed).uniform(-0.3, 0.3, (count, 7))
    actions[:, 6] = -1
    return actions


def measure(ways: list[Contender], actions: np.ndarray, repeats: int) -> list[dict[str, Any]]:
    """One row per way: median, lowest and highest steps per second of wall time, milliseconds of wall and of
    processor time per step, and how many times LIBERO's rate (by either clock) that is."""
    wall: dict[str, list[float]] = {way.name: [] for way in ways}
    cpu: dict[str, list[float]] = {way.name: [] for way in ways}
    for repeat in track(range(repeats + 1), description="repeats"):
        for way in ways:
            way.start()
            started, started_cpu = time.perf_counter(), time.process_time()
            way.run(actions)
            if repeat:  # the first round warms up
                wall[way.name].append((time.perf_counter() - started) / len(actions))
                cpu[way.name].append((time.process_time() - started_cpu) / len(actions))
    median = statistics.median
    own = ways[0].name
    return [
        {
            "way": name,
            "steps_per_s": 1 / median(wall[name]),
            "lowest": 1 / max(wall[name]),
            "highest": 1 / min(wall[name]),
            "ms_per_step": 1000 * median(wall[name]),
            "cpu_ms_per_step": 1000 * median(cpu[name]),
            "times_libero": median(wall[own]) / median(wall[name]),
            "times_libero_cpu": median(cpu[own]) / median(cpu[name]),
        }
        for name in wall
    ]


def main(
    suite: Annotated[str, typer.Option(help="LIBERO suite")] = "libero_object",
    task_id: Annotated[int, typer.Option(help="task in the suite's official order")] = 0,
    steps: Annotated[int, typer.Option(help="control steps per repeat, a multiple of the chunk", min=1)] = 40,
    chunk: Annotated[int, typer.Option(help="actions per chunk", min=1)] = 8,
    repeats: Annotated[int, typer.Option(help="timed repeats of each way", min=1)] = 5,
    assets: Annotated[
        str | None, typer.Option(help="LIBERO's asset folder; none: cache, Hub, stand-ins")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="write the result as JSON")] = None,
) -> None:
    """Measure, print a table, and write JSON when asked."""
    if steps % chunk:
        raise typer.BadParameter(f"steps={steps} is not a multiple of chunk={chunk}")
    resolved = resolve_assets(assets)
    rows = measure(contenders(suite, task_id, chunk, resolved), random_actions(steps, seed=0), repeats)
    fingerprint = software_fingerprint() | {"stack": stack_fingerprint(assets=resolved)}
    renderer = fingerprint["stack"]["renderer"]
    table = Table(
        caption="ms per step; x: times LIBERO's rate",
        title=f"{suite}/{task_id}, two cameras of 128 px, {renderer}, {resolved.kind} assets",
    )
    table.add_column("way", no_wrap=True)
    for column in ("steps/s", "range", "ms", "CPU ms", "x", "x CPU"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row["way"],
            f"{row['steps_per_s']:.1f}",
            f"{row['lowest']:.0f}-{row['highest']:.0f}",
            f"{row['ms_per_step']:.1f}",
            f"{row['cpu_ms_per_step']:.1f}",
            f"{row['times_libero']:.1f}",
            f"{row['times_libero_cpu']:.1f}",
        )
    Console().print(table)
    if output is not None:
        settings = {"suite": suite, "task_id": task_id, "steps": steps, "chunk": chunk, "repeats": repeats}
        write_json(output, {**settings, "rows": rows, "fingerprint": fingerprint})


if __name__ == "__main__":
    typer.run(main)
