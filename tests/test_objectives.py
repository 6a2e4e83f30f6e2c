"""Preference losses against closed forms and recorded values of other implementations."""

from __future__ import annotations

import itertools
import math
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from objectives import dpo

SHARED = Path(os.environ.get("PAIRLOOM_SHARED", Path(__file__).parents[1].parent / "shared"))
FIXTURE = SHARED / "parity" / "dpo"


@pytest.fixture
def recorded() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    if not FIXTURE.is_dir():
        pytest.skip("recorded values are not on this machine")
    return load_file(FIXTURE / "inputs.safetensors"), load_file(FIXTURE / "expected.safetensors")


def log_ratios(inputs: dict[str, torch.Tensor], side: str) -> torch.Tensor:
    return inputs[f"policy_{side}_logps"] - inputs[f"ref_{side}_logps"]


def test_sigmoid_is_log_two_where_policy_is_reference() -> None:
    zero = torch.zeros(3)
    loss = dpo.sigmoid_loss(zero, zero, beta=0.1)
    assert loss.losses.tolist() == pytest.approx([math.log(2)] * 3, abs=1e-7)
    assert loss.chosen_rewards.tolist() == [0, 0, 0]


def test_sigmoid_closed_form_and_gradient() -> None:
    chosen = torch.tensor([3.0], requires_grad=True)
    rejected = torch.tensor([-2.0], requires_grad=True)
    loss = dpo.sigmoid_loss(chosen, rejected, beta=0.2)
    loss.losses.mean().backward()
    # h = 5, beta h = 1: log(1 + e^-1), and d/dh = -beta sigma(-1).
    assert loss.losses.item() == pytest.approx(0.3132617, abs=1e-6)
    assert chosen.grad.item() == pytest.approx(-0.2 * 0.2689414, abs=1e-6)
    assert rejected.grad.item() == pytest.approx(0.2 * 0.2689414, abs=1e-6)
    assert loss.chosen_rewards.item() == pytest.approx(0.6)
    assert loss.rejected_rewards.item() == pytest.approx(-0.4)


def test_label_smoothing_has_its_minimum_at_the_assumed_odds() -> None:
    # Conservative DPO is stationary where sigma(beta h) = 1 - e, i.e. h = log(9) / beta for e = 0.1.
    h = torch.tensor([math.log(9) / 0.5], requires_grad=True)
    dpo.sigmoid_loss(h, torch.zeros(1), beta=0.5, label_smoothing=0.1).losses.sum().backward()
    assert h.grad.item() == pytest.approx(0, abs=1e-7)


def test_robust_dpo_averages_to_the_loss_of_the_true_labels() -> None:
    h = torch.tensor([4.0, -1.0])
    zero = torch.zeros(2)
    kept = dpo.robust_loss(h, zero, beta=0.5, label_smoothing=0.2).losses
    flipped = dpo.robust_loss(zero, h, beta=0.5, label_smoothing=0.2).losses
    true = dpo.sigmoid_loss(h, zero, beta=0.5).losses
    torch.testing.assert_close(0.8 * kept + 0.2 * flipped, true)
    assert kept[0].item() < 0
    # (0.8 log(1 + e^-2) - 0.2 log(1 + e^2)) / 0.6
    assert kept[0].item() == pytest.approx(-0.5397387, abs=1e-6)


@pytest.mark.parametrize("smoothing", [-0.1, 0.5, 0.9])
def test_robust_dpo_needs_labels_that_are_more_often_right(smoothing: float) -> None:
    with pytest.raises(ValueError, match="label_smoothing must lie in"):
        dpo.robust_loss(torch.zeros(1), torch.zeros(1), beta=0.1, label_smoothing=smoothing)


def test_the_proximal_term_is_least_where_policy_is_reference() -> None:
    ratios = torch.tensor([0.0, 3.0, -3.0], requires_grad=True)
    losses = dpo.proximal_loss(ratios, beta=2.0)
    # At r = 6: (log(1 + e^-6) + log(1 + e^6)) / 2 = 3 + log(1 + e^-6).
    assert losses.tolist() == pytest.approx([math.log(2), 3.0024757, 3.0024757], abs=1e-6)
    losses.sum().backward()
    assert ratios.grad.tolist() == pytest.approx([0, 0.9950548, -0.9950548], abs=1e-6)


