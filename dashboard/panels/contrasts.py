"""Which success and which failure to show side by side."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

STATES = 1_000
"""Latest (suite, task, initial state, version) whose episodes are remembered: a state's samples are driven together."""
FOUND = 500
"""Latest contrasts that are remembered: of those whose files are there, the page shows SHOWN."""
SHOWN = 6

Key = tuple[str, int, int, int]


class Contrasts:
    """The latest pairs of a success and a clean failure of one task, initial state and version: only the sampling made
    the difference. Evaluation's episodes are not stored, and so cannot be shown."""

    def __init__(self) -> None:
        self._sides: OrderedDict[Key, dict[bool, str]] = OrderedDict()
        self._found: OrderedDict[Key, dict[bool, str]] = OrderedDict()

    def take(self, journal: str, line: Mapping[str, Any]) -> bool:
        """Fold a line in; whether there is a new contrast."""
        if journal != "episodes" or line["phase"] not in ("rollout", "canary") or line["outcome"] == "fault":
            return False
        key = (
            str(line["suite"]),
            int(line["task_id"]),
            int(line["init_state"]),
            int(line["policy_version"]),
        )
        sides = self._sides.setdefault(key, {})
        sides[line["outcome"] == "success"] = str(line["trajectory_id"])
        self._sides.move_to_end(key)
        if len(self._sides) > STATES:
            self._sides.popitem(last=False)
        if len(sides) < 2:
            return False
        self._found[key] = dict(sides)
        self._found.move_to_end(key)
        if len(self._found) > FOUND:
            self._found.popitem(last=False)
        return True

    def latest(self) -> Iterator[dict[str, Any]]:
        """Latest first: suite, task, init_state, version, and the trajectory ids `success` and `failure`."""
        for key, sides in reversed(self._found.items()):
            yield {
                **dict(zip(("suite", "task", "init_state", "version"), key, strict=True)),
                "success": sides[True],
                "failure": sides[False],
            }
