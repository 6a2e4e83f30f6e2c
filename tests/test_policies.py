"""What every paradigm's policy must do, and what a surrogate score must be."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from configs.schema import AdapterPart
from objectives import dpo
from policies.protocol import Policy
from policies.weights import adapters
from policies.weights.snapshots import state_tensors
from tests.paradigms import PARADIGMS, SURROGATES, new, observations
from trajectories.records import Observation, WeightSnapshot


def decided(policy: Policy, count: int, seed: int = 0) -> tuple[list[Observation], list[np.ndarray]]:
    seen = observations(count, seed)
    samples = policy.act(seen, seeds=range(count), temperature=1.0)
    return seen, [sample.model_chunk for sample in samples]


@pytest.mark.parametrize("name", PARADIGMS)
def test_a_chunk_is_in_range_and_follows_from_its_seed_alone(name: str) -> None:
    policy, seen = new(name), observations(3)
    together = policy.act(seen, seeds=[5, 6, 7], temperature=1.0)
    for sample, one, seed in zip(together, seen, (5, 6, 7), strict=True):
        assert sample.actions.shape == (2, 7)
        assert sample.actions.dtype == np.float32
        assert np.abs(sample.actions).max() <= 1
        (alone,) = policy.act([one], seeds=[seed], temperature=1.0)
        np.testing.assert_allclose(alone.actions, sample.actions, atol=1e-5)
    (other,) = policy.act(seen[:1], seeds=[99], temperature=1.0)
    assert (other.actions != together[0].actions).any()
    greedy = [policy.act(seen[:1], seeds=[seed], temperature=0)[0].actions for seed in (1, 2)]
    np.testing.assert_array_equal(*greedy)


@pytest.mark.parametrize("name", PARADIGMS)
def test_encoding_what_was_executed_gives_the_chunk_that_was_sampled(name: str) -> None:
    policy = new(name)
    for sample in policy.act(observations(3), seeds=[1, 2, 3], temperature=1.0):
        np.testing.assert_array_equal(policy.encode(sample.actions), sample.model_chunk)


@pytest.mark.parametrize("name", PARADIGMS)
def test_eight_scored_together_are_eight_scored_apart(name: str) -> None:
    policy = new(name)
    seen, chunks = decided(policy, 8)
    keys = torch.arange(8)
    together = policy.score(policy.batch(seen, chunks), noise_keys=keys)
    apart = [
        policy.score(policy.batch([one], [chunk]), noise_keys=keys[i : i + 1])
        for i, (one, chunk) in enumerate(zip(seen, chunks, strict=True))
    ]
    assert together.shape == (8, 14)
    torch.testing.assert_close(together, torch.cat(apart), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", PARADIGMS)
def test_a_kept_context_gives_the_same_score(name: str) -> None:
    policy = new(name)
    batch, keys = policy.batch(*decided(policy, 3)), torch.arange(3)
    context = policy.encode_context(batch)
    assert context.ndim == 3
    torch.testing.assert_close(
        policy.score(batch, context, noise_keys=keys), policy.score(batch, noise_keys=keys)
    )


@pytest.mark.parametrize("name", PARADIGMS)
def test_the_instruction_the_images_and_the_state_are_looked_at(name: str) -> None:
    policy = new(name)
    (seen,), chunks = decided(policy, 1)
    keys = torch.zeros(1, dtype=torch.int64)

    def score(**changes: object) -> torch.Tensor:
        parts = {k: getattr(seen, k) for k in ("agentview", "wrist", "proprio", "instruction")}
        return policy.score(policy.batch([Observation(**parts | changes)], chunks), noise_keys=keys)

    for change in (
        {"agentview": 255 - seen.agentview},
        {"wrist": 255 - seen.wrist},
        {"proprio": -seen.proprio},
        {"instruction": "open the drawer"},
    ):
        assert (score(**change) - score()).abs().max() > 1e-6


@pytest.mark.parametrize("name", PARADIGMS)
def test_weights_travel(name: str) -> None:
    one, other = new(name, seed=0), new(name, seed=1)
    batch, keys = one.batch(*decided(one, 2)), torch.arange(2)
    assert (one.score(batch, noise_keys=keys) - other.score(batch, noise_keys=keys)).abs().max() > 1e-6
    other.load(WeightSnapshot(version=1, content_hash="", tensors=state_tensors(one.module)))
    assert torch.equal(one.score(batch, noise_keys=keys), other.score(batch, noise_keys=keys))


@pytest.mark.parametrize("name", PARADIGMS)
def test_supervised_training_raises_the_score(name: str) -> None:
    policy = new(name)
    rng = np.random.default_rng(3)
    chunks = [policy.encode(rng.choice([-1.0, 1.0], (2, 7)).astype(np.float32)) for _ in range(4)]
    batch, keys = policy.batch(observations(4), chunks), torch.arange(4)
    before = policy.score(batch, noise_keys=keys).sum(dim=1).detach()
    optimizer = torch.optim.AdamW(policy.module.parameters(), lr=3e-3)
    for step in range(60):
        optimizer.zero_grad()
        policy.sft_loss(batch, noise_keys=4 * step + keys).backward()
        optimizer.step()
    assert (policy.score(batch, noise_keys=keys).sum(dim=1) > before).all()


@pytest.mark.parametrize("name", PARADIGMS)
def test_before_the_first_step_dpo_is_log_two_and_pulls_on_the_policy_only(name: str) -> None:
    policy = new(name)
    seen, chunks = decided(policy, 4)
    batch, keys = policy.batch(seen, chunks), torch.arange(4) // 2
    reference = policy.score(batch, noise_keys=keys).detach()
    adapters.attach(
        policy.module, AdapterPart(method="dora", rank=2, alpha=4), seed=0, decoders=policy.adapted
    )
    with adapters.disabled(policy.module):
        torch.testing.assert_close(policy.score(batch, noise_keys=keys), reference, rtol=0, atol=1e-6)
    ratios = (policy.score(batch, noise_keys=keys) - reference).sum(dim=1)
    loss = dpo.sigmoid_loss(ratios[0::2], ratios[1::2], beta=0.1).losses.mean()
    assert loss.item() == pytest.approx(math.log(2), abs=1e-6)
    loss.backward()
    adapter = adapters.parameters(policy.module)
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in adapter.values())
    frozen = {id(p) for p in policy.module.parameters()} - {id(p) for p in adapter.values()}
    assert all(p.grad is None for p in policy.module.parameters() if id(p) in frozen)


@pytest.mark.parametrize("name", SURROGATES)
def test_a_surrogate_follows_from_its_key(name: str) -> None:
    policy = new(name)
    batch = policy.batch(*decided(policy, 2))
    assert not policy.exact
    first, again, other = (policy.score(batch, noise_keys=torch.tensor(k)) for k in ([3, 4], [3, 4], [4, 3]))
    assert torch.equal(first, again)
    assert (first != other).any()
    with pytest.raises(ValueError, match="noise_keys"):
        policy.score(batch)


@pytest.mark.parametrize("name", SURROGATES)
@torch.no_grad()
def test_a_surrogate_has_the_mean_that_many_draws_have(name: str) -> None:
    """The mean over one set of keys and over another agree within their standard errors."""
    policy = new(name)
    (seen,), (chunk,) = decided(policy, 1)
    batch = policy.batch([seen] * 256, [chunk] * 256)
    halves = [policy.score(batch, noise_keys=torch.arange(256) + start).sum(dim=1) for start in (0, 256)]
    error = math.hypot(*(half.std().item() / 16 for half in halves))
    assert error > 0
    assert abs(halves[0].mean() - halves[1].mean()) < 4 * error


def test_a_flow_score_is_in_nats_once_it_is_calibrated() -> None:
    policy = new("pi0.5")
    batch = policy.batch(*decided(policy, 8))
    said = policy.calibrate([batch])
    assert said["velocity_error"] > 0
    score = policy.score(batch, noise_keys=torch.arange(8))
    assert score.mean().item() == pytest.approx(-0.5, abs=1e-5)
    assert new("autoregressive").calibrate([]) == {}
