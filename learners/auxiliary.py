"""Auxiliary objectives of the supervised start: what else visual tokens are trained on, beside the actions.

The head that reads the tokens belongs to the training alone: it is no part of the policy and is thrown away with the
learner. What the objective taught the policy's own weights is what a capability vector takes (`learners.capability`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import nn

from objectives.future_observation import change_targets
from objectives.spatial_alignment import depth_targets
from objectives.visual_tokens import CELLS, regression_loss, standardized
from policies.encoding.observations import shift_images
from policies.protocol import DecisionBatch, Policy
from trajectories.records import Trajectory

Auxiliary = Literal["spatial", "future"]


class AuxiliaryTask:
    """One objective on the agentview camera's tokens, with its targets and its head."""

    def __init__(
        self, name: Auxiliary, policy: Policy, *, demos: Sequence[Trajectory], probe: DecisionBatch, seed: int
    ) -> None:
        """`probe` is any one decision, to see the policy's tokens; `seed` fixes the head's first weights. Targets are
        in the order of the demonstrations' decisions. Raises ValueError for demonstrations without what the
        objective needs, or tokens that are no square of any camera."""
        self._targets_THWC = _TARGETS[name](demos)
        with torch.no_grad():
            tokens_1ND = policy.encode_context(probe)
        cameras = 1 if probe.wrist_BHWC.shape[1] == 1 else 2
        self._tokens = tokens_1ND.shape[1] // cameras
        self._grid = math.isqrt(self._tokens)
        if self._grid**2 * cameras != tokens_1ND.shape[1]:
            raise ValueError(
                f"supervised.auxiliary={name} needs visual tokens in a square, this policy has {tokens_1ND.shape[1]} "
                f"of {cameras} cameras"
            )
        width, values = tokens_1ND.shape[2], CELLS**2 * self._targets_THWC.shape[-1]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.head = nn.Sequential(
                nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, values)
            ).to(tokens_1ND.device)

    def loss(
        self, tokens_BND: torch.Tensor, rows: torch.Tensor, *, shift: int, generator: torch.Generator
    ) -> torch.Tensor:
        """Mean squared error, a scalar, of what the head reads off the tokens of these decisions; 1 is what predicting
        nothing costs. `shift` and `generator`, as it was, moved the images (`shift_images`); so are the targets."""
        targets = shift_images(self._targets_THWC[rows], shift, generator).to(tokens_BND.device)
        predicted = self.head(tokens_BND[:, : self._tokens].float())
        return regression_loss(predicted, targets, self._grid)


def _depths(demos: Sequence[Trajectory]) -> torch.Tensor:
    found = [d.observation.depth for demo in demos for d in demo.decisions]
    known = [torch.from_numpy(depth) for depth in found if depth is not None]
    if len(known) < len(found):
        raise ValueError(
            f"supervised.auxiliary=spatial needs depth, which {len(found) - len(known)} of {len(found)} demonstrated "
            "decisions lack; collect the demonstrations under this recipe"
        )
    return depth_targets(torch.stack(known))


def _changes(demos: Sequence[Trajectory]) -> torch.Tensor:
    images = [
        torch.stack([torch.from_numpy(d.observation.agentview.copy()) for d in demo.decisions])
        for demo in demos
    ]
    return standardized(torch.cat([change_targets(one) for one in images]))


_TARGETS: dict[Auxiliary, Callable[[Sequence[Trajectory]], torch.Tensor]] = {
    "spatial": _depths,
    "future": _changes,
}
