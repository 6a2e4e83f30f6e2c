"""Where metrics go: event files that TensorBoard reads, what Ray exports to Prometheus, and Weights & Biases."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import ray
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from actors.placement import connect
from actors.run_folder import RunFolder
from actors.trackers import PrometheusSink, Trackers, check_tracking, start_trackers
from configs.loader import RecipeError, load_recipe
from configs.operation import TrackingPart
from configs.schema import Recipe
from dashboard.metric_names import EXPORT_PREFIX, METRICS, PREFIX
from dashboard.samples import Sample, Samples

TINY = Path(__file__).parent / "recipes" / "one_task.yaml"


def recipe(root: Path, *overrides: str) -> Recipe:
    return load_recipe(TINY, [f"root={root}", "tracking.prometheus=false", *overrides])


def episode(outcome: str, number: int = 0, *, version: int = 0, env_steps: int = 100) -> dict[str, Any]:
    return {
        "suite": "libero_object",
        "task_id": 0,
        "init_state": 0,
        "seed": number,
        "outcome": outcome,
        "success": outcome == "success",
        "fault": "",
        "policy_version": version,
        "env_steps": env_steps,
        "trajectory_id": f"t{number}",
    }


def sweep(folder: RunFolder) -> None:
    """Four episodes, one of which succeeds and one of which ends in a fault, and what a sweep says of itself."""
    for number, outcome in enumerate(("success", "timeout", "timeout", "fault")):
        folder.episode("rollout", 0, episode(outcome, number))
    folder.metric(
        "rollout", round=0, version=0, env_steps=400, env_steps_per_s=93.1, batch_fill=3.5, act_ms=41.0
    )


def values(found: Sequence[Sample]) -> dict[str, float]:
    return {sample.tag: sample.value for sample in found}


def curve(events: EventAccumulator, tag: str) -> list[tuple[int, float]]:
    return [(point.step, round(point.value, 4)) for point in events.Scalars(tag)]


def read_back(run: Path) -> EventAccumulator:
    (file,) = (run / "tensorboard").iterdir()
    events = EventAccumulator(str(file), size_guidance={"scalars": 0})
    events.Reload()
    return events


def test_tensorboard_reads_back_what_a_run_recorded(tmp_path: Path) -> None:
    folder = RunFolder.create(recipe(tmp_path))
    folder.metric("published", version=0, hash="ab", merge_drift=0.0)
    sweep(folder)
    for index, step in ((0, 10), (0, 20), (1, 10), (1, 20)):
        folder.metric(
            "update", round=index, version=0, step=step, loss=1.0 / (step + index), margin=0.5, grad_norm=2.0
        )
    folder.event({"event": "promoted", "version": 3})
    folder.release()
    events = read_back(tmp_path / "one-task")
    assert curve(events, "success/rollout/libero_object/0") == [(400, 0.3333)]
    assert curve(events, "success_low/rollout/libero_object/0") == [(400, 0.0615)]
    assert curve(events, "success_high/rollout/libero_object/0") == [(400, 0.7923)]
    assert curve(events, "episodes/rollout/timeout") == [(400, 2.0)]
    assert curve(events, "rollouts/env_steps_per_s") == [(400, 93.1)]
    assert curve(events, "serving/batch_fill/all") == [(400, 3.5)]
    assert [step for step, _ in curve(events, "update/loss")] == [10, 20, 30, 40]
    assert curve(events, "versions/in_force") == [(0, 0.0), (400, 3.0)]
    assert abs(events.Scalars("update/margin")[0].wall_time - time.time()) < 60


def test_steps_of_an_update_rise_over_the_rounds() -> None:
    samples = Samples(steps_per_round=150)
    found = [
        samples.metric({"stage": "update", "round": index, "step": step, "loss": 0.1})[0].step
        for index in (0, 1)
        for step in (20, 150)
    ]
    assert found == [20, 150, 170, 300]


def test_a_line_of_the_fleet_gives_what_it_has(tmp_path: Path) -> None:
    samples = Samples(steps_per_round=1)
    line = {
        "stage": "fleet",
        "env_steps_per_s": 93.1,
        "rollout_actors": {"wanted": 4, "ready": 3},
        "policy_actors": [{"actor": 0, "version": 3, "hash": "ab12", "batch_fill": 3.1, "act_ms": 41.0}],
        "nodes": [{"node": "3f", "alive": True, "draining": False}, {"node": "4a", "alive": False}],
        "pending": {"rollout actor": 1},
        "autoscaler": {"starting": {"rollout": 2, "gpu": 1}, "failed": [], "infeasible": 0},
    }
    assert values(samples.metric(line)) == {
        "rollouts/env_steps_per_s": 93.1,
        "cluster/rollout_actors/wanted": 4,
        "cluster/rollout_actors/ready": 3,
        "serving/decision_latency_ms/0": 41.0,
        "serving/batch_fill/0": 3.1,
        "serving/version/0": 3,
        "cluster/nodes/alive": 1,
        "cluster/nodes/draining": 0,
        "cluster/nodes/starting": 3,
        "cluster/pending/rollout actor": 1,
    }
    # What waits no more is 0, not what it last was.
    assert values(samples.metric({"stage": "fleet", "pending": {}})) == {"cluster/pending/rollout actor": 0}
    assert samples.metric({"stage": "fleet"}) == []


@pytest.mark.parametrize(
    ("event", "tag"),
    [
        ({"event": "rolled_back", "version": 2}, "versions/candidates/rolled_back"),
        ({"event": "tripped", "reason": "chosen"}, "versions/candidates/tripped"),
        ({"event": "actor_restarted", "actor": 0}, "faults/restarts/rollout"),
        ({"event": "actor_restarted", "kind": "policy"}, "faults/restarts/policy"),
        ({"event": "renderer_quarantined"}, "faults/quarantines/renderer"),
        ({"event": "renderer_fell_back"}, "faults/renderer_fallbacks"),
        ({"event": "node_lost"}, "cluster/node_events/lost"),
        ({"event": "requeued"}, "faults/requeued"),
    ],
)
def test_an_event_is_counted(event: dict[str, Any], tag: str) -> None:
    samples = Samples(steps_per_round=1)
    samples.event(event)
    (second,) = samples.event(event)
    assert (second.tag, second.value, second.increase) == (tag, 2, 1)


def test_a_cell_that_is_quarantined_twice_over_counts_once() -> None:
    samples = Samples(steps_per_round=1)
    event = {"event": "quarantined", "cell": "libero_object/0/3/0"}
    assert len(samples.event(event)) == 1
    assert samples.event(event) == []


def test_a_resumed_run_counts_on_and_no_episode_twice() -> None:
    samples = Samples(steps_per_round=1)
    before = [{"phase": "rollout", **episode(outcome, n)} for n, outcome in enumerate(("success", "timeout"))]
    samples.replay(before, [{"event": "actor_restarted"}])
    assert samples.episode(before[0]) == []
    found = values(samples.episode({"phase": "rollout", **episode("success", 2)}))
    assert found["success/rollout/libero_object/0"] == pytest.approx(2 / 3)
    assert found["episodes/rollout/success"] == 2
    assert values(samples.event({"event": "actor_restarted"})) == {"faults/restarts/rollout": 2}


def test_the_version_in_force_outlives_the_driver() -> None:
    samples = Samples(steps_per_round=1)
    samples.replay([], [{"event": "promoted", "version": 3}])
    assert values(samples.event({"event": "resumed"})) == {"faults/resumes": 1, "versions/in_force": 3}
    # The start is published again, for the base of what is in force.
    assert values(samples.metric({"stage": "published", "version": 0}))["versions/in_force"] == 3


def test_what_is_no_number_gives_no_sample() -> None:
    samples = Samples(steps_per_round=1)
    assert samples.metric({"stage": "update", "step": 1, "loss": None, "margin": "high", "kl": True}) == []
    assert samples.metric({"stage": "learned", "loss": 0.5}) == []
    assert samples.event({"event": "serving"}) == []


class FullDisk:
    """A sink whose disk is full from the second record on."""

    name = "FullDisk"

    def __init__(self) -> None:
        self.records = 0

    def record(self, samples: Sequence[Sample], *, at: float) -> None:
        self.records += 1
        if self.records > 1:
            with open("/dev/full", "w") as file:
                file.write(repr(samples))

    def close(self) -> None:
        raise AssertionError("a sink that was switched off is not closed")


class Kept(list[Sample]):
    name = "Kept"

    def record(self, samples: Sequence[Sample], *, at: float) -> None:
        self.extend(samples)

    def close(self) -> None:
        """Nothing is held back."""


def test_a_sink_that_fails_is_said_once_and_switched_off(caplog: pytest.LogCaptureFixture) -> None:
    full, kept = FullDisk(), Kept()
    trackers = Trackers([full, kept], Samples(steps_per_round=1))
    for _ in range(4):
        trackers.event({"event": "requeued"})
    trackers.close()
    assert full.records == 2
    assert [sample.value for sample in kept if sample.metric.key == "requeued"] == [1, 2, 3, 4]
    said = [record.message for record in caplog.records]
    assert said == ["metrics go to FullDisk no more: OSError: [Errno 28] No space left on device"]


def test_a_tracker_that_cannot_start_does_not_end_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "tensorboard").write_text("a file where the folder should be")
    trackers = start_trackers(recipe(tmp_path), tmp_path)
    trackers.event({"event": "requeued"})
    trackers.close()
    (said,) = (record.message for record in caplog.records)
    assert said.startswith("metrics do not go to TensorBoard: FileExistsError")


def test_a_line_that_cannot_be_read_does_not_end_the_run(caplog: pytest.LogCaptureFixture) -> None:
    trackers = Trackers([Kept()], Samples(steps_per_round=1))
    for _ in range(2):
        trackers.metric({"stage": "update", "loss": 1.0})
    (said,) = (record.message for record in caplog.records)
    assert said == "metrics go to no tracker any more: KeyError: 'step'"


def test_switched_off_trackers_leave_nothing(tmp_path: Path) -> None:
    folder = RunFolder.create(recipe(tmp_path, "tracking.tensorboard=false"))
    sweep(folder)
    folder.release()
    assert not (tmp_path / "one-task" / "tensorboard").exists()


@pytest.fixture
def exporting() -> Iterator[str]:
    """The address at which Ray exports this node's metrics to Prometheus; a cluster that runs already is used."""
    alone = not ray.is_initialized()
    connect()
    (node,) = (node for node in ray.nodes() if node["Alive"])
    yield f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    if alone:
        ray.shutdown()


