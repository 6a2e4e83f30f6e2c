"""A CUDA device computes what the CPU computes: acting, scoring, the supervised start and an update, in float32.

python -m pytest --noconftest tests/test_cuda.py      # needs no Ray
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from configs.preference import AdapterPart, GuardPart, PreferencePart
from configs.supervised import CapabilityPart, SupervisedPart
from learners.orthogonality import FullPenalty
from learners.preference import PreferenceLearner
from learners.supervised import SupervisedLearner
from policies.protocol import Policy
from policies.weights.snapshots import state_tensors
from tests.paradigms import PARADIGMS, new, observations
from tests.test_paradigm_learning import episode, pairs_of
from trajectories.records import Trajectory

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: compared with no CPU"),
    pytest.mark.parametrize("name", PARADIGMS),
]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def exact_products() -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def on_both(name: str) -> tuple[Policy, Policy]:
    here, there = new(name), new(name, device=CUDA)
    for one, other in zip(here.module.parameters(), there.module.parameters(), strict=True):
        torch.testing.assert_close(one, other.cpu())
    return here, there


def vector_of(policy: Policy) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        name: rng.normal(0, 0.05, array.shape).astype(np.float32)
        for name, array in state_tensors(policy.module).items()
    }


def with_depth(demo: Trajectory) -> Trajectory:
    decisions = tuple(
        replace(
            d, observation=replace(d.observation, depth=d.observation.agentview[..., 0] / np.float32(255))
        )
        for d in demo.decisions
    )
    return replace(demo, decisions=decisions)


def test_the_same_actions_and_scores(name: str) -> None:
    here, there = on_both(name)
    seen = observations(4)
    acted, compared = (policy.act(seen, seeds=[1, 2, 3, 4], temperature=1.0) for policy in (here, there))
    chunks = [sample.model_chunk for sample in acted]
    for one, other in zip(acted, compared, strict=True):
        # The noise is drawn on the CPU; a token that is a tie within rounding may fall otherwise, and none does here.
        np.testing.assert_allclose(one.model_chunk, other.model_chunk, atol=1e-3)
        np.testing.assert_allclose(one.actions, other.actions, atol=1e-3)
        np.testing.assert_allclose(one.logps, other.logps, atol=1e-3)
    keys = torch.arange(4)
    with torch.no_grad():
        scores = [policy.score(policy.batch(seen, chunks), noise_keys=keys).cpu() for policy in (here, there)]
    torch.testing.assert_close(*scores, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("auxiliary", ["spatial", "future"])
def test_the_same_supervised_start(name: str, auxiliary: str) -> None:
    histories: list[list[dict[str, float]]] = []
    here, there = on_both(name)
    demo = with_depth(episode(here, seed=1, outcome="success"))
    for policy, penalty in (
        (here, "elementwise"),
        (there, "elementwise"),
        (here, "cosine"),
        (there, "cosine"),
    ):
        capability = CapabilityPart(vector="drawn", penalty=penalty)
        part = SupervisedPart(steps=3, batch_size=4, warmup_steps=1, auxiliary=auxiliary)
        learner = SupervisedLearner(
            policy,
            part,
            seed=0,
            demos=[demo],
            penalty=FullPenalty(policy.module, capability, vector_of(policy)),
        )
        history: list[dict[str, float]] = []
        learner.fit(on_step=lambda _, metrics, history=history: history.append(metrics))
        histories.append(history)
    for one, other in (histories[:2], histories[2:]):
        for before, after in zip(one, other, strict=True):
            assert after == pytest.approx(before, rel=3e-2, abs=1e-3)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_the_same_update(name: str, method: str) -> None:
    reports = []
    here, there = on_both(name)
    pairs = pairs_of(here)
    for policy in (here, there):
        vector = vector_of(policy)
        learner = PreferenceLearner(
            policy,
            adapter=AdapterPart(method=method, rank=4, alpha=8),
            preference=PreferencePart(reference="start", credit="uniform", demo_weight=0, steps=4, lr=1e-3),
            guard=GuardPart(chosen_drop=5),
            base_hash="start",
            seed=0,
            capability=CapabilityPart(vector="drawn", penalty="cosine"),
            vector=vector,
        )
        report = learner.update(pairs, [pair.chosen for pair in pairs], [])
        assert not report.stopped
        reports.append(report)
        learner.load_state(learner.state())
    for before, after in zip(reports[0].history, reports[1].history, strict=True):
        assert after == pytest.approx(before, rel=2e-2, abs=1e-3)
