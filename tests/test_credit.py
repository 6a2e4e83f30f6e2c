"""Credit: the decision at which an episode was lost is found from outcomes alone."""

from __future__ import annotations

import pytest
import torch

from learners.credit import credits, decisive


def episodes(lost_at: list[int | None], steps: int = 10) -> tuple[list[torch.Tensor], list[bool]]:
    """Features of episodes whose first number turns from +1 to -1 after the decision that loses them (None: never),
    beside four numbers of noise."""
    noise = torch.randn(len(lost_at), steps, 4, generator=torch.Generator().manual_seed(0))
    features = []
    for k, lost in enumerate(lost_at):
        state = torch.ones(steps, 1)
        if lost is not None:
            state[lost + 1 :] = -1
        features.append(torch.cat([state, noise[k]], dim=1))
    return features, [lost is None for lost in lost_at]


LOST_AT = [None, 3, None, 5, None, 3, None, 7, None, 4, None, 6]


def test_the_decision_that_lost_the_episode_gets_the_blame() -> None:
    features, successes = episodes(LOST_AT)
    found = credits(features, successes, groups=[k // 2 for k in range(12)])
    for lost, credit in zip(LOST_AT, found, strict=True):
        assert credit.shape == (10,)
        if lost is not None:
            assert credit.argmin() == lost
            assert credit[lost] < -0.5
            indices, weights = decisive(credit, success=False, most=3)
            assert indices[0] == lost
            assert weights[0] > 0.6
            assert weights.sum() == pytest.approx(1)


def test_credits_sum_to_what_the_outcome_added_to_the_first_value() -> None:
    features, successes = episodes(LOST_AT)
    for success, credit in zip(successes, credits(features, successes, groups=list(range(12))), strict=True):
        total = credit.sum().item()
        assert (0 < total < 1) if success else (-1 < total < 0)


def test_a_trajectory_is_judged_by_probes_that_have_not_seen_its_group() -> None:
    features, successes = episodes(LOST_AT)
    groups = [k // 2 for k in range(12)]
    honest = credits(features, successes, groups=groups)
    turned = credits(features, [not successes[0], *successes[1:]], groups=groups)
    # Only the end of the first trajectory's own credit may move with its own outcome: not the values before.
    torch.testing.assert_close(turned[0][:-1], honest[0][:-1], rtol=0, atol=0)
    assert not torch.equal(turned[2], honest[2])


def test_one_group_alone_is_judged_by_its_own_probe() -> None:
    features, successes = episodes([None, 3, None, 5])
    found = credits(features, successes, groups=[0, 0, 0, 0])
    assert found[1].argmin() == 3


def test_without_a_fall_the_weights_are_still_a_share() -> None:
    indices, weights = decisive(torch.tensor([0.2, 0.1, 0.3]), success=False, most=2)
    assert len(indices) == 2
    torch.testing.assert_close(weights, torch.tensor([0.5, 0.5]))
    indices, weights = decisive(torch.tensor([0.2, -0.1, 0.6]), success=True, most=2)
    assert indices.tolist() == [2, 0]
    torch.testing.assert_close(weights, torch.tensor([0.75, 0.25]))
