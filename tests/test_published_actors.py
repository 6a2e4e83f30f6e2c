"""Published weights through the actors: start, merge, serving, in bfloat16."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import ray

from actors.learner import LearnerActor
from actors.monitor import MonitorActor
from actors.parameter_server import ParameterServer
from actors.placement import connect
from actors.policy import PolicyActor
from configs.preference import AdapterPart, GuardPart, PreferencePart
from configs.schema import ServingPart
from configs.supervised import CapabilityPart, SupervisedPart
from learners.checkpoint import CheckpointReader
from policies.make import make_policy
from policies.weights.snapshots import state_tensors
from tests.published_tiny import CPU, episode, observations, parts
from trajectories.bfloat16 import BFLOAT16
from trajectories.hashing import weights_hash
from trajectories.records import PreferencePair

PREFERENCE = PreferencePart(
    reference="start", demo_weight=0, success_weight=0, steps=2, lr=0.01, micro_batch=4
)


@pytest.fixture
def cluster() -> None:
    connect()


@pytest.mark.ray
def test_published_weights_are_taken_up_adapted_and_served(cluster: None, tmp_path: Path) -> None:
    part = parts(tmp_path / "published")["pi05"].model_copy(update={"dtype": "bfloat16"})
    policy = make_policy(part, image_size=64, seed=0, device=CPU)
    monitor = MonitorActor.options(name="monitor-of-published", num_cpus=0).remote()
    learner = LearnerActor.options(num_cpus=0).remote(
        policy=part,
        supervised=SupervisedPart(steps=0),
        capability=CapabilityPart(),
        adapter=AdapterPart(method="dora", rank=4, alpha=8),
        preference=PREFERENCE,
        guard=GuardPart(chosen_drop=100),
        image_size=64,
        seed=0,
        threads=1,
        monitor="monitor-of-published",
    )
    assert ray.get(learner.supervise.remote([], folder=str(tmp_path))) == {}
    reader = CheckpointReader(tmp_path / "start")
    assert reader.tensor(next(iter(reader.sizes()))).dtype == BFLOAT16
    server = ParameterServer(start_checkpoint=str(tmp_path / "start"), saved=str(tmp_path), num_shards=1)
    version, content_hash = server.publish(None)
    assert content_hash == weights_hash(state_tensors(policy.module))
    ray.get(learner.attach.remote(content_hash))
    pair = PreferencePair(
        chosen=episode(policy, seed=0, outcome="success"), rejected=episode(policy, seed=1, outcome="timeout")
    )
    report, adapter = ray.get(learner.update.remote([pair], []))
    assert (report.stopped, report.steps) == ("", 2)
    changed, changed_hash = server.publish(adapter, keep=[version])
    assert changed_hash != content_hash
    assert 1e-5 < server.drift(changed) < 0.01
    actor = PolicyActor.options(num_cpus=0).remote(
        policy=part, serving=ServingPart(), image_size=64, shards=server.names
    )
    (seen,) = observations(1)
    for served, expected in ((version, content_hash), (changed, changed_hash)):
        sample, said = ray.get(actor.act.remote(seen, seed=1, version=served, temperature=1.0))
        assert said == expected
        if served == version:
            (alone,) = policy.act([seen], seeds=[1], temperature=1.0)
            np.testing.assert_array_equal(sample.model_chunk, alone.model_chunk)
    for one in (monitor, learner, actor, *server.shards):
        ray.kill(one)
