"""The fleet: how fast it goes, which weights each policy actor serves, which nodes there are, and what went wrong."""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Mapping
from typing import Any

from dashboard.series import Series

ACTORS = 1_000
"""Policy actors in the table at most."""
INCIDENTS = 200
"""Latest incidents in the list."""
STAGES = ("rollout", "canary", "evaluation")
QUIET = {"serving", "requeued"}
"""Events that are too many or too ordinary for the list of incidents; they are counted all the same."""


class Speed:
    """Section `speed`: env steps/s, episodes/s, decision latency (ms a batch), batch fill (decisions a batch) and
    staleness (versions) over seconds since the first line.

    `fleet` lines give them every few seconds. Runs without any have one number a stage, at its end.
    """

    def __init__(self) -> None:
        self._series = Series("env_steps_per_s", "episodes_per_s", "act_ms", "batch_fill", "staleness")
        self._first: float | None = None
        self._fleet = False

    def take(self, journal: str, line: Mapping[str, Any]) -> bool:
        """Fold a line in; whether the section changed."""
        stage = line.get("stage") if journal == "metrics" else None
        if stage is None or line.get("time") is None:
            return False
        self._first = float(line["time"]) if self._first is None else self._first
        self._fleet |= stage == "fleet"
        if stage != ("fleet" if self._fleet else stage) or stage not in ("fleet", *STAGES):
            return False
        actors = [actor for actor in line.get("policy_actors") or () if actor]
        means = {name: _mean([actor.get(name) for actor in actors]) for name in ("act_ms", "batch_fill")}
        given = {name: value for name, value in line.items() if value is not None}
        self._series.append(float(line["time"]) - self._first, means | given)
        return True

    def section(self) -> dict[str, Any]:
        return {"first": self._first, **{name: self._series.drawn(name) for name in self._series.names}}


class Actors:
    """Section `actors`: the weight version and hash that each policy actor serves, and how often it restarted."""

    def __init__(self) -> None:
        self._actors: OrderedDict[str, dict[str, Any]] = OrderedDict()
        self._restarts: Counter[str] = Counter()
        self._by_kind: Counter[str] = Counter()
        self._in_force: int | None = None

    def take(self, journal: str, line: Mapping[str, Any]) -> bool:
        """Fold a line in; whether the section changed."""
        if journal == "metrics" and line.get("stage") == "fleet":
            for actor in line.get("policy_actors") or ():
                self._serve(actor, line.get("time"))
            return True
        if journal == "metrics" and line.get("stage") == "published" and self._in_force is None:
            self._in_force = int(line["version"])
            return True
        event = line["event"] if journal == "events" else None
        if event == "promoted":
            self._in_force = int(line["version"])
        elif event == "serving":
            self._serve(line, line.get("time"))
        elif event == "actor_restarted":
            kind = str(line.get("kind", "rollout"))
            self._by_kind[kind] += 1
            if kind == "policy":
                self._restarts[str(line.get("actor"))] += 1
        else:
            return False
        return True

    def _serve(self, line: Mapping[str, Any], time: Any) -> None:
        name = str(line["actor"])
        known = self._actors.setdefault(name, {"actor": name})
        known |= {key: line[key] for key in ("version", "hash", "batch_fill", "act_ms") if key in line}
        known["time"] = time
        if len(self._actors) > ACTORS:
            self._actors.popitem(last=False)

    def section(self) -> dict[str, Any]:
        ordered = sorted(self._actors.values(), key=lambda actor: (len(actor["actor"]), actor["actor"]))
        return {
            "in_force": self._in_force,
            "policy": [{**actor, "restarts": self._restarts[actor["actor"]]} for actor in ordered],
            "restarts": dict(self._by_kind),
        }


class Cluster:
    """Section `cluster`: the latest word on nodes, on rollout actors (wanted, ready, away, draining, quarantined), on
    what waits for a node, and on what the autoscaler is doing (starting, failed, infeasible)."""

    def __init__(self) -> None:
        self._latest: dict[str, Any] = {}

    def take(self, journal: str, line: Mapping[str, Any]) -> bool:
        """Fold a line in; whether the section changed."""
        if journal != "metrics" or line.get("stage") != "fleet":
            return False
        told = ("time", "rollout_actors", "nodes", "pending", "autoscaler")
        kept = {key: line[key] for key in told if key in line}
        self._latest |= kept
        return bool(kept)

    def section(self) -> dict[str, Any]:
        return self._latest


class Incidents:
    """Section `incidents`: events and faulty episodes, latest first, and how many of each kind there were."""

    def __init__(self) -> None:
        self._latest: deque[dict[str, Any]] = deque(maxlen=INCIDENTS)
        self._counts: Counter[str] = Counter()

    def take(self, journal: str, line: Mapping[str, Any]) -> bool:
        """Fold a line in; whether the section changed."""
        if journal == "episodes" and line["outcome"] == "fault":
            self._counts["fault"] += 1
            return True
        if journal != "events":
            return False
        event = str(line["event"])
        self._counts[event] += 1
        if event not in QUIET:
            self._latest.appendleft(dict(line))
        return True

    def section(self) -> dict[str, Any]:
        return {"counts": dict(self._counts), "latest": list(self._latest)}


def _mean(values: list[Any]) -> float | None:
    numbers = [float(value) for value in values if value is not None]
    return sum(numbers) / len(numbers) if numbers else None