def scrape(address: str, run: str, *, until: set[str], deadline_s: float = 40) -> dict[str, float]:
    """Our series of a run, as `name[label=value,...]` -> value, once each name of `until` is among them."""
    labels = {label for metric in METRICS.values() for label in metric.labels}
    ends = time.monotonic() + deadline_s
    while True:
        text = urllib.request.urlopen(address, timeout=10).read().decode()
        found = {}
        for name, told, value in re.findall(rf"^({EXPORT_PREFIX}{PREFIX}\w+)\{{(.*)\}} (\S+)$", text, re.M):
            pairs = dict(re.findall(r'(\w+)="([^"]*)"', told))
            if pairs["run"] == run:
                own = ",".join(f"{key}={pairs[key]}" for key in sorted(labels & pairs.keys()))
                found[f"{name}[{own}]"] = float(value)
        if until <= {key.partition("[")[0] for key in found} or time.monotonic() > ends:
            return found
        time.sleep(0.5)


@pytest.mark.ray
def test_ray_exports_the_series_to_prometheus(exporting: str, tmp_path: Path) -> None:
    folder = RunFolder.create(load_recipe(TINY, [f"root={tmp_path}", "name=exported"]))
    sweep(folder)
    folder.metric("update", round=0, step=1, margin=math.nan, loss=0.25)
    # One value of each series, so that every name is seen as Ray exports it.
    every = PrometheusSink("every")
    every.record(
        [
            Sample(metric=m, value=1.0, labels=dict.fromkeys(m.labels, "x"), step=0, increase=1.0)
            for m in METRICS.values()
        ],
        at=time.time(),
    )
    exported = {metric.exported for metric in METRICS.values()}
    assert {key.partition("[")[0] for key in scrape(exporting, "every", until=exported)} == exported
    found = scrape(exporting, "exported", until={"ray_pairloom_loss"})
    task = "phase=rollout,task=libero_object/0,version=0"
    assert found[f"ray_pairloom_success_rate[{task}]"] == pytest.approx(1 / 3)
    assert found[f"ray_pairloom_success_low[{task}]"] == pytest.approx(0.0615, abs=1e-4)
    assert found["ray_pairloom_episodes_total[outcome=timeout,phase=rollout]"] == 2
    assert found["ray_pairloom_env_steps_total[phase=rollout]"] == 400
    assert found["ray_pairloom_env_steps_per_s[]"] == 93.1
    assert found["ray_pairloom_decision_latency_ms[actor=all]"] == 41
    assert found["ray_pairloom_loss[]"] == 0.25
    assert "ray_pairloom_margin[]" not in found
    folder.release()


