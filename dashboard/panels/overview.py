"""What the head of the page says: which run this is, how it stands, and what it has come to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from configs.schema import Recipe

STAND_IN_WARNING = (
    "Simulated with procedural stand-in assets, not LIBERO's own: these results compare with each other and are not "
    "comparable with published tables."
)
DOING = {
    "demonstration": "collecting demonstrations",
    "rollout": "collecting rollouts",
    "canary": "trying the new version",
    "evaluation": "evaluating on held-out states",
    "supervised": "supervised start",
    "pairs": "mining pairs",
    "update": "learning",
    "learned": "learned",
    "published": "publishing weights",
}
"""Phase of an episode or stage of a metric -> what is going on, in words."""


class Overview:
    """Section `run`, but for what the files beside the journals say (`extra`)."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._counts: Counter[str] = Counter()
        self._hashes: dict[int, str] = {}
        self._version: int | None = None
        self._doing: dict[str, Any] = {}
        self._times: dict[str, float] = {}
        self.extra: dict[str, Any] = {}

    def take(self, journal: str, line: Mapping[str, Any]) -> bool:
        """Fold a line in; whether the section changed."""
        time = line.get("time")
        if time is not None:
            self._times["started"] = min(self._times.get("started", float(time)), float(time))
            self._times["latest"] = max(self._times.get("latest", 0.0), float(time))
        match journal:
            case "episodes":
                self._counts["episodes"] += 1
                self._counts["faults"] += line["outcome"] == "fault"
                self._does(str(line["phase"]), line, version=line["policy_version"])
            case "events":
                self._counts[str(line["event"])] += 1
                if line["event"] == "promoted":
                    self._version = int(line["version"])
            case "metrics":
                self._metric(line)
        return True

    def _metric(self, line: Mapping[str, Any]) -> None:
        stage = str(line.get("stage"))
        if stage == "published":
            version = int(line["version"])
            self._version = version if self._version is None else self._version
            self._hashes[version] = str(line.get("hash", ""))
            if len(self._hashes) > 100:
                # The first stays: a run that never promotes ends on it.
                del self._hashes[sorted(self._hashes)[1]]
        if stage in DOING:
            self._does(stage, line, version=line.get("version"))

    def _does(self, what: str, line: Mapping[str, Any], *, version: Any) -> None:
        """The latest thing heard of; between journals by time, where both lines have one."""
        earlier, now = self._doing.get("time"), line.get("time")
        if now is not None and earlier is not None and now < earlier:
            return
        self._doing = {
            "what": DOING.get(what, what),
            "round": line.get("round"),
            "step": line.get("step"),
            "version": version,
            "time": now if now is not None else earlier,
        }

    def section(self) -> dict[str, Any]:
        recipe = self._recipe
        steps = {"supervised start": recipe.supervised.steps, "learning": recipe.preference.steps}
        return {
            "name": recipe.name,
            "suite": recipe.tasks.suite,
            "tasks": list(recipe.tasks.task_ids),
            "paradigm": recipe.policy.paradigm,
            "adapter": recipe.adapter.method,
            "schedule": recipe.schedule,
            "rounds": recipe.rollouts.rounds,
            "counts": dict(self._counts),
            "version": self._version,
            "hash": self._hashes.get(-1 if self._version is None else self._version, ""),
            "doing": self._doing | {"steps": steps.get(self._doing.get("what", ""))},
            **self._times,
            **self.extra,
        }


def assets_of(fingerprint: Mapping[str, Any], result: Mapping[str, Any]) -> dict[str, str]:
    """Where the simulator's assets came from, and the warning that goes with it; empty texts where nothing says."""
    assets = fingerprint.get("assets")
    kind = assets.get("kind") if isinstance(assets, Mapping) else assets
    kind = str(result.get("assets") or kind or "")
    return {"assets": kind, "warning": STAND_IN_WARNING if kind == "stand-in" else ""}
