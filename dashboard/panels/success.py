"""Success by task and policy version, and by initial state."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Mapping
from typing import Any

from dashboard.rates import Rate

Task = tuple[str, int]
VERSIONS = 12
"""Latest versions that each task is shown for, beside the first."""
VERSIONS_IN_ALL = 400
"""Versions that all tasks together are shown for."""
HEAT_VERSIONS = 3
"""Latest versions that an initial state's rate is over."""
GROUPS = {"evaluation": "held_out", "rollout": "training", "canary": "training"}
"""Phase of an episode -> which of the two groups it counts for."""


class Tally:
    """[successes, episodes] by version; faults count for neither. Beyond `most` versions the second oldest goes, for
    the first is what the others are compared with."""

    def __init__(self, most: int) -> None:
        self.counts: OrderedDict[int, list[int]] = OrderedDict()
        self._most = most

    def add(self, version: int, success: bool) -> None:
        count = self.counts.setdefault(version, [0, 0])
        count[0] += success
        count[1] += 1
        if len(self.counts) > self._most:
            del self.counts[sorted(self.counts)[1]]

    def rows(self) -> list[dict[str, float]]:
        """Per version, oldest first: successes, episodes, and the rate with its 95 % Wilson interval."""
        return [{"version": version, **rate_row(*self.counts[version])} for version in sorted(self.counts)]


def rate_row(successes: int, episodes: int) -> dict[str, float]:
    """Counts (episodes >= 1), rate and 95 % Wilson interval as the page takes them."""
    rate = Rate(successes=successes, episodes=episodes)
    low, high = rate.interval
    return {
        "successes": successes,
        "episodes": episodes,
        "rate": round(rate.value, 4),
        "low": round(low, 4),
        "high": round(high, 4),
    }


class Success:
    """Section `success`: held-out and training-state success of all tasks and of each, by version."""

    def __init__(self) -> None:
        self._all = {group: Tally(VERSIONS_IN_ALL) for group in ("held_out", "training")}
        self._tasks: dict[Task, dict[str, Tally]] = {}

    def take(self, journal: str, line: Mapping[str, Any]) -> bool:
        """Fold a line in; whether the section changed."""
        group = GROUPS.get(line["phase"]) if journal == "episodes" else None
        if group is None or line["outcome"] == "fault":
            return False
        task = str(line["suite"]), int(line["task_id"])
        tallies = self._tasks.setdefault(
            task, {"held_out": Tally(VERSIONS + 1), "training": Tally(VERSIONS + 1)}
        )
        for tally in (self._all[group], tallies[group]):
            tally.add(int(line["policy_version"]), line["outcome"] == "success")
        return True

    def section(self) -> dict[str, Any]:
        return {
            "all": {group: tally.rows() for group, tally in self._all.items()},
            "tasks": [
                {"suite": suite, "task": task, **{g: tally.rows() for g, tally in tallies.items()}}
                for (suite, task), tallies in sorted(self._tasks.items())
            ],
        }

    def ends(self) -> list[dict[str, float]]:
        """The first and the last held-out version's row; fewer where fewer were evaluated."""
        rows = self._all["held_out"].rows()
        return [rows[0], rows[-1]] if len(rows) > 1 else rows


class HeatMap:
    """Section `heat`: for each task and initial state, successes and episodes of the latest versions that drove it."""

    def __init__(self) -> None:
        self._cells: dict[Task, dict[int, OrderedDict[int, list[int]]]] = defaultdict(dict)

    def take(self, journal: str, line: Mapping[str, Any]) -> bool:
        """Fold a line in; whether the section changed."""
        if journal != "episodes" or line["phase"] not in GROUPS:
            return False
        states = self._cells[str(line["suite"]), int(line["task_id"])]
        versions = states.setdefault(int(line["init_state"]), OrderedDict())
        count = versions.setdefault(int(line["policy_version"]), [0, 0, 0])
        faulty = line["outcome"] == "fault"
        count[0] += line["outcome"] == "success"
        count[1] += not faulty
        count[2] += faulty
        if len(versions) > HEAT_VERSIONS:
            del versions[min(versions)]
        return True

    def section(self) -> dict[str, Any]:
        """Rows of [initial state, successes, episodes, faults, oldest version, newest version] for each task."""
        return {
            "tasks": [
                {
                    "suite": suite,
                    "task": task,
                    "cells": [
                        [state, *(sum(column) for column in zip(*v.values(), strict=True)), min(v), max(v)]
                        for state, v in sorted(states.items())
                    ],
                }
                for (suite, task), states in sorted(self._cells.items())
            ]
        }
