"""What a learning round says about itself, and the tripwire that may end it early."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

WINDOW = 10
"""Steps over which the tripwire's mean and the report's metrics are taken."""


@dataclass(frozen=True, kw_only=True, slots=True)
class UpdateReport:
    """One learning round."""

    stopped: Literal["", "skipped", "tripped"]
    """Empty: ran to its end. `skipped`: there was nothing to learn from. `tripped`: the tripwire ended it, and
    adapter and optimizer are as they were before the round."""
    reason: str
    """Why it stopped, in words; empty otherwise."""
    steps: int
    """Optimizer steps taken (also those undone)."""
    value: float
    """What crossed the tripwire (nats per token, a loss or a gradient norm); 0 otherwise."""
    metrics: Mapping[str, float]
    """Mean over the last steps; see `learners.terms` for the names."""
    history: Sequence[Mapping[str, float]]
    """The metrics of every step."""

    def summary(self) -> dict[str, Any]:
        """Flat JSON values: everything but the history."""
        return {
            "stopped": self.stopped,
            "reason": self.reason,
            "steps": self.steps,
            "value": self.value,
            **self.metrics,
        }


def skipped(reason: str) -> UpdateReport:
    """The report of a round with nothing to learn from."""
    return UpdateReport(stopped="skipped", reason=reason, steps=0, value=0.0, metrics={}, history=())


@dataclass(frozen=True, kw_only=True, slots=True)
class Trip:
    """Why an update has to be undone."""

    reason: str
    value: float


class Tripwire:
    """Watches an update for what destroys a policy while loss and margin look healthy.

    DPO can raise its margin by lowering the chosen log-prob, so long as the rejected one falls faster (likelihood
    displacement, arXiv 2410.08847). The guard is on the running mean of the preferred side's log-ratio.
    """

    def __init__(self, chosen_drop: float, *, window: int) -> None:
        """`chosen_drop`: nats per token that the preferred side may fall below its reference, in the mean of `window`
        steps; before there are as many, only what is not finite is judged. The optimizer's first steps move every
        parameter by the full learning rate, and the mean of two or three is mostly that and noise; nothing is lost by
        waiting, for an update is undone exactly."""
        self._limit = -chosen_drop
        self._recent: deque[float] = deque(maxlen=window)

    def check(self, logratio: float, **finite: float) -> Trip | None:
        """Judge one step. `finite` are further values, by name, that must be finite."""
        for name, value in {"log-ratio": logratio, **finite}.items():
            if not math.isfinite(value):
                return Trip(reason=f"{name} is not finite", value=value)
        self._recent.append(logratio)
        mean = sum(self._recent) / len(self._recent)
        if len(self._recent) == self._recent.maxlen and mean < self._limit:
            return Trip(
                reason=f"chosen log-prob fell {-mean:.3f} nats per token below its reference over the last "
                f"{len(self._recent)} steps, limit {-self._limit}",
                value=mean,
            )
        return None


def mean_of_last(history: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean of each metric over the last steps; those that a step lacks are left out of its mean."""
    recent = history[-WINDOW:]
    names = dict.fromkeys(name for metrics in recent for name in metrics)
    means = {}
    for name in names:
        values = [metrics[name] for metrics in recent if name in metrics]
        means[name] = sum(values) / len(values)
    return means
