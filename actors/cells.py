"""Which cells a round drives, and which of them a canary drives again."""

from __future__ import annotations

from collections.abc import Sequence

from configs.preference import GuardPart
from configs.schema import RolloutPart
from configs.world import TaskPart
from trajectories.records import Cell


def training_cells(tasks: TaskPart, part: RolloutPart, round_index: int) -> list[Cell]:
    """The cells of one round: the next `init_states_per_round` training states of every task, each
    `samples_per_state` times with sampling seeds of the round's own. Tasks alternate, so that every rollout actor
    meets every task early."""
    states = tasks.train_init_states
    first = round_index * part.init_states_per_round
    chosen = [states[(first + k) % len(states)] for k in range(min(part.init_states_per_round, len(states)))]
    return [
        Cell(suite=tasks.suite, task_id=task, init_state=state, seed=1000 * (round_index + 1) + sample)
        for state in chosen
        for sample in range(part.samples_per_state)
        for task in tasks.task_ids
    ]


def canary_cells(driven: Sequence[Cell], part: GuardPart) -> list[Cell]:
    """Choose cells for a trial from those just driven: whole initial states (so that the canary's episodes can
    pair), taken from the tasks in turn, until there are `canary_episodes`."""
    groups: dict[tuple[str, int], dict[int, list[Cell]]] = {}
    for cell in sorted(driven):
        groups.setdefault((cell.suite, cell.task_id), {}).setdefault(cell.init_state, []).append(cell)
    queues = [list(by_state.values()) for by_state in groups.values()]
    chosen: list[Cell] = []
    while len(chosen) < part.canary_episodes and any(queues):
        for queue in queues:
            if queue and len(chosen) < part.canary_episodes:
                chosen.extend(queue.pop(0))
    return chosen
