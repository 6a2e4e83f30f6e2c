"""The supervised learner on a small policy of the real classes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from configs.supervised import SupervisedPart
from learners.supervised import SupervisedLearner, schedule
from tests.learning import demonstration, new_policy


def test_supervised_training_reproduces_the_demonstrations() -> None:
    policy = new_policy()
    demo = demonstration(seed=4)
    part = SupervisedPart(steps=150, batch_size=6, lr=5e-3, warmup_steps=10, image_shift=0)
    learner = SupervisedLearner(policy, part, seed=0, demos=[demo])
    losses: list[float] = []
    last = learner.fit(on_step=lambda step, metrics: losses.append(metrics["loss"]))
    assert losses[0] > 1
    assert last["loss"] < 0.1
    samples = policy.act([d.observation for d in demo.decisions], seeds=[0] * 6, temperature=0)
    # Five bins over [-1, 1]: the nearest centre is at most a quarter of the way to the next ones off.
    for sample, decision in zip(samples, demo.decisions, strict=True):
        assert np.array_equal(sample.model_chunk, policy.encode(decision.sample.actions))
    with pytest.raises(RuntimeError, match="all 150 steps"):
        learner.step()


def test_supervised_training_repeats_to_the_bit() -> None:
    def train(seed: int) -> dict[str, torch.Tensor]:
        policy = new_policy()
        part = SupervisedPart(steps=5, batch_size=4, warmup_steps=2)
        SupervisedLearner(policy, part, seed=seed, demos=[demonstration(1), demonstration(2)]).fit()
        return policy.module.state_dict()

    first, second, other = train(0), train(0), train(1)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_supervised_training_without_demonstrations_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one demonstration"):
        SupervisedLearner(new_policy(), SupervisedPart(), seed=0, demos=[])


def test_learning_rate_warms_up_and_falls_to_zero() -> None:
    shares = [schedule(step, warmup=4, total=12) for step in (0, 3, 4, 8, 11)]
    assert shares == pytest.approx([0.25, 1.0, 1.0, 0.5, 0.0380602], abs=1e-6)
