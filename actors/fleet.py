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
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError

from actors.members import Make, Member, Members
from actors.nodes import NodeWatch
from actors.rollout import NoAnswerError
from envs.domain import RendererError
from trajectories.records import Cell

log = logging.getLogger(__name__)

MAX_ATTEMPTS = 3
"""A cell whose actor dies this often under it alone is quarantined instead of taking another actor down."""

Launch = Callable[[Any, Cell], list[ray.ObjectRef]]
"""Starts one cell on one actor; returns the refs of (record, trajectory)."""
Keep = Callable[[dict[str, Any], ray.ObjectRef], None]
"""Brings what one cell gave, a record and the ref of its trajectory, to where it is safe."""


@dataclass(slots=True)
class _Running:
    cell: Cell
    member: Member
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
        make: Make | None = None,
        most: int | None = None,
        nodes: NodeWatch | None = None,
        release_after_s: float = 60.0,
    ) -> None:
        """`actors` have started; with `make` there may be up to `most`, while there are cells for them."""
        self.members = Members(
            actors,
            slots=slots,
            on_event=on_event,
            make=make,
            most=most,
            nodes=nodes,
            release_after_s=release_after_s,
        )
        self._slots = slots
        self._timeout_s = timeout_s
        self._on_event = on_event

    def run(
        self,
        cells: Sequence[Cell],
        launch: Launch,
        *,
        keep: Keep | None = None,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> Iterator[tuple[dict[str, Any], ray.ObjectRef]]:
        """Run every cell once. Yields (episode record, ref of the trajectory), after `keep` has had them; calls
        `meanwhile` about once a second.

        A cell whose actor dies or hangs is run again alone from its initial state, until MAX_ATTEMPTS actors have died
        under it alone; one whose actor cannot draw, or got no answer from policy actors, or whose trajectory was lost
        with its node before `keep` had it, is run again by any. Every cell ends in exactly one yield or one
        `quarantined` event. Raises FleetLostError when no actor can draw.
        """
        pending = deque(cells)
        suspects: deque[Cell] = deque()
        attempts: dict[Cell, int] = {}
        running: dict[ray.ObjectRef, _Running] = {}
        try:
            while pending or suspects or running:
                self.members.scale(len(pending) + len(suspects) + len(running))
                self.tend({run.member.index for run in running.values()})
                meanwhile()
                self._assign(pending, running, launch)
                if not pending:
                    self._assign_alone(suspects, running, launch)
                if not running:
                    time.sleep(0.5)  # every actor is starting
                    continue
                done, _ = ray.wait(list(running), num_returns=1, timeout=1.0)
                for ref in done:
                    run = running.pop(ref)
                    record = self._record_of(ref, run, pending, suspects, attempts)
                    if record is not None and self._kept(record, run, pending, keep):
                        yield record, run.trajectory
                self._replace_hung(running)
        finally:
            for ref in running:
                ray.cancel(ref)
            self.members.scale(0)

    def tend(self, busy: set[int] = frozenset()) -> None:  # type: ignore[assignment]
        """Take up actors that are there, note nodes that come and go, and let go of those not needed any more."""
        self.members.greet()
        self.members.watch(busy)
        self.members.release(busy)

    def _record_of(
        self,
        ref: ray.ObjectRef,
        run: _Running,
        pending: deque[Cell],
        suspects: deque[Cell],
        attempts: dict[Cell, int],
    ) -> dict[str, Any] | None:
        """What came back of a cell; None when it has to be run again."""
        member = run.member
        member.wanted = (run.cell.suite, run.cell.task_id)
        member.idle_since = time.monotonic()
        try:
            record = ray.get(ref)
        except RayActorError as error:
            if isinstance(error, RayTaskError):  # somebody else died, while this actor waited for it
                raise
            self.members.note_death(member, run.incarnation, reason=type(error).__name__)
            self._requeue(run, suspects, attempts, reason=type(error).__name__)
            return None
        except (RendererError, NoAnswerError) as error:
            reason = str(getattr(error, "cause", error))
            self._again(run, pending, reason)
            if isinstance(error, RendererError):
                self.members.strike(member, reason)
            return None
        member.strikes = 0
        return record

    def _kept(self, record: dict[str, Any], run: _Running, pending: deque[Cell], keep: Keep | None) -> bool:
        """Whether what a cell gave is safe; if not, it is run again."""
        try:
            if keep is not None:
                keep(record, run.trajectory)
        except ObjectLostError as error:
            self._again(run, pending, f"its trajectory was lost ({type(error).__name__})")
            return False
        return True

    def _again(self, run: _Running, pending: deque[Cell], reason: str) -> None:
        """Run a cell again, which is not to blame."""
        self._on_event(
            {"event": "requeued", "cell": run.cell.key, "actor": run.member.index, "reason": reason}
        )
        pending.append(run.cell)

    def _assign(self, pending: deque[Cell], running: dict[ray.ObjectRef, _Running], launch: Launch) -> None:
        """Fill free slots, the emptiest actor first; a freed simulator gets another cell of its own task if any."""
        loads = {member.index: 0 for member in self.members.ready()}
        for run in running.values():
            if run.member.index in loads:
                loads[run.member.index] += 1
        by_index = {member.index: member for member in self.members}
        while pending and loads and min(loads.values()) < self._slots:
            index = min(loads, key=lambda i: loads[i])
            member = by_index[index]
            cell = next((c for c in pending if (c.suite, c.task_id) == member.wanted), pending[0])
            member.wanted = None
            pending.remove(cell)
            for run in running.values():
                run.shared = run.shared or run.member is member
            self._start(cell, member, running, launch, shared=loads[index] > 0)
            loads[index] += 1

    def _assign_alone(
        self, suspects: deque[Cell], running: dict[ray.ObjectRef, _Running], launch: Launch
    ) -> None:
        """Give each idle actor one suspect. Nothing else is pending then, so it stays alone there."""
        busy = {run.member.index for run in running.values()}
        for member in self.members.ready():
            if suspects and member.index not in busy:
                self._start(suspects.popleft(), member, running, launch, shared=False)

    def _start(
        self,
        cell: Cell,
        member: Member,
        running: dict[ray.ObjectRef, _Running],
        launch: Launch,
        *,
        shared: bool,
    ) -> None:
        record, trajectory = launch(member.actor, cell)
        running[record] = _Running(cell, member, trajectory, member.deaths, shared)

    def _requeue(
        self, run: _Running, suspects: deque[Cell], attempts: dict[Cell, int], *, reason: str
    ) -> None:
        blamed = not run.shared and not self.members.is_off(run.member)
        attempts[run.cell] = attempts.get(run.cell, 0) + blamed
        event = {
            "cell": run.cell.key,
            "actor": run.member.index,
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
        for member in {
            id(r.member): r.member for r in running.values() if now - r.started > self._timeout_s
        }.values():
            for run in running.values():
                if run.member is member:
                    run.started = now
            self.members.kill(member, f"an episode took longer than {self._timeout_s:.0f} s")
