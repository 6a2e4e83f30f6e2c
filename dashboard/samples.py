"""What a run records, as values of the series in `dashboard.metric_names`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from dashboard.metric_names import METRICS, UPDATE_KEYS, Metric
from dashboard.rates import Rate

_SWEEPS = ("rollout", "canary")
"""Stages that drive cells, and any that begins with `evaluation`."""
_PER_ACTOR = (("decision_latency_ms", "act_ms"), ("batch_fill", "batch_fill"), ("policy_version", "version"))
"""Key -> its name in the entry of a policy actor."""
_UNPAIRABLE = {
    "all_success": "states_all_success",
    "all_failure": "states_all_failure",
    "other": "states_unpairable_other",
}
_COUNTED = {
    "promoted": ("candidates", {"verdict": "promoted"}),
    "rolled_back": ("candidates", {"verdict": "rolled_back"}),
    "tripped": ("candidates", {"verdict": "tripped"}),
    "refused": ("candidates", {"verdict": "refused"}),
    "skipped": ("candidates", {"verdict": "skipped"}),
    "requeued": ("requeued", {}),
    "renderer_fell_back": ("renderer_fallbacks", {}),
    "renderer_quarantined": ("quarantines", {"kind": "renderer"}),
    "node_joined": ("node_events", {"event": "joined"}),
    "node_lost": ("node_events", {"event": "lost"}),
    "node_draining": ("node_events", {"event": "draining"}),
    "resumed": ("resumes", {}),
}
"""Event -> the counter that it adds 1 to, and its labels."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One value of a series."""

    metric: Metric
    value: float
    """Of a counter, the total so far."""
    labels: Mapping[str, str] = field(default_factory=dict)
    step: int | None
    """Where on the metric's axis; None for a value that is only of the moment and belongs on no curve."""
    increase: float = 0.0
    """Of a counter, what was added since the last sample; 0 for a gauge."""

    @property
    def tag(self) -> str:
        """`METRIC/label`, as TensorBoard names it."""
        return self.metric.tag.format(**self.labels)


