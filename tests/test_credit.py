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
            assert credit[lost] < -0.5
            assert credit[lost + 1 :].abs().max() < 0.05
            indices, weights = decisive(credit, success=False, most=3)
            assert {lost - 1, lost} < set(indices.tolist())
            assert weights.sum() == pytest.approx(1)


def test_blame_is_traced_back_from_where_the_loss_shows() -> None:
    features, successes = episodes(LOST_AT)
    credit = credits(features, successes, groups=[k // 2 for k in range(12)])[7]
    assert LOST_AT[7] == 7
    share = (credit[:8] / credit[7]).tolist()
    assert share[6] == pytest.approx(0.7, abs=0.1)
    assert share[5] == pytest.approx(0.49, abs=0.15)
    assert abs(share[0]) < 0.3


def test_a_trajectory_is_judged_by_probes_that_have_not_seen_its_group() -> None:
    features, successes = episodes(LOST_AT)
    groups = [k // 2 for k in range(12)]
    honest = credits(features, successes, groups=groups)
    turned = credits(features, [not successes[0], *successes[1:]], groups=groups)
    # Its own outcome enters its last change only, from where the trace takes it back: 1 less at the end, 0.7 before.
    expected = honest[0] - 0.7 ** torch.arange(9, -1, -1)
    torch.testing.assert_close(turned[0], expected, rtol=0, atol=1e-5)
    assert not torch.equal(turned[2], honest[2])


def test_one_group_alone_is_judged_by_its_own_probe() -> None:
    features, successes = episodes([None, 3, None, 5])
    found = credits(features, successes, groups=[0, 0, 0, 0])
    assert found[1][3] < -0.5 < found[1][4]


def test_without_a_fall_the_weights_are_still_a_share() -> None:
    indices, weights = decisive(torch.tensor([0.2, 0.1, 0.3]), success=False, most=2)
    assert len(indices) == 2
    torch.testing.assert_close(weights, torch.tensor([0.5, 0.5]))
    indices, weights = decisive(torch.tensor([0.2, -0.1, 0.6]), success=True, most=2)
    assert indices.tolist() == [2, 0]
    torch.testing.assert_close(weights, torch.tensor([0.75, 0.25]))


def test_the_only_failure_is_still_explained() -> None:
    """Other groups have nothing but successes, which say nothing about failing."""
    features, successes = episodes([None, None, None, 3, None, None])
    credit = credits(features, successes, groups=list(range(6)))[3]
    assert credit[3] < -0.5
    assert credit[4:].abs().max() < 0.1
