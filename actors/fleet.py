"""The driver's handle on the rollout actors: keeps them busy, replaces the dead and the hung, loses no cell.

When an actor dies, one of the cells that shared it may be to blame, and which one is not known. So all of them become
suspects: each is run again alone on an actor, once the others are done, and only a cell whose actor dies then is
charged with it.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from trajectories.records import Cell

log = logging.getLogger(__name__)

MAX_ATTEMPTS = 3
"""A cell whose actor dies this often under it alone is quarantined instead of taking another actor down."""

Launch = Callable[[Any, Cell], list[ray.ObjectRef]]
"""Starts one cell on one actor; returns the refs of (record, trajectory)."""


@dataclass(slots=True)
class _Running:
    cell: Cell
    actor: int
    trajectory: ray.ObjectRef
    incarnation: int
    """How often the actor had died when the cell was sent to it."""
    shared: bool
    """Whether another cell has been running on the same actor meanwhile."""
    started: float = field(default_factory=time.monotonic)


class Fleet:
    """Feeds cells to rollout actors and yields what comes back, in the order it comes."""

    def __init__(
        self,
        actors: Sequence[Any],
        *,
        slots: int,
        timeout_s: float,
        on_event: Callable[[dict[str, Any]], None],
    ) -> None:
        self.actors = list(actors)
        self._slots = slots
        self._timeout_s = timeout_s
        self._on_event = on_event
        self._away: dict[int, ray.ObjectRef] = {}
        """Actors that died -> what answers when they are back."""
        self._deaths = [0] * len(self.actors)
        self._killed: dict[int, str] = {}
        """Actors this fleet ended -> why."""

    def run(self, cells: Sequence[Cell], launch: Launch) -> Iterator[tuple[dict[str, Any], ray.ObjectRef]]:
        """Run every cell once. Yields (episode record, ref of the trajectory).

        A cell whose actor dies or hangs is run again alone from its initial state, until MAX_ATTEMPTS actors have died
        under it alone. Every cell ends in exactly one yield or one `quarantined` event.
        """
        pending = deque(cells)
        suspects: deque[Cell] = deque()
        attempts: dict[Cell, int] = {}
        running: dict[ray.ObjectRef, _Running] = {}
        wanted: list[tuple[str, int] | None] = [None] * len(self.actors)
        try:
            while pending or suspects or running:
                self._greet()
                self._assign(pending, running, wanted, launch)
                if not pending:
                    self._assign_alone(suspects, running, launch)
                if not running:
                    time.sleep(0.5)  # every actor is restarting
                    continue
                done, _ = ray.wait(list(running), num_returns=1, timeout=1.0)
                for ref in done:
                    run = running.pop(ref)
                    wanted[run.actor] = (run.cell.suite, run.cell.task_id)
                    try:
                        record = ray.get(ref)
                    except RayActorError as error:
                        if isinstance(
                            error, RayTaskError
                        ):  # somebody else died, while this actor waited for it
                            raise
                        self._note_death(run, reason=type(error).__name__)
                        self._requeue(run, suspects, attempts, reason=type(error).__name__)
                        continue
                    yield record, run.trajectory
                self._replace_hung(running)
        finally:
            for ref in running:
                ray.cancel(ref)

    def _assign(
        self,
        pending: deque[Cell],
        running: dict[ray.ObjectRef, _Running],
        wanted: list[tuple[str, int] | None],
        launch: Launch,
    ) -> None:
        """Fill free slots, the emptiest actor first; a freed simulator gets another cell of its own task if any."""
        loads = [self._slots if actor in self._away else 0 for actor in range(len(self.actors))]
        for run in running.values():
            loads[run.actor] += 1
        while pending and min(loads) < self._slots:
            actor = loads.index(min(loads))
            cell = next((c for c in pending if (c.suite, c.task_id) == wanted[actor]), pending[0])
            wanted[actor] = None
            pending.remove(cell)
            for run in running.values():
                run.shared = run.shared or run.actor == actor
            self._start(cell, actor, running, launch, shared=loads[actor] > 0)
            loads[actor] += 1

    def _assign_alone(
        self, suspects: deque[Cell], running: dict[ray.ObjectRef, _Running], launch: Launch
    ) -> None:
        """Give each idle actor one suspect. Nothing else is pending then, so it stays alone there."""
        busy = {run.actor for run in running.values()} | self._away.keys()
        for actor in range(len(self.actors)):
            if suspects and actor not in busy:
                self._start(suspects.popleft(), actor, running, launch, shared=False)

    def _start(
        self,
        cell: Cell,
        actor: int,
        running: dict[ray.ObjectRef, _Running],
        launch: Launch,
        *,
        shared: bool,
    ) -> None:
        record, trajectory = launch(self.actors[actor], cell)
        running[record] = _Running(cell, actor, trajectory, self._deaths[actor], shared)

    def _greet(self) -> None:
        """Take back the actors that have restarted: a cell sent to one that is still away would be lost on it."""
        for actor, ready in list(self._away.items()):
            if not ray.wait([ready], timeout=0)[0]:
                continue
            try:
                ray.get(ready)
            except RayActorError:
                self._away[actor] = self.actors[actor].__ray_ready__.remote()
            else:
                del self._away[actor]

    def _note_death(self, run: _Running, *, reason: str) -> None:
        """Record the death of an actor once, however many cells it takes along and however late they are heard of: the
        first of them may find the actor already back."""
        if run.incarnation < self._deaths[run.actor]:
            return
        self._deaths[run.actor] += 1
        self._away[run.actor] = self.actors[run.actor].__ray_ready__.remote()
        why = self._killed.pop(run.actor, f"its process died ({reason})")
        self._on_event({"event": "actor_restarted", "actor": run.actor, "reason": why})

    def _requeue(
        self, run: _Running, suspects: deque[Cell], attempts: dict[Cell, int], *, reason: str
    ) -> None:
        attempts[run.cell] = attempts.get(run.cell, 0) + (not run.shared)
        event = {
            "cell": run.cell.key,
            "actor": run.actor,
            "reason": reason,
            "attempt": attempts[run.cell],
        }
        if attempts[run.cell] >= MAX_ATTEMPTS:
            self._on_event({"event": "quarantined", **event})
        else:
            self._on_event({"event": "requeued", **event})
            suspects.append(run.cell)

    def _replace_hung(self, running: dict[ray.ObjectRef, _Running]) -> None:
        """Restart actors that sit on an episode for too long; their episodes then fail and are queued again."""
        now = time.monotonic()
        hung = {run.actor for run in running.values() if now - run.started > self._timeout_s}
        for actor in hung:
            self._killed[actor] = f"an episode took longer than {self._timeout_s:.0f} s"
            for run in running.values():
                if run.actor == actor:
                    run.started = now
            ray.kill(self.actors[actor], no_restart=False)
