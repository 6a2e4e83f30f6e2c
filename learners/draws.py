"""Which decisions each optimizer step of an update looks at."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import torch

from configs.preference import PreferencePart
from learners.credit import credits, decisive
from learners.decisions import DecisionPool
from learners.terms import Draw, Side
from trajectories.records import PreferencePair, Trajectory


class Draws:
    """An endless iterable of draws from what a pool holds, fixed by the generator's state."""

    def __init__(
        self,
        pool: DecisionPool,
        part: PreferencePart,
        generator: torch.Generator,
        *,
        pairs: Sequence[PreferencePair],
        successes: Sequence[Trajectory],
        demos: Sequence[Trajectory],
    ) -> None:
        """All of these trajectories must be held by the pool; with value credit every decision is credited now."""
        self._pool, self._part, self._generator = pool, part, generator
        self._pairs, self._successes, self._demos = pairs, successes, demos
        sides = [side for pair in pairs for side in (pair.chosen, pair.rejected)]
        self._credit = self._credits([*sides, *successes]) if pairs and part.credit == "value" else {}

    def __iter__(self) -> Iterator[Draw]:
        """An endless sequence of draws; pairs come in shuffled order, each as often as any other."""
        queue: list[int] = []
        success_rows, demo_rows = self._all_rows(self._successes), self._all_rows(self._demos)
        count = min(self._part.pairs_per_step, len(self._pairs))
        while True:
            if len(queue) < count:
                queue += torch.randperm(len(self._pairs), generator=self._generator).tolist()
            drawn, queue = [self._pairs[i] for i in queue[:count]], queue[count:]
            yield Draw(
                pairs=[(self._side(pair.chosen), self._side(pair.rejected)) for pair in drawn],
                successes=self._some(success_rows, self._part.batch_size),
                demos=self._some(demo_rows, self._part.batch_size),
                noise=self._noise(),
            )

    def pairs_once(self, generator: torch.Generator) -> Iterator[Draw]:
        """Every pair, once, in shuffled order, and nothing for the likelihood terms: what an update draws stays as it
        would have been."""
        other = copy.copy(self)
        other._generator = generator
        none = torch.empty(0, dtype=torch.int64)
        order = torch.randperm(len(self._pairs), generator=generator)
        for part in order.split(self._part.pairs_per_step):
            drawn = [self._pairs[i] for i in part.tolist()]
            sides = [(other._side(pair.chosen), other._side(pair.rejected)) for pair in drawn]
            yield Draw(pairs=sides, successes=none, demos=none, noise=other._noise())

    def _noise(self) -> int:
        """One of the pool's draws of noise."""
        draws = self._pool.noise_draws
        return int(torch.randint(draws, (), generator=self._generator)) if draws > 1 else 0

    def _side(self, trajectory: Trajectory) -> Side:
        rows, most = self._pool.rows(trajectory), self._part.decisions_per_trajectory
        if self._part.credit == "value":
            credit = self._credit[trajectory.trajectory_id]
            indices, weights = decisive(credit, success=trajectory.success, most=most)
            return Side(rows=rows[indices], weights=weights)
        drawn = self._some(rows, most)
        return Side(rows=drawn, weights=torch.full((len(drawn),), len(rows) / len(drawn)))

    def _credits(self, trajectories: Sequence[Trajectory]) -> dict[str, torch.Tensor]:
        """Credit of every decision by trajectory id; initial states are the groups, whatever the task."""
        distinct = list({t.trajectory_id: t for t in trajectories}.values())
        tasks = sorted({(t.cell.suite, t.cell.task_id) for t in distinct})
        features = []
        for t in distinct:
            seen = self._pool.features(t)
            which = torch.zeros(len(seen), len(tasks))
            which[:, tasks.index((t.cell.suite, t.cell.task_id))] = 1
            features.append(torch.cat([seen, which], dim=1))
        found = credits(features, [t.success for t in distinct], [t.cell.init_state for t in distinct])
        return {t.trajectory_id: credit for t, credit in zip(distinct, found, strict=True)}

    def _some(self, rows: torch.Tensor, count: int) -> torch.Tensor:
        """Up to `count` of the rows, without replacement."""
        return rows[torch.randperm(len(rows), generator=self._generator)[:count]]

    def _all_rows(self, trajectories: Sequence[Trajectory]) -> torch.Tensor:
        return torch.cat([torch.empty(0, dtype=torch.int64), *map(self._pool.rows, trajectories)])
