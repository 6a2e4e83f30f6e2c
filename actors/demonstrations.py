"""The stage before the rounds: scripted experts on the rollout fleet, and the start that is trained on them."""

from __future__ import annotations

import logging
import shutil
import time
from collections import Counter
from pathlib import Path
from typing import Any

import ray

from actors.crew import Crew
from actors.learner import UNFINISHED
from actors.learning import supervise
from actors.run_folder import RunFolder, progress_bar
from actors.stages import cell_of
from configs.schema import Recipe
from learners.checkpoint import is_intact
from trajectories.codec import CodecError, load_trajectory, save_trajectory
from trajectories.records import Cell, Trajectory

log = logging.getLogger(__name__)

MAX_ATTEMPTS = 5
"""Perturbed demonstrations tried per one kept, before the expert counts as unable."""


_SEEDS_OF_ATTEMPT = 1000


class DemonstrationError(RuntimeError):
    """The scripted expert keeps failing."""


def demonstrate(crew: Crew, folder: RunFolder, recipe: Recipe) -> list[Trajectory]:
    """Collect `per_task` successful perturbed demonstrations of every task, from the demonstration states in turn.

    An attempt that failed, or ended in a fault, is counted and tried again from the same state with another seed. Each
    that is kept is saved at once; those that an earlier process of this run saved are taken as they are.
    Raises DemonstrationError naming the tasks whose expert fails MAX_ATTEMPTS times over.
    """
    tasks, part = recipe.tasks, recipe.demonstrations
    depth = recipe.supervised.auxiliary == "spatial"
    kept = saved_demonstrations(folder)
    there = {(demo.cell.task_id, demo.cell.seed % _SEEDS_OF_ATTEMPT) for demo in kept}
    wanted = [(task, number) for task in tasks.task_ids for number in range(part.per_task)]
    missing = [(task, number) for task, number in wanted if (task, number) not in there]
    started = time.monotonic()

    def launch(actor: Any, cell: Cell) -> list[ray.ObjectRef]:
        return actor.demonstration.options(num_returns=2).remote(
            cell, part=part, chunk=recipe.policy.chunk, depth=depth
        )

    def keep(record: dict[str, Any], trajectory: ray.ObjectRef) -> None:
        if record["success"]:
            kept.append(ray.get(trajectory))
            save_trajectory(folder.demonstrations / kept[-1].trajectory_id, kept[-1])

    with progress_bar("demos", len(missing)) as bar:
        for attempt in range(MAX_ATTEMPTS):
            cells = {
                Cell(
                    suite=tasks.suite,
                    task_id=task,
                    init_state=tasks.demo_init_states[number % len(tasks.demo_init_states)],
                    seed=part.seed * 10_000 + attempt * _SEEDS_OF_ATTEMPT + number,
                ): (task, number)
                for task, number in missing
            }
            for record, _ in crew.fleet.run(list(cells), launch, keep=keep):
                folder.episode("demonstration", -1, record)
                if record["success"]:
                    missing.remove(cells[cell_of(record)])
                    bar.advance()
    if missing:
        short = ", ".join(f"{task} ({count})" for task, count in Counter(t for t, _ in missing).items())
        raise DemonstrationError(
            f"the scripted expert failed {MAX_ATTEMPTS} times over; demonstrations missing of {tasks.suite} task: "
            f"{short}; lower demonstrations.noise, raise environment.max_steps or choose other demo_init_states"
        )
    folder.metric("demonstration", episodes=len(kept), wall_s=round(time.monotonic() - started, 1))
    return sorted(kept, key=lambda t: t.cell)


def saved_demonstrations(folder: RunFolder) -> list[Trajectory]:
    """The demonstrations in a run folder that are intact; a damaged one is named, and is there to be made again."""
    folder.demonstrations.mkdir(parents=True, exist_ok=True)
    saved = []
    for path in sorted(folder.demonstrations.glob("*")):
        if path.suffix == ".tmp":
            path.unlink()
            continue
        try:
            saved.append(load_trajectory(path))
        except CodecError as error:
            log.warning("a demonstration is made again: %s", error)
    return saved


def make_start(recipe: Recipe, folder: RunFolder, crew: Crew) -> tuple[Path, list[Trajectory], bool]:
    """The checkpoint of the supervised start, its demonstrations, and whether the learner was trained just now."""
    checkpoint = folder.checkpoints / "start"
    if recipe.start is not None:
        checkpoint = Path(recipe.start) / "checkpoints" / "start"
        saved = sorted((Path(recipe.start) / "demonstrations").iterdir())
        return checkpoint, [load_trajectory(path) for path in saved], False
    demos = demonstrate(crew, folder, recipe) if recipe.demonstrated else []
    if folder.resumed and is_intact(checkpoint):
        shutil.rmtree(folder.path / UNFINISHED, ignore_errors=True)
        return checkpoint, demos, False
    supervise(crew, folder, demos, steps=recipe.supervised.steps)
    return checkpoint, demos, True
