"""The run's measured series by name: what each is called in Prometheus, in TensorBoard and in Weights & Biases.

`dashboard.samples` makes them from what a run records, `actors.trackers` sends them, `dashboard/grafana.json` draws
them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PREFIX = "pairloom_"
EXPORT_PREFIX = "ray_"
"""What Ray puts before the names of metrics that it exports to Prometheus."""
RUN = "run"
"""The label that every series has: the run's name."""

Axis = Literal["env_steps", "optimizer_step", "supervised_step"]
"""What a series is drawn over: simulator steps of the episodes so far, optimizer steps of all rounds in order, or
those of the supervised start."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """One series, or one for each value of its labels."""

    key: str
    """Its name here, and with PREFIX before it in `ray.util.metrics`."""
    help: str
    """What it measures, with its unit."""
    tag: str
    """Its tag in TensorBoard and Weights & Biases; `{label}` stands for a label's value."""
    kind: Literal["gauge", "counter"] = "gauge"
    labels: tuple[str, ...] = ()
    """Beside RUN."""
    axis: Axis = "env_steps"

    @property
    def name(self) -> str:
        """As `ray.util.metrics` is told it."""
        return PREFIX + self.key

    @property
    def exported(self) -> str:
        """As Prometheus reads it from Ray's export: a counter's ends in `_total`."""
        return EXPORT_PREFIX + self.name + ("_total" if self.kind == "counter" else "")


_OF_TASK = ("phase", "task", "version")
_ROLLOUTS: tuple[Metric, ...] = (
    Metric(
        key="success_rate",
        help="Share of the episodes without a fault that succeeded, 0 to 1",
        tag="success/{phase}/{task}",
        labels=_OF_TASK,
    ),
    Metric(
        key="success_low",
        help="Lower bound of the success rate's 95 % Wilson interval",
        tag="success_low/{phase}/{task}",
        labels=_OF_TASK,
    ),
    Metric(
        key="success_high",
        help="Upper bound of the success rate's 95 % Wilson interval",
        tag="success_high/{phase}/{task}",
        labels=_OF_TASK,
    ),
    Metric(
        key="episodes",
        help="Episodes that ended, by phase and outcome",
        tag="episodes/{phase}/{outcome}",
        kind="counter",
        labels=("phase", "outcome"),
    ),
    Metric(
        key="env_steps",
        help="Simulator steps of the episodes that ended",
        tag="rollouts/env_steps/{phase}",
        kind="counter",
        labels=("phase",),
    ),
    Metric(
        key="env_steps_per_s",
        help="Simulator steps per second, of all rollout actors together",
        tag="rollouts/env_steps_per_s",
    ),
    Metric(
        key="episodes_per_s",
        help="Episodes per second, of all rollout actors together",
        tag="rollouts/episodes_per_s",
    ),
    Metric(
        key="demonstrations",
        help="Demonstrations kept for the supervised start",
        tag="rollouts/demonstrations",
    ),
)
_SERVING: tuple[Metric, ...] = (
    Metric(
        key="decision_latency_ms",
        help="Milliseconds a policy actor takes for a batch of decisions",
        tag="serving/decision_latency_ms/{actor}",
        labels=("actor",),
    ),
    Metric(
        key="batch_fill",
        help="Decisions in a policy actor's batch, mean",
        tag="serving/batch_fill/{actor}",
        labels=("actor",),
    ),
    Metric(
        key="policy_version",
        help="Version that a policy actor serves",
        tag="serving/version/{actor}",
        labels=("actor",),
    ),
    Metric(
        key="staleness",
        help="Versions that the episodes under way lag behind the version in force",
        tag="serving/staleness",
    ),
    Metric(key="version_in_force", help="Version that drives the fleet", tag="versions/in_force"),
    Metric(
        key="merge_drift",
        help="Relative difference between a merged layer's output and that of base and adapter side by side",
        tag="versions/merge_drift",
    ),
    Metric(
        key="candidates",
        help="Updates by how they ended: promoted, rolled_back, tripped, refused or skipped",
        tag="versions/candidates/{verdict}",
        kind="counter",
        labels=("verdict",),
    ),
)
_LEARNING: tuple[Metric, ...] = (
    Metric(key="pairs_mined", help="Preference pairs that the last mining found", tag="pairs/mined"),
    Metric(
        key="unpairable_states",
        help="Initial states that gave no pair: all_success, all_failure or other",
        tag="pairs/unpairable/{reason}",
        labels=("reason",),
    ),
    Metric(
        key="supervised_loss",
        help="Loss of the supervised start, nats per token",
        tag="supervised/loss",
        axis="supervised_step",
    ),
    *(
        Metric(key=key, help=text, tag=f"update/{key}", axis="optimizer_step")
        for key, text in (
            ("loss", "Loss of the preference update, all terms"),
            ("preference_loss", "DPO term of the loss, unweighted"),
            ("grad_norm", "Gradient norm of the preference update, before clipping"),
            ("margin", "Implicit reward of chosen minus rejected, beta times nats"),
            ("chosen_reward", "Implicit reward of the chosen trajectories, beta times nats"),
            ("rejected_reward", "Implicit reward of the rejected trajectories, beta times nats"),
            ("accuracy", "Share of pairs whose chosen implicit reward is the larger, 0 to 1"),
            ("chosen_logratio", "Log-ratio to the reference of chosen decisions, nats per token"),
            ("rejected_logratio", "Log-ratio to the reference of rejected decisions, nats per token"),
            ("success_logratio", "Log-ratio to the reference of successful decisions, nats per token"),
            ("kl", "Minus the mean log-ratio over both sides' decisions, nats per token"),
        )
    ),
)
_CLUSTER: tuple[Metric, ...] = (
    Metric(
        key="restarts",
        help="Actors that were restarted, by kind",
        tag="faults/restarts/{kind}",
        kind="counter",
        labels=("kind",),
    ),
    Metric(
        key="quarantines",
        help="Cells and renderers that were set aside after repeated faults",
        tag="faults/quarantines/{kind}",
        kind="counter",
        labels=("kind",),
    ),
    Metric(key="requeued", help="Episodes that were driven again", tag="faults/requeued", kind="counter"),
    Metric(
        key="renderer_fallbacks",
        help="Renderers that gave way to another",
        tag="faults/renderer_fallbacks",
        kind="counter",
    ),
    Metric(key="resumes", help="Times the run was resumed", tag="faults/resumes", kind="counter"),
    Metric(
        key="rollout_actors",
        help="Rollout actors by state: wanted, ready, away, draining or quarantined",
        tag="cluster/rollout_actors/{state}",
        labels=("state",),
    ),
    Metric(
        key="nodes",
        help="Nodes by state: alive, draining or starting",
        tag="cluster/nodes/{state}",
        labels=("state",),
    ),
    Metric(
        key="node_events",
        help="Nodes that joined, were lost or began to drain",
        tag="cluster/node_events/{event}",
        kind="counter",
        labels=("event",),
    ),
    Metric(
        key="pending",
        help="Actors that wait for a place, by kind",
        tag="cluster/pending/{kind}",
        labels=("kind",),
    ),
)

METRICS: dict[str, Metric] = {m.key: m for m in (*_ROLLOUTS, *_SERVING, *_LEARNING, *_CLUSTER)}
"""Key -> metric."""
UPDATE_KEYS = tuple(m.key for m in _LEARNING if m.axis == "optimizer_step")
"""Those that an `update` line of metrics.jsonl holds under the same name."""