def test_ipo_is_zero_at_its_target_margin() -> None:
    loss = dpo.ipo_loss(torch.tensor([6.0, 0.0]), torch.tensor([1.0, 0.0]), beta=0.1)
    assert loss.losses.tolist() == [0.0, 25.0]


@pytest.mark.parametrize(("beta", "smoothing"), itertools.product((0.1, 0.5), (0.0, 0.1, 0.3)))
def test_sigmoid_equals_recorded_values(recorded, beta: float, smoothing: float) -> None:
    inputs, expected = recorded
    chosen, rejected = log_ratios(inputs, "chosen"), log_ratios(inputs, "rejected")
    loss = dpo.sigmoid_loss(chosen, rejected, beta=beta, label_smoothing=smoothing)
    key = f"trl0.19.1/sigmoid/beta{beta}/ls{smoothing}"
    torch.testing.assert_close(loss.losses, expected[f"{key}/losses"], rtol=1e-5, atol=1e-5)
    if smoothing == 0:
        torch.testing.assert_close(loss.chosen_rewards, expected[f"{key}/chosen_rewards"])
        torch.testing.assert_close(loss.rejected_rewards, expected[f"{key}/rejected_rewards"])


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_ipo_of_length_normalised_ratios_equals_recorded_values(recorded, beta: float) -> None:
    inputs, expected = recorded
    chosen = log_ratios(inputs, "chosen") / inputs["chosen_token_mask"].sum(-1)
    rejected = log_ratios(inputs, "rejected") / inputs["rejected_token_mask"].sum(-1)
    losses = dpo.ipo_loss(chosen, rejected, beta=beta).losses
    torch.testing.assert_close(losses, expected[f"trl1.16.0/ipo/beta{beta}/ls0.0/losses"])


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_token_gradients_equal_recorded_ones(recorded, beta: float) -> None:
    """Token log-probs -> trajectory sums -> loss: the gradient at every token, both sides."""
    inputs, expected = recorded
    tokens = torch.cat([inputs[f"policy_{side}_token_logps"] for side in ("chosen", "rejected")])
    reference = torch.cat([inputs[f"ref_{side}_token_logps"] for side in ("chosen", "rejected")])
    mask = torch.cat([inputs["chosen_token_mask"], inputs["rejected_token_mask"]])
    tokens.requires_grad_()
    by_row = ((tokens - reference) * mask).sum(-1)
    sums = dpo.sum_by_trajectory(by_row, torch.arange(24), torch.ones(24), 24)
    dpo.sigmoid_loss(sums[:12], sums[12:], beta=beta).losses.mean().backward()
    want = expected[f"trl1.16.0/sigmoid/beta{beta}/ls0.0/grad_policy_token_logps"]
    # The recording differentiates with respect to padding too, whose log-probs it holds at zero.
    torch.testing.assert_close(tokens.grad, want * mask, rtol=1e-5, atol=1e-7)


def test_a_chunk_past_the_floor_is_held_and_gives_no_gradient() -> None:
    # Two nats per element over four elements: the floor of a chunk is -8.
    ratios = torch.tensor([[-1.0] * 4, [-3.0] * 4, [5.0, -4.0, -4.0, -4.0]], requires_grad=True)
    sums, held = dpo.bounded_below(ratios, floor=2.0)
    assert sums.tolist() == [-4.0, -8.0, -7.0]
    assert held.tolist() == [False, True, False]
    sums.sum().backward()
    assert ratios.grad.tolist() == [[1.0] * 4, [0.0] * 4, [1.0] * 4]


def test_weighted_sums_over_subsets_average_to_the_trajectory_sum() -> None:
    ratios = torch.tensor([1.0, -4.0, 2.5, 7.0])
    subsets = list(itertools.combinations(range(4), 2))
    sums = [
        dpo.sum_by_trajectory(ratios[list(s)], torch.zeros(2, dtype=torch.int64), torch.full((2,), 2.0), 1)
        for s in subsets
    ]
    assert torch.stack(sums).mean().item() == pytest.approx(6.5)


def test_decisions_reach_their_own_trajectory() -> None:
    sums = dpo.sum_by_trajectory(
        torch.tensor([1.0, 2.0, 4.0]), torch.tensor([2, 0, 2]), torch.tensor([1.0, 3.0, 0.5]), 3
    )
    assert sums.tolist() == [6.0, 0.0, 3.0]
