"""The stage before the rounds: scripted experts on the rollout fleet."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import ray

from actors.placement import Crew
from actors.run_folder import RunFolder, progress_bar
from actors.stages import cell_of
from configs.schema import Recipe
from trajectories.records import Cell, Trajectory

MAX_ATTEMPTS = 5
"""Perturbed demonstrations tried per one kept, before the expert counts as unable."""


class DemonstrationError(RuntimeError):
    """The scripted expert keeps failing."""


def demonstrate(crew: Crew, folder: RunFolder, recipe: Recipe) -> list[Trajectory]:
    """Collect `per_task` successful perturbed demonstrations of every task, from the demonstration states in turn.

    An attempt that failed, or ended in a fault, is counted and tried again from the same state with another seed.
    Raises DemonstrationError naming the tasks whose expert fails MAX_ATTEMPTS times over.
    """
    tasks, part = recipe.tasks, recipe.demonstrations
    depth = recipe.supervised.auxiliary == "spatial"
    kept: list[Trajectory] = []
    missing = [(task, number) for task in tasks.task_ids for number in range(part.per_task)]
    started = time.monotonic()

    def launch(actor: Any, cell: Cell) -> list[ray.ObjectRef]:
        return actor.demonstration.options(num_returns=2).remote(
            cell, part=part, chunk=recipe.policy.chunk, depth=depth
        )

    with progress_bar("demos", len(missing)) as bar:
        for attempt in range(MAX_ATTEMPTS):
            cells = {
                Cell(
                    suite=tasks.suite,
                    task_id=task,
                    init_state=tasks.demo_init_states[number % len(tasks.demo_init_states)],
                    seed=part.seed * 10_000 + attempt * 1000 + number,
                ): (task, number)
                for task, number in missing
            }
            for record, trajectory in crew.fleet.run(list(cells), launch):
                folder.episode("demonstration", -1, record)
                if record["success"]:
                    kept.append(ray.get(trajectory))
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
