"""The monitor actor: what long work says of its progress. It imports no torch, and so starts quickly."""

from __future__ import annotations

from typing import Any

import ray


class Monitor:
    """Where long work in other processes says how far it is; the driver reads it."""

    def __init__(self) -> None:
        self._latest: tuple[str, int, int, dict[str, float]] = ("", 0, 1, {})
        self._lines: list[dict[str, Any]] = []
        self._events: list[dict[str, Any]] = []

    def report(self, stage: str, done: int, total: int, metrics: dict[str, float]) -> None:
        self._latest = (stage, done, total, metrics)
        self._lines.append({"stage": stage, "step": done, **metrics})

    def tell(self, event: dict[str, Any]) -> None:
        """Something that a person should know."""
        self._events.append(event)

    def pop_events(self) -> list[dict[str, Any]]:
        """Every event since the last call."""
        events, self._events = self._events, []
        return events

    def pop(self) -> tuple[tuple[str, int, int, dict[str, float]], list[dict[str, Any]]]:
        """The latest progress, and every line since the last call."""
        lines, self._lines = self._lines, []
        return self._latest, lines


MonitorActor = ray.remote(Monitor)
