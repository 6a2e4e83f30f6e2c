"""The flow-matching surrogate and the stochastic flow step, against closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from objectives import dpo, flow_matching, flow_sde
from policies.flow import executable

SHAPE = (2, 3)
CLEAN = torch.tensor([[0.5, -1.0, 0.0], [2.0, 0.3, -0.7]])


def losses(
    velocity: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    clean_BKA: torch.Tensor,
    draws: flow_matching.FlowDraws,
) -> torch.Tensor:
    noisy = flow_matching.noisy_chunk(clean_BKA[:, None], draws.noise_BSKA, draws.times_BS)
    valid = torch.ones_like(clean_BKA, dtype=torch.bool)
    return flow_matching.flow_losses(velocity(noisy, draws.times_BS), draws.noise_BSKA, clean_BKA, valid)


# Draws


def test_a_key_fixes_its_draws_whatever_the_batch_and_the_number_of_draws() -> None:
    few = flow_matching.draw([7], draws=2, shape=SHAPE)
    many = flow_matching.draw([3, 7, 2**64 - 1], draws=6, shape=SHAPE)
    assert torch.equal(many.noise_BSKA[1, :2], few.noise_BSKA[0])
    again = flow_matching.draw([7, 3], draws=6, shape=SHAPE)
    assert torch.equal(again.times_BS[0], many.times_BS[1])
    assert torch.equal(again.noise_BSKA[1], many.noise_BSKA[0])
    assert not torch.equal(many.noise_BSKA[0, 0], many.noise_BSKA[0, 1])
    assert not torch.equal(many.noise_BSKA[0, 0], many.noise_BSKA[1, 0])


def test_midpoints_are_the_published_times() -> None:
    times = flow_matching.stratified_times(torch.full((1, 4), 0.5))
    expected = [0.001 + 0.999 * level for level in (0.125, 0.375, 0.625, 0.875)]
    assert times[0].tolist() == pytest.approx(expected, abs=1e-6)
    beta = flow_matching.stratified_times(torch.full((1, 1), 0.5), density="beta")
    assert beta.item() == pytest.approx(0.001 + 0.999 * 0.6299605, abs=1e-6)  # the median of Beta(1.5, 1)


def test_every_stratum_holds_one_time() -> None:
    times = flow_matching.draw(range(50), draws=5, shape=(1, 1)).times_BS
    assert torch.equal(((times - 0.001) / 0.999 * 5).floor(), torch.arange(5.0).expand(50, 5))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"draws": 0}, "at least one draw, got 0"),
        ({"draws": 2, "keys": [-1]}, "got -1"),
    ],
)
def test_draws_that_cannot_be_are_refused(settings: dict, said: str) -> None:
    keys = settings.pop("keys", [0])
    with pytest.raises(ValueError, match=said):
        flow_matching.draw(keys, shape=SHAPE, **settings)


# The score


@pytest.mark.parametrize(("density", "first", "second"), [("uniform", 0.5, 1 / 3), ("beta", 0.4, 0.2285714)])
def test_the_score_is_unbiased(density: str, first: float, second: float) -> None:
    # With v(x, t) = x the error is (1 - t) eps - (2 - t) a. Of w = (1 - t) / 0.999, `first` and `second` are the
    # mean and the mean square under the density.
    keys = range(4000)
    draws = flow_matching.draw(keys, draws=4, shape=SHAPE, density=density)  # type: ignore[arg-type]
    scores = losses(lambda noisy, _: noisy, CLEAN.expand(len(keys), 2, 3), draws).mean(dim=1)
    square = 0.999**2 * second
    expected = square + (1 + 2 * 0.999 * first + square) * CLEAN.square().mean().item()
    error = scores.std().item() / math.sqrt(len(keys))
    assert abs(scores.mean().item() - expected) < 4 * error
    assert error < 0.02 * expected


def test_padding_neither_counts_nor_learns() -> None:
    draws = flow_matching.draw([1, 2], draws=3, shape=SHAPE)
    clean = CLEAN.expand(2, 2, 3)
    velocity = torch.zeros(2, 3, 2, 3, requires_grad=True)
    valid = torch.tensor([[True, True, False], [False, False, False]]).expand(2, 2, 3)
    scores = flow_matching.flow_losses(velocity, draws.noise_BSKA, clean, valid)
    target = draws.noise_BSKA[:, :, 0, :2] - clean[:, None, 0, :2]
    torch.testing.assert_close(scores, target.square().mean(dim=-1))
    scores.sum().backward()
    assert velocity.grad is not None
    assert torch.equal(velocity.grad != 0, valid[:, None].expand(2, 3, 2, 3))


def test_a_chunk_without_valid_elements_is_refused() -> None:
    draws = flow_matching.draw([1, 2], draws=1, shape=SHAPE)
    valid = torch.ones(2, 2, 3, dtype=torch.bool)
    valid[1] = False
    with pytest.raises(ValueError, match="chunk 1 has no valid element"):
        flow_matching.flow_losses(torch.zeros(2, 1, 2, 3), draws.noise_BSKA, CLEAN.expand(2, 2, 3), valid)


def test_before_the_first_update_the_loss_is_log_two_and_the_reference_learns_nothing() -> None:
    torch.manual_seed(0)
    policy, reference = nn.Linear(3, 3), nn.Linear(3, 3)
    reference.load_state_dict(policy.state_dict())
    draws = flow_matching.draw([11, 11], draws=4, shape=SHAPE)  # one key for chosen and rejected
    clean = torch.stack([CLEAN, -CLEAN])
    policy_losses = losses(lambda noisy, _: policy(noisy), clean, draws).mean(dim=1)
    with torch.no_grad():
        reference_losses = losses(lambda noisy, _: reference(noisy), clean, draws).mean(dim=1)
    chosen, rejected = flow_matching.log_ratios(policy_losses, reference_losses)[:, None]
    loss = dpo.sigmoid_loss(chosen, rejected, beta=500.0)
    assert torch.equal(loss.losses, torch.tensor([2.0]).log())
    assert loss.chosen_rewards.item() == 0
    loss.losses.sum().backward()
    assert all(parameter.grad is None for parameter in reference.parameters())
    # At z = 0 the loss falls at rate 1/2 in z = (beta / 2) (ell_rejected - ell_chosen) + constant.
    again = losses(lambda noisy, _: policy(noisy), clean, draws).mean(dim=1)
    (want,) = torch.autograd.grad(500.0 / 4 * (again[0] - again[1]), policy.weight)
    torch.testing.assert_close(policy.weight.grad, want)


def test_flow_dpo_is_the_published_form() -> None:
    policy, reference = torch.tensor([0.5, 0.9]), torch.tensor([0.6, 0.8])
    chosen, rejected = flow_matching.log_ratios(policy, reference)[:, None]
    # -(20 / 2) ((0.5 - 0.6) - (0.9 - 0.8)) = 2
    assert dpo.sigmoid_loss(chosen, rejected, beta=20.0).losses.item() == pytest.approx(
        math.log(1 + math.exp(-2)), abs=1e-5
    )


# The stochastic step


def test_sigmas_fall_from_one_to_zero() -> None:
    plain = flow_sde.scheduler_sigmas(4)
    assert plain.tolist() == pytest.approx([1, 0.667, 0.334, 0.001, 0], abs=1e-6)
    shifted = flow_sde.scheduler_sigmas(3, shift=3.0)
    lowest = 3 * 0.001 / 1.002
    levels = [1, (1 + lowest) / 2, lowest]
    assert shifted.tolist() == pytest.approx([3 * s / (1 + 2 * s) for s in levels] + [0], abs=1e-6)
    with pytest.raises(ValueError, match="at least one step, got 0"):
        flow_sde.scheduler_sigmas(0)


def test_the_first_step_of_two_in_closed_form() -> None:
    # From 1 to 0.001: sigma_t^2 = 1 / 0.999 and dt = -0.999, so the mean of v = 0 is x / 2 and the std is 1.
    sample = torch.tensor([[2.0, -4.0]])
    step = flow_sde.sde_step(
        sample, torch.zeros(1, 2), flow_sde.scheduler_sigmas(2), torch.tensor([0]), noise_level=1.0
    )
    assert step.mean[0].tolist() == pytest.approx([1.0, -2.0], abs=1e-6)
    assert step.std.item() == pytest.approx(1.0, abs=1e-6)
    assert step.sample(torch.tensor([[1.0, 1.0]]))[0].tolist() == pytest.approx([2.0, -1.0], abs=1e-6)
    logps = step.log_prob(torch.tensor([[1.0, 0.0]]))
    assert logps[0].tolist() == pytest.approx([-0.9189385, -2.9189385], abs=1e-6)


def test_the_mean_is_the_one_written_with_data_and_noise() -> None:
    torch.manual_seed(0)
    sample, velocity = torch.randn(3, 4, 2), torch.randn(3, 4, 2)
    sigmas = torch.linspace(1, 0, 6)
    step = flow_sde.sde_step(sample, velocity, sigmas, torch.tensor([1, 2, 4]), noise_level=0.5)
    t, d = torch.tensor([0.8, 0.6, 0.2])[:, None, None], 0.2
    data, noise = sample - velocity * t, sample + velocity * (1 - t)
    variance = 0.25 * t / (1 - t)
    mean = data * (1 - (t - d)) + noise * (t - d - variance * d / (2 * t))
    torch.testing.assert_close(step.mean, mean, rtol=0, atol=1e-6)
    torch.testing.assert_close(step.std, (variance * d).sqrt(), rtol=0, atol=1e-6)


def test_without_noise_the_step_is_euler_s() -> None:
    sample, velocity = torch.tensor([[0.3, 1.0]]), torch.tensor([[2.0, -1.0]])
    step = flow_sde.sde_step(sample, velocity, torch.linspace(1, 0, 11), torch.tensor([3]), noise_level=0.0)
    assert step.mean[0].tolist() == pytest.approx([0.1, 1.1], abs=1e-6)


def test_the_action_taken_gets_no_gradient() -> None:
    velocity = torch.zeros(1, 2, requires_grad=True)
    step = flow_sde.sde_step(
        torch.ones(1, 2), velocity, torch.linspace(1, 0, 3), torch.tensor([1]), noise_level=0.5
    )
    following = step.sample(torch.tensor([[1.0, -1.0]]))
    (gradient,) = torch.autograd.grad(step.log_prob(following).sum(), velocity)
    # d log p / d mean = error / std^2 = noise / std,
    # d mean / d v = (1 + sigma_t^2 (1 - s) / (2 s)) dt, where s is 1/2, sigma_t^2 1/4 and dt -1/2.
    slope = -0.5 * (1 + 0.25 * 0.5 / (2 * 0.5))
    std = 0.5 * math.sqrt(0.5)
    assert gradient[0].tolist() == pytest.approx([slope / std, -slope / std], abs=1e-5)


def test_what_overflowed_is_not_executed_as_an_action() -> None:
    chunk = np.array([[0.5, 3.0, np.inf, -np.inf, np.nan, -2.0, np.nan], [0, 0, 0, 0, 0, 0, 0.2]])
    actions = executable(chunk)
    np.testing.assert_array_equal(
        actions[0], np.array([0.5, 1, np.nan, np.nan, np.nan, -1, np.nan], np.float32)
    )
    np.testing.assert_array_equal(actions[1], np.array([0, 0, 0, 0, 0, 0, 1], np.float32))
