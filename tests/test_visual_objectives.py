"""What visual tokens are trained on beside the actions: targets against hand-made pictures, and learning them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from configs.supervised import SupervisedPart
from learners.supervised import SupervisedLearner
from objectives.future_observation import change_targets
from objectives.spatial_alignment import depth_targets
from objectives.visual_tokens import regression_loss, token_cells
from tests.learning import demonstration, new_policy
from trajectories.records import Trajectory


def with_depth(demo: Trajectory) -> Trajectory:
    """How far a pixel lies is how red it is."""
    decisions = tuple(
        replace(
            d, observation=replace(d.observation, depth=d.observation.agentview[..., 0] / np.float32(255))
        )
        for d in demo.decisions
    )
    return replace(demo, decisions=decisions)


def test_a_token_s_cells_are_the_means_of_its_quarters() -> None:
    picture = torch.arange(64.0).reshape(1, 8, 8, 1)
    cells = token_cells(picture, grid=2)
    assert cells.shape == (1, 4, 4)
    # The second token is the upper right quarter of the picture; its third cell lies below its first.
    assert cells[0, 1].tolist() == [
        picture[0, rows, columns].mean().item()
        for rows in (slice(0, 2), slice(2, 4))
        for columns in (slice(4, 6), slice(6, 8))
    ]


def test_what_never_moves_is_no_target_and_nothing_predicted_costs_one() -> None:
    depths = torch.rand(5, 8, 8, generator=torch.Generator().manual_seed(0)) + 1
    depths[:, 4:] = 2.0
    targets = depth_targets(depths)
    assert targets.shape == (5, 8, 8, 1)
    assert targets[:, 4:].abs().max() == 0
    torch.testing.assert_close(targets.mean(dim=0), torch.zeros(8, 8, 1), atol=1e-6, rtol=0)
    assert targets.square().mean() == pytest.approx(1)
    # With cells of single pixels the loss is that of the picture.
    assert regression_loss(torch.zeros(5, 16, 4), targets, grid=4) == pytest.approx(1)
    assert depth_targets(torch.ones(3, 8, 8)).abs().max() == 0


def test_the_future_is_the_change_until_later_or_the_end() -> None:
    pictures = torch.zeros(4, 2, 2, 3, dtype=torch.uint8)
    pictures[:, 0, 0, 0] = torch.tensor([0, 51, 102, 255])
    changes = change_targets(pictures, ahead=2)
    assert changes[:, 0, 0, 0].tolist() == pytest.approx([0.4, 0.8, 0.6, 0.0])
    assert changes[:, 1:].abs().max() == 0


@pytest.mark.parametrize("name", ["spatial", "future"])
def test_the_auxiliary_loss_is_learned_beside_the_actions(name: str) -> None:
    demos = [with_depth(demonstration(seed)) for seed in (1, 2)]
    part = SupervisedPart(
        steps=80, batch_size=8, lr=5e-3, warmup_steps=5, image_shift=0, auxiliary=name, auxiliary_weight=1.0
    )
    history: list[dict[str, float]] = []
    SupervisedLearner(new_policy(), part, seed=0, demos=demos).fit(on_step=lambda _, m: history.append(m))
    assert history[-1]["auxiliary_loss"] < 0.6 * history[0]["auxiliary_loss"]
    assert history[-1]["loss"] < 0.6 * history[0]["loss"]


def test_it_reaches_the_policy_and_its_head_does_not() -> None:
    demos = [with_depth(demonstration(1))]

    def train(auxiliary: str) -> dict[str, torch.Tensor]:
        policy = new_policy()
        part = SupervisedPart(steps=2, batch_size=4, warmup_steps=1, auxiliary=auxiliary)
        SupervisedLearner(policy, part, seed=0, demos=demos).fit()
        return policy.module.state_dict()

    plain, again, spatial, future = train("none"), train("none"), train("spatial"), train("future")
    assert set(plain) == set(spatial) == set(future)
    tower = next(name for name in plain if name.startswith("vision_backbone"))
    assert torch.equal(plain[tower], again[tower])
    assert len({tuple(w[tower].flatten().tolist()) for w in (plain, spatial, future)}) == 3


def test_targets_move_with_the_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """How far a pixel lies is how red it is: so it must be after both were shifted."""
    policy, demo = new_policy(), with_depth(demonstration(1))
    seen: list[torch.Tensor] = []
    encode = policy.encode_context
    monkeypatch.setattr(
        policy, "encode_context", lambda batch: seen.append(batch.agentview_BHWC) or encode(batch)
    )
    targets: list[torch.Tensor] = []

    def loss(predicted: torch.Tensor, images: torch.Tensor, grid: int) -> torch.Tensor:
        targets.append(images)
        return regression_loss(predicted, images, grid)

    monkeypatch.setattr("learners.auxiliary.regression_loss", loss)
    part = SupervisedPart(steps=1, batch_size=6, image_shift=3, warmup_steps=1, auxiliary="spatial")
    SupervisedLearner(policy, part, seed=0, demos=[demo]).fit()
    red, target = seen[-1][..., 0].float(), targets[-1][..., 0]
    # A batch of all six decisions: the mean that the target lacks is that of the unshifted pictures, pixel by pixel, so
    # the two do not match exactly; targets shifted otherwise would not match at all.
    matched = torch.corrcoef(torch.stack([red.flatten(), target.flatten()]))[0, 1]
    assert matched > 0.8


def test_a_demonstration_without_depth_is_refused() -> None:
    demos = [with_depth(demonstration(1)), demonstration(2)]
    part = SupervisedPart(steps=1, auxiliary="spatial")
    with pytest.raises(ValueError, match="needs depth, which 6 of 12 demonstrated decisions lack"):
        SupervisedLearner(new_policy(), part, seed=0, demos=demos)
