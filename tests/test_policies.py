"""What every paradigm's policy must do, and what a surrogate score must be."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from configs.policy import DiffusionPart
from configs.preference import AdapterPart
from objectives import dpo, flow_matching
from policies.diffusion import DiffusionPolicy
from policies.encoding.prompts import PromptTokenizer
from policies.flow import FlowPolicy
from policies.make import make_policy
from policies.pi0.inputs import PlainInputs
from policies.protocol import Policy
from policies.weights import adapters
from policies.weights.snapshots import state_tensors
from tests.paradigms import PARADIGMS, SIZE, SURROGATES, new, observations
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


def unmasking(choice_temperature: float | None) -> Policy:
    """A random policy whose weights are large enough for a token to depend on those already unmasked."""
    diffusion = DiffusionPart(iterations=4, choice_temperature=choice_temperature)
    part = PARADIGMS["diffusion"].model_copy(update={"diffusion": diffusion})
    policy = make_policy(part, image_size=SIZE, seed=0, device=torch.device("cpu"))
    assert isinstance(policy, DiffusionPolicy)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.network.language_model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.3, generator=generator)
    return policy


def test_an_order_at_random_is_greedy_at_temperature_zero_and_matters_above() -> None:
    seen, policies = observations(1) * 8, (unmasking(None), unmasking(10.0))

    def chunks(temperature: float) -> list[list[list[int]]]:
        return [
            [
                sample.model_chunk.tolist()
                for sample in policy.act(seen, seeds=range(8), temperature=temperature)
            ]
            for policy in policies
        ]

    by_confidence, at_random = chunks(0)
    assert at_random == by_confidence == [by_confidence[0]] * 8
    # The noise on tokens is the same in both: what differs was unmasked in another order.
    by_confidence, at_random = chunks(1.0)
    assert sum(a != b for a, b in zip(by_confidence, at_random, strict=True)) >= 4


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


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", PARADIGMS)
@torch.no_grad()
def test_padding_on_either_side_does_not_change_a_score(name: str, side: str) -> None:
    policy = new(name)
    batch, keys = policy.batch(*decided(policy, 3)), torch.arange(3)
    longest = batch.prompt_BT.shape[1] + 3
    prompt, mask = torch.full((3, longest), 7), torch.zeros(3, longest, dtype=torch.bool)
    for row, (ids, real) in enumerate(zip(batch.prompt_BT, batch.prompt_mask_BT, strict=True)):
        count = int(real.sum())
        where = slice(longest - count, longest) if side == "left" else slice(count)
        prompt[row, where], mask[row, where] = ids[real], True
    padded = replace(batch, prompt_BT=prompt, prompt_mask_BT=mask)
    torch.testing.assert_close(
        policy.score(padded, noise_keys=keys), policy.score(batch, noise_keys=keys), rtol=0, atol=1e-5
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


@torch.enable_grad()
def learned(name: str, steps: int) -> tuple[Policy, Observation, np.ndarray]:
    """A policy that has begun to learn one of two opposite chunks: its surrogate depends on times or masks, for what is
    visible tells which of the two it is."""
    policy = new(name)
    (seen,) = observations(1)
    actions = np.where(np.arange(14) % 3, -0.9, 0.9).astype(np.float32).reshape(2, 7)
    chunk = policy.encode(actions)
    batch = policy.batch([seen] * 16, [chunk, policy.encode(-actions)] * 8)
    optimizer = torch.optim.AdamW(policy.module.parameters(), lr=5e-3)
    for step in range(steps):
        optimizer.zero_grad()
        policy.sft_loss(batch, noise_keys=16 * step + torch.arange(16)).backward()
        optimizer.step()
    return policy, seen, chunk


@pytest.mark.parametrize("name", ["pi0", "pi0.5"])
@torch.no_grad()
def test_a_flow_score_has_the_mean_over_all_times(name: str) -> None:
    policy, seen, chunk = learned(name, 30)
    assert isinstance(policy, FlowPolicy)
    one = policy.batch([seen], [chunk])
    # Plainly: every time of a fine grid over [0, 1] with noise of its own, through the network alone.
    count = 4096
    noise = torch.randn(count, 2, 8, generator=torch.Generator().manual_seed(0))
    times = (torch.arange(count) + 0.5) / count
    clean = F.pad(torch.from_numpy(chunk).view(2, 7), (0, 1))
    noisy = times[:, None, None] * noise + (1 - times[:, None, None]) * clean
    inputs = PlainInputs(PromptTokenizer(), image_size=SIZE, adaptive=name == "pi0.5", state_in_prompt=True)
    images = torch.stack([one.agentview_BHWC, one.wrist_BHWC], dim=1).permute(0, 1, 4, 2, 3).float()
    prefix = policy.network.embed_prefix(
        images / 127.5 - 1, torch.ones(1, 2, dtype=torch.bool), *inputs.prompt(one)
    )
    cache = policy.network.encode_prefix(prefix).repeat(count)
    velocity = policy.network.velocity(cache, noisy, times, inputs.state(one))
    plain = -(velocity - (noise - clean))[..., :7].square().sum(dim=(1, 2)) / 2
    scores = policy.score(policy.batch([seen] * 512, [chunk] * 512), noise_keys=torch.arange(512)).sum(dim=1)
    error = math.hypot(plain.std().item() / count**0.5, scores.std().item() / 512**0.5)
    assert error < 0.02 * abs(plain.mean())
    assert abs(scores.mean() - plain.mean()) < 4 * error


@torch.no_grad()
def test_a_diffusion_score_has_the_mean_over_all_masks() -> None:
    policy, seen, chunk = learned("diffusion", 100)
    assert isinstance(policy, DiffusionPolicy)
    one = policy.batch([seen], [chunk])
    # Plainly: all 2^14 - 1 masks, one pass over the whole sequence each; a size has weight 1 / 14, its masks alike.
    masks = torch.cartesian_prod(*[torch.tensor([False, True])] * 14)[1:]
    network = policy.network
    prefix = network.embed(one.prompt_BT, policy.encode_context(one), one.proprio_BP)
    size, model = prefix.shape[1], network.language_model.model
    sees = torch.ones(1, 1, size + 14, size + 14, dtype=torch.bool)
    sees[..., :size, size:] = False  # observations do not see actions
    ids = one.chunk_BL[0]
    found = []
    for some in masks.split(2048):
        hidden_ids = torch.where(some, network.action_stop_id, ids)
        tokens = torch.cat([prefix.expand(len(some), -1, -1), model.embed_tokens(hidden_ids)], dim=1)
        hidden = model(
            inputs_embeds=tokens, attention_mask=sees.expand(len(some), -1, -1, -1), use_cache=False
        ).last_hidden_state[:, size:]
        logits = network.language_model.lm_head(hidden)[..., network.action_first_id : network.action_stop_id]
        logps = logits.log_softmax(-1)[:, torch.arange(14), ids - network.action_first_id]
        found.append((logps * some).sum(dim=1))
    sums, sizes = torch.cat(found).double(), masks.sum(dim=1)
    plain = sum((14 / m * sums[sizes == m].mean() / 14).item() for m in range(1, 15))
    scores = policy.score(policy.batch([seen] * 1024, [chunk] * 1024), noise_keys=torch.arange(1024)).sum(
        dim=1
    )
    error = scores.std().item() / 32
    assert error < 0.02 * abs(plain)
    assert abs(scores.mean().item() - plain) < 4 * error


def test_differences_of_flow_scores_are_flow_dpo_s_log_ratios() -> None:
    """At a variance of 1 and summed over elements: (ell_ref - ell_theta) / 2 of the very draws, times the elements."""
    policy, reference = new("pi0"), new("pi0")
    assert isinstance(policy, FlowPolicy)
    assert isinstance(reference, FlowPolicy)
    with torch.no_grad():
        for parameter in policy.module.parameters():
            parameter += 0.05 * torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())
            )
    batch, keys = policy.batch(*decided(policy, 3)), torch.arange(3)
    scores = policy.score(batch, noise_keys=keys) - reference.score(batch, noise_keys=keys)
    losses = []
    for one in (policy, reference):
        drawn = flow_matching.draw(
            keys.tolist(), draws=one._part.score_draws, shape=(one._horizon, one.network.config.action_dim)
        )
        clean = F.pad(batch.chunk_BL.unflatten(1, (-1, 7)), (0, one.network.config.action_dim - 7))
        noisy = flow_matching.noisy_chunk(clean[:, None], drawn.noise_BSKA, drawn.times_BS)
        draws = drawn.times_BS.shape[1]
        velocity = one.network.velocity(
            one._prefix(batch, one.encode_context(batch)).repeat(draws),
            noisy.flatten(0, 1),
            drawn.times_BS.flatten(),
            one._inputs.state(batch),
        ).unflatten(0, (3, draws))
        valid = torch.zeros(clean.shape, dtype=torch.bool)
        valid[:, : one._chunk, :7] = True
        losses.append(flow_matching.flow_losses(velocity, drawn.noise_BSKA, clean, valid).mean(dim=1))
    expected = flow_matching.log_ratios(losses[0], losses[1]) * scores.shape[1]
    assert expected.abs().min() > 1e-3
    torch.testing.assert_close(scores.sum(dim=1), expected, rtol=1e-4, atol=1e-5)


def test_a_flow_score_is_in_nats_once_it_is_calibrated() -> None:
    policy = new("pi0.5")
    batch = policy.batch(*decided(policy, 8))
    said = policy.calibrate([batch])
    assert said["velocity_error"] > 0
    score = policy.score(batch, noise_keys=torch.arange(8))
    assert score.mean().item() == pytest.approx(-0.5, abs=1e-5)
    assert new("autoregressive").calibrate([]) == {}
