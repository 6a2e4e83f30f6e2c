"""The canary: a new version drives a few rollouts before the fleet gets it.

It runs on cells that the version in force has just driven, so the trial is paired: same task, same initial state,
same random numbers. It is rolled back when the exact one-sided McNemar test says it is worse.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from configs.preference import GuardPart
from envs.protocol import mcnemar_worse
from trajectories.records import Cell


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """Outcome of one trial."""

    promoted: bool
    cells: int
    """Cells both versions finished."""
    before: int
    """Successes of the version in force on those cells."""
    after: int
    """Successes of the candidate on those cells."""
    p_worse: float
    """One-sided exact McNemar p-value of `the candidate is worse`."""

    def describe(self) -> dict[str, float | int]:
        return {"cells": self.cells, "before": self.before, "after": self.after, "p_worse": self.p_worse}


def judge(before: Mapping[Cell, bool], after: Mapping[Cell, bool], part: GuardPart) -> Verdict:
    """Promote the candidate unless it is significantly worse on the cells both have driven, or there are none.

    Args:
        before: cell -> success of the version in force.
        after: cell -> success of the candidate; an episode of the candidate's that faults or never ends is a failure.
    """
    shared = sorted(before.keys() & after.keys())
    p_worse = mcnemar_worse({c: before[c] for c in shared}, {c: after[c] for c in shared}) if shared else 1.0
    untested = part.canary_episodes > 0 and not shared
    return Verdict(
        promoted=p_worse >= part.canary_significance and not untested,
        cells=len(shared),
        before=sum(before[c] for c in shared),
        after=sum(after[c] for c in shared),
        p_worse=p_worse,
    )
