"""Who is in the rollout fleet: who joins, dies, comes back, hangs, cannot draw, or is not needed any more."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayActorError

from actors.nodes import NodeWatch

MAX_RENDERER_STRIKES = 3
"""Renderer failures in a row after which an actor's renderer is given up."""

Make = Callable[[str | None], Any]
"""Starts one rollout actor, with this renderer instead of the recipe's if one is named."""


class FleetLostError(RuntimeError):
    """No rollout actor is left that can draw."""


@dataclass(slots=True, eq=False)
class Member:
    """One rollout actor, as the fleet sees it."""

    index: int
    """Never given to another member."""
    actor: Any
    renderer: str | None = None
    away: ray.ObjectRef | None = None
    """While it starts, or restarts: what answers when it is there."""
    deaths: int = 0
    killed: str = ""
    """Why the fleet ended it, until its death is noted."""
    strikes: int = 0
    node: str = ""
    process: int = 0
    """That said last where it is; 0: none has."""
    ended: tuple[str, int] | None = None
    """Node and process that the fleet killed last."""
    draining: bool = False
    wanted: tuple[str, int] | None = None
    """The task of the simulator that was freed last."""
    idle_since: float = field(default_factory=time.monotonic)


class Members:
    """The fleet's actors: at least `least` of them, at most `most`, as many as there are cells for."""

    def __init__(
        self,
        actors: Sequence[Any],
        *,
        slots: int,
        on_event: Callable[[dict[str, Any]], None],
        make: Make | None = None,
        most: int | None = None,
        nodes: NodeWatch | None = None,
        release_after_s: float = 60.0,
    ) -> None:
        """`actors` have started. Without `make` they are all that there will ever be."""
        self._count = itertools.count()
        self._slots = slots
        self._on_event = on_event
        self._make = make
        self._least = len(actors)
        self._most = max(len(actors), most or 0)
        self._nodes = nodes
        self._release_after_s = release_after_s
        self._restarts = self.quarantined = 0
        self._wanted = self._least
        self.all: list[Member] = [Member(next(self._count), actor) for actor in actors]
        for member in self.all:
            member.away = _introduction(member.actor)

    def __iter__(self) -> Iterator[Member]:
        return iter(self.all)

    def ready(self) -> list[Member]:
        """Those that cells may be sent to."""
        return [member for member in self.all if member.away is None and not member.draining]

    def scale(self, cells: int) -> None:
        """Ask for as many actors as `cells` still to be run keep busy; Ray's autoscaler finds nodes for them."""
        if self._make is None:
            return
        self._wanted = min(self._most, max(self._least, math.ceil(cells / self._slots)))
        # One that was given up is not made again: it would fail as often.
        for _ in range(self._wanted - self.quarantined - len(self.all)):
            self._add(None)

    def _add(self, renderer: str | None) -> None:
        assert self._make is not None  # whoever can be added can be made
        member = Member(next(self._count), self._make(renderer), renderer)
        member.away = _introduction(member.actor)
        self.all.append(member)

    def greet(self) -> None:
        """Take up the actors that have started or restarted: a cell sent to one that is still away would be lost."""
        for member in self.all:
            if member.away is None or not ray.wait([member.away], timeout=0)[0]:
                continue
            try:
                said = ray.get(member.away)
            except RayActorError:
                member.away = _introduction(member.actor)
                continue
            if isinstance(said, dict) and (said["node"], said["process"]) == member.ended:
                # Ray ends a process some time after it was told to: this is the old one still.
                member.away = _introduction(member.actor)
                continue
            member.away, member.draining = None, False
            member.idle_since = time.monotonic()
            if isinstance(said, dict):
                member.node, member.process = said["node"], said["process"]
                if said["last_words"]:
                    self._on_event(
                        {"event": "last_words", "actor": member.index, "reason": said["last_words"]}
                    )

    def note_death(self, member: Member, incarnation: int, reason: str) -> None:
        """Record the death of an actor once, however many cells it takes along and however late they are heard of: the
        first of them may find the actor already back."""
        if incarnation < member.deaths or member not in self.all:
            return
        member.deaths += 1
        self._restarts += 1
        member.away = _introduction(member.actor)
        why, member.killed = member.killed or f"its process died ({reason})", ""
        self._on_event({"event": "actor_restarted", "kind": "rollout", "actor": member.index, "reason": why})

    def kill(self, member: Member, reason: str) -> None:
        """End an actor's process; Ray starts another, and its cells are heard of as lost."""
        member.killed, member.ended = reason, (member.node, member.process)
        ray.kill(member.actor, no_restart=False)

    def strike(self, member: Member, reason: str) -> None:
        """An actor could not draw. After MAX_RENDERER_STRIKES in a row it is replaced by one that draws in software, or
        given up if it did so already. Raises FleetLostError when nobody is left."""
        member.strikes += 1
        if member.strikes < MAX_RENDERER_STRIKES or member not in self.all:
            return
        self.all.remove(member)
        ray.kill(member.actor)
        software = "osmesa" in reason or member.renderer == "osmesa"
        kind = "renderer_quarantined" if software or self._make is None else "renderer_fell_back"
        self._on_event({"event": kind, "actor": member.index, "reason": reason})
        if kind == "renderer_fell_back":
            self._add("osmesa")
            return
        self.quarantined += 1
        if not self.all:
            raise FleetLostError(
                f"no rollout actor is left that can draw: {reason}; set environment.renderer to one that works here "
                "(`python launch.py assets` and mujoco's own tests tell), and resume the run"
            )

    def release(self, busy: set[int]) -> None:
        """Let actors beyond the least number go that had no work for a while, and those yet to come once they are not
        wanted any more. The oldest that are there stay, also where they were idle first: they lie on the nodes that the
        rest of the run was placed on."""
        if self._make is None:
            return
        kept = sorted(self.all, key=lambda member: (member.away is not None, member.index))[: self._least]
        now = time.monotonic()
        for member in [member for member in self.all if member not in kept]:
            unwanted = member.away is None or len(self.all) > self._wanted
            if unwanted and member.index not in busy and now - member.idle_since > self._release_after_s:
                self.all.remove(member)
                ray.kill(member.actor)

    def watch(self, busy: set[int]) -> None:
        """Give no more cells to actors on nodes that are about to go, and move those that are done elsewhere."""
        if self._nodes is None:
            return
        leaving = self._nodes.look()
        for member in self.all:
            if member.away is None and member.node in leaving:
                member.draining = True
                if member.index not in busy:
                    self.kill(member, f"its node {member.node[:8]} is about to go")
                    self.note_death(member, member.deaths, "")

    def is_off(self, member: Member) -> bool:
        """Whether the node that an actor was on is gone, and the actor with it."""
        return self._nodes is not None and self._nodes.is_gone(member.node)

    def status(self) -> dict[str, int]:
        """How many are wanted, ready, starting or restarting, on nodes about to go, and given up."""
        return {
            "wanted": len(self.all),
            "ready": len(self.ready()),
            "away": sum(member.away is not None for member in self.all),
            "draining": sum(member.draining for member in self.all),
            "quarantined": self.quarantined,
            "restarts": self._restarts,
        }


def _introduction(actor: Any) -> ray.ObjectRef:
    """What answers once the actor is there: with who and where it is, if it can say."""
    introduce = getattr(actor, "introduce", None)
    return actor.__ray_ready__.remote() if introduce is None else introduce.remote()