@pytest.mark.skipif(find_spec("wandb") is not None, reason="the wandb extra is installed")
def test_wandb_that_is_not_installed_is_refused_in_one_line() -> None:
    with pytest.raises(RecipeError) as refused:
        check_tracking(TrackingPart(wandb="pairs"))
    assert str(refused.value) == (
        "tracking.wandb=pairs, and wandb is not installed; pip install '.[wandb]', or unset tracking.wandb"
    )


def test_wandb_without_a_key_is_refused_in_one_line(tmp_path: Path) -> None:
    """In a process of its own: wandb reads its environment once."""
    pytest.importorskip("wandb", reason="the wandb extra is not installed")
    keyless = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    ended = subprocess.run(
        [sys.executable, "launch.py", "train", str(TINY), f"root={tmp_path}", "tracking.wandb=pairs"],
        cwd=Path(__file__).parents[1],
        env={**keyless, "NETRC": str(tmp_path / "netrc")},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1] == (
        "pairloom: tracking.wandb=pairs, and there is no API key; set WANDB_API_KEY, run `wandb login`, or set "
        "WANDB_MODE=offline"
    )
    assert list(tmp_path.iterdir()) == []


def test_wandb_keeps_an_offline_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wandb = pytest.importorskip("wandb", reason="the wandb extra is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_tracking(TrackingPart(wandb="pairs"))
    folder = RunFolder.create(recipe(tmp_path, "tracking.wandb=pairs", "tracking.tensorboard=false"))
    sweep(folder)
    folder.metric("update", round=1, step=3, loss=0.25)
    summary = dict(wandb.run.summary)
    folder.release()
    assert summary["success/rollout/libero_object/0"] == pytest.approx(1 / 3)
    assert (summary["update/loss"], summary["optimizer_step"]) == (0.25, 23)
    (file,) = (tmp_path / "one-task" / "wandb").glob("offline-run-*/*.wandb")
    assert os.path.getsize(file) > 0