class Samples:
    """Turns each metric line, episode and event of a run, in order, into samples. A key that a line has not, or that
    holds no number, gives none."""

    def __init__(self, *, steps_per_round: int) -> None:
        """`steps_per_round`: optimizer steps of one update, so that the steps of the rounds follow each other."""
        self._steps_per_round = steps_per_round
        self._env_steps = 0
        self._totals: Counter[tuple[str, tuple[tuple[str, str], ...]]] = Counter()
        self._uncounted: dict[tuple[str, tuple[tuple[str, str], ...]], None] = {}
        """Counters, by key and labels, whose totals are on no curve yet, oldest first."""
        self._rates: dict[tuple[str, str, str], Rate] = {}
        """(phase, task, version) -> its episodes without a fault."""
        self._unsaid: dict[tuple[str, str, str], None] = {}
        """Those that changed since they last were on a curve, oldest first."""
        self._replayed: set[tuple[str, str]] = set()
        """(phase, trajectory id) of what an earlier process recorded, which a resumed run may record again."""
        self._in_force: Any = None
        """The version in force, once one is."""
        self._quarantined: set[str] = set()
        self._pending: set[str] = set()

    def replay(self, episodes: Iterable[Mapping[str, Any]], events: Iterable[Mapping[str, Any]]) -> None:
        """Take up where an earlier process left off: what its journals hold is counted and not said again."""
        for record in episodes:
            self.episode(record)
            self._replayed.add((str(record["phase"]), str(record["trajectory_id"])))
        for event in events:
            self.event(event)
        self._unsaid.clear()
        self._uncounted.clear()

    def episode(self, record: Mapping[str, Any]) -> list[Sample]:
        """Of one line of episodes.jsonl; none of an episode that an earlier process has recorded."""
        if (record["phase"], record.get("trajectory_id")) in self._replayed:
            return []
        phase, outcome = str(record["phase"]), str(record["outcome"])
        steps = int(_number(record.get("env_steps")) or 0)
        self._env_steps += steps
        found = [self._count("episodes", {"phase": phase, "outcome": outcome}, on_curve=False)]
        if steps:
            found.append(self._count("env_steps", {"phase": phase}, by=steps, on_curve=False))
        if outcome == "fault" or phase == "demonstration":
            return found
        key = (phase, f"{record['suite']}/{record['task_id']}", str(record["policy_version"]))
        old = self._rates.get(key)
        self._rates[key] = Rate(
            successes=(old.successes if old else 0) + (outcome == "success"),
            episodes=(old.episodes if old else 0) + 1,
        )
        self._unsaid[key] = None
        return found + self._rate(key, step=None)

    def metric(self, line: Mapping[str, Any]) -> list[Sample]:
        """Of one line of metrics.jsonl."""
        stage = str(line.get("stage", ""))
        if stage == "update":
            return self._update(line)
        if stage == "supervised":
            return self._gauges({"supervised_loss": line.get("loss")}, step=int(line["step"]))
        if stage == "pairs":
            return self._pairs(line)
        if stage == "fleet":
            return self._fleet(line)
        if stage == "published":
            if self._in_force is None:  # the start's own; a later version is in force once it is promoted
                self._in_force = line.get("version")
            return self._gauges({"merge_drift": line.get("merge_drift"), "version_in_force": self._in_force})
        if stage == "demonstration":
            return self._gauges({"demonstrations": line.get("episodes")})
        if stage in _SWEEPS or stage.startswith("evaluation"):
            return self._sweep(line)
        return []

    def event(self, event: Mapping[str, Any]) -> list[Sample]:
        """Of one line of events.jsonl."""
        name = event.get("event")
        if name == "quarantined":
            cell = str(event.get("cell", ""))
            known = cell in self._quarantined  # the fleet and the sweep may both say it
            self._quarantined.add(cell)
            return [] if known else [self._count("quarantines", {"kind": "cell"})]
        if name == "actor_restarted":
            return [self._count("restarts", {"kind": str(event.get("kind", "rollout"))})]
        if name not in _COUNTED:
            return []
        key, labels = _COUNTED[name]
        found = [self._count(key, labels)]
        if name in ("promoted", "resumed"):
            self._in_force = event.get("version", self._in_force)
            found += self._gauges({"version_in_force": self._in_force})
        return found

    def rest(self) -> list[Sample]:
        """Success rates and counts of episodes that are on no curve yet."""
        found = [s for key in self._unsaid for s in self._rate(key, step=self._env_steps)]
        self._unsaid.clear()
        for key, labels in self._uncounted:
            total = self._totals[key, labels]
            found.append(Sample(metric=METRICS[key], value=total, labels=dict(labels), step=self._env_steps))
        self._uncounted.clear()
        return found

    def _update(self, line: Mapping[str, Any]) -> list[Sample]:
        step = int(line.get("round", 0)) * self._steps_per_round + int(line["step"])
        return self._gauges({key: line.get(key) for key in UPDATE_KEYS}, step=step)

    def _pairs(self, line: Mapping[str, Any]) -> list[Sample]:
        found = self._gauges({"pairs_mined": line.get("pairs")})
        for reason, key in _UNPAIRABLE.items():
            found += self._gauges({"unpairable_states": line.get(key)}, {"reason": reason})
        return found

    def _sweep(self, line: Mapping[str, Any]) -> list[Sample]:
        found = self._gauges({"env_steps_per_s": line.get("env_steps_per_s")})
        found += self._gauges({key: line.get(name) for key, name in _PER_ACTOR[:2]}, {"actor": "all"})
        return found + self.rest()

    def _fleet(self, line: Mapping[str, Any]) -> list[Sample]:
        found = self._gauges(
            {key: line.get(key) for key in ("env_steps_per_s", "episodes_per_s", "staleness")}
        )
        for state, count in line.get("rollout_actors", {}).items():
            found += self._gauges({"rollout_actors": count}, {"state": state})
        for entry in line.get("policy_actors", ()):
            values = {key: entry.get(name) for key, name in _PER_ACTOR}
            found += self._gauges(values, {"actor": str(entry.get("actor", ""))})
        if "nodes" in line:
            for state in ("alive", "draining"):
                count = sum(bool(node.get(state)) for node in line["nodes"])
                found += self._gauges({"nodes": count}, {"state": state})
        if "autoscaler" in line:
            starting = sum(line["autoscaler"].get("starting", {}).values())
            found += self._gauges({"nodes": starting}, {"state": "starting"})
        if "pending" in line:
            self._pending |= line["pending"].keys()  # a gauge keeps its last value: what is gone is 0
            for kind in sorted(self._pending):
                found += self._gauges({"pending": line["pending"].get(kind, 0)}, {"kind": kind})
        return found

    def _rate(self, key: tuple[str, str, str], *, step: int | None) -> list[Sample]:
        rate = self._rates[key]
        low, high = rate.interval
        values = {"success_rate": rate.value, "success_low": low, "success_high": high}
        labels = dict(zip(("phase", "task", "version"), key, strict=True))
        return [
            Sample(metric=METRICS[name], value=value, labels=labels, step=step)
            for name, value in values.items()
        ]

    def _count(self, key: str, labels: Mapping[str, str], *, by: int = 1, on_curve: bool = True) -> Sample:
        """`by` more of a counter; on its curve at the steps so far, unless not `on_curve`."""
        total = (key, tuple(labels.items()))
        self._totals[total] += by
        if not on_curve:
            self._uncounted[total] = None
        return Sample(
            metric=METRICS[key],
            value=self._totals[total],
            labels=labels,
            step=self._env_steps if on_curve else None,
            increase=by,
        )

    def _gauges(
        self, values: Mapping[str, Any], labels: Mapping[str, str] | None = None, *, step: int | None = None
    ) -> list[Sample]:
        """One sample for each number; at the simulator steps so far unless a step is given."""
        return list(_samples(values, labels or {}, self._env_steps if step is None else step))


def _samples(values: Mapping[str, Any], labels: Mapping[str, str], step: int) -> Iterator[Sample]:
    for key, value in values.items():
        number = _number(value)
        if number is not None:
            yield Sample(metric=METRICS[key], value=number, labels=labels, step=step)


def _number(value: Any) -> float | None:
    """A number as float; None for what is none."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
