"""The pulse of a sweep: every few seconds, one line on how fast it goes, who is there and which weights each serves."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import RayError

from actors.autoscaler import autoscaler_state
from actors.crew import Crew
from actors.run_folder import RunFolder

BEAT_S = 5.0
WINDOW_S = 30.0
"""What speed is measured over: between two beats there may be no episode that ends, or several at once."""


class Pulse:
    """Counts what a sweep does, and puts it on record now and then as a metric of the stage `fleet`."""

    def __init__(self, crew: Crew, folder: RunFolder, version: int) -> None:
        """`version`: what the sweep is driven with."""
        self._crew, self._folder = crew, folder
        self._staleness = max(folder.published(), default=version) - version
        self._begun = self._last = time.monotonic()
        self._ended: deque[tuple[float, int]] = deque()
        self._asked: list[ray.ObjectRef] = []

    def count(self, env_steps: int) -> None:
        """One episode more; what `due` does besides."""
        self._ended.append((time.monotonic(), env_steps))
        self.due()

    def due(self) -> None:
        """Says how it goes, and what other actors had to tell, if it is time to: also while nothing ends, for who is
        there changes then too."""
        if time.monotonic() - self._last >= BEAT_S:
            self._beat()

    def tell(self) -> None:
        """Put on record what other actors had to tell."""
        for event in ray.get(self._crew.monitor.pop_events.remote()):
            self._folder.event(event)

    def _beat(self) -> None:
        self.tell()
        self._last = time.monotonic()
        while self._ended and self._last - self._ended[0][0] > WINDOW_S:
            self._ended.popleft()
        passed = min(self._last - self._begun, WINDOW_S)
        status = self._crew.fleet.members.status()
        self._folder.metric(
            "fleet",
            env_steps_per_s=round(sum(steps for _, steps in self._ended) / passed, 1),
            episodes_per_s=round(len(self._ended) / passed, 3),
            rollout_actors=status,
            policy_actors=self._serving(),
            nodes=self._crew.nodes.status() if self._crew.nodes is not None else [],
            pending={"rollout actor": status["away"]} if status["away"] else {},
            **({"autoscaler": state} if (state := autoscaler_state()) else {}),
            staleness=self._staleness,
        )

    def _serving(self) -> list[dict[str, Any]]:
        """What the policy actors answered to the last beat's question: nobody waits for one that is restarting."""
        said = answers(self._asked)
        self._asked = [policy.serving.remote() for policy in self._crew.policies]
        return [{"actor": actor, **answer} for actor, answer in said.items() if answer]


def answers(asked: Sequence[ray.ObjectRef]) -> dict[int, dict[str, Any]]:
    """What has been answered so far, by the place of the question; one that failed counts as not answered."""
    said = {}
    for place, ref in enumerate(asked):
        try:
            said[place] = ray.get(ref, timeout=0)
        except RayError:
            continue
    return said
