"""Runs compared on the held-out cells that they share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from scipy.stats import binomtest

CellKey = tuple[str, int, int, int]
VERSIONS = 2
"""Latest versions whose outcomes are kept cell by cell, beside the first."""


class HeldOut:
    """Held-out outcomes, by version and cell (suite, task, initial state, seed)."""

    def __init__(self) -> None:
        self._outcomes: dict[int, dict[CellKey, bool]] = {}

    def take(self, journal: str, line: Mapping[str, Any]) -> bool:
        """Fold a line in; whether an outcome was added."""
        if journal != "episodes" or line["phase"] != "evaluation" or line["outcome"] == "fault":
            return False
        cell = str(line["suite"]), int(line["task_id"]), int(line["init_state"]), int(line["seed"])
        self._outcomes.setdefault(int(line["policy_version"]), {})[cell] = line["outcome"] == "success"
        if len(self._outcomes) > VERSIONS + 1:
            del self._outcomes[sorted(self._outcomes)[1]]
        return True

    def last(self) -> tuple[int, Mapping[CellKey, bool]]:
        """The newest evaluated version and its outcomes; version -1 and none when there is none."""
        version = max(self._outcomes, default=-1)
        return version, self._outcomes.get(version, {})


def compared(here: Mapping[CellKey, bool], there: Mapping[CellKey, bool]) -> dict[str, Any]:
    """`cells` that both drove, `gained` (succeed there, fail here), `lost` (the reverse), and `p`, the two-sided exact
    McNemar test (None without a shared cell)."""
    shared = here.keys() & there.keys()
    gained = sum(there[cell] and not here[cell] for cell in shared)
    lost = sum(here[cell] and not there[cell] for cell in shared)
    differ = gained + lost
    p = binomtest(gained, differ).pvalue if differ else 1.0
    return {"cells": len(shared), "gained": gained, "lost": lost, "p": float(f"{p:.3g}") if shared else None}
