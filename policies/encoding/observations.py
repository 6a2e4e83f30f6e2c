"""Observations as tensors, checked on the way in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch

from trajectories.records import PROPRIO_DIM, Observation

# Round figures for LIBERO's Panda: reach in metres, the gripper pointing down (axis-angle near (pi, 0, 0)),
# fingers 0 to 0.04 m from the middle. Constants, not statistics of a data set, so that every run shares them.
PROPRIO_MEAN = (0.0, 0.0, 0.6, 3.0, 0.0, 0.0, 0.02, -0.02)
PROPRIO_STD = (0.15, 0.2, 0.35, 0.5, 0.5, 0.5, 0.015, 0.015)


class Prompts(Protocol):
    """Instructions to token ids."""

    def stack(self, instructions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Prompts right-padded to the longest: ids int64 [B, T] and mask bool [B, T], true at real tokens."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class ObservationBatch:
    """B observations. Letters: H W image rows and columns, P proprioception, T prompt tokens (right-padded)."""

    agentview_BHWC: torch.Tensor
    """uint8."""
    wrist_BHWC: torch.Tensor
    """uint8."""
    proprio_BP: torch.Tensor
    """float32 [B, 8]."""
    prompt_BT: torch.Tensor
    """int64 token ids."""
    prompt_mask_BT: torch.Tensor
    """bool, true at real tokens."""


def real_first(seen: ObservationBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompt ids [B, T] and mask with every row's real tokens first, in their order: networks whose BOS is column 0 and
    whose actions follow the last real token may then be given any padding."""
    order_BT = seen.prompt_mask_BT.logical_not().long().argsort(dim=1, stable=True)
    return seen.prompt_BT.gather(1, order_BT), seen.prompt_mask_BT.gather(1, order_BT)


def stack_observations(
    observations: Sequence[Observation],
    prompts: Prompts,
    *,
    image_size: int,
    device: torch.device,
    cameras: Literal[1, 2] = 2,
    view: Callable[[np.ndarray], np.ndarray] | None = None,
) -> ObservationBatch:
    """As the network sees them: images through `view`; of a camera that it has not, one pixel.

    Raises ValueError naming the first observation whose images or proprioception do not fit.
    """
    if not observations:
        raise ValueError("a batch needs at least one observation")
    eyes = _Eyes(image_size, cameras, view)
    agentview = np.stack([eyes.look(seen.agentview, 0, i) for i, seen in enumerate(observations)])
    wrist = np.stack([eyes.look(seen.wrist, 1, i) for i, seen in enumerate(observations)])
    for i, seen in enumerate(observations):
        if seen.proprio.shape != (PROPRIO_DIM,) or not np.isfinite(seen.proprio).all():
            raise ValueError(
                f"observation {i}: proprio must be {PROPRIO_DIM} finite numbers, got {seen.proprio}"
            )
    prompt, mask = prompts.stack([seen.instruction for seen in observations])
    proprio = np.stack([seen.proprio for seen in observations]).astype(np.float32)
    return ObservationBatch(
        agentview_BHWC=torch.from_numpy(agentview).to(device),
        wrist_BHWC=torch.from_numpy(wrist).to(device),
        proprio_BP=torch.from_numpy(proprio).to(device),
        prompt_BT=torch.from_numpy(prompt).to(device),
        prompt_mask_BT=torch.from_numpy(mask).to(device),
    )


@dataclass(frozen=True, slots=True)
class _Eyes:
    image_size: int
    cameras: int
    view: Callable[[np.ndarray], np.ndarray] | None

    def look(self, image: np.ndarray, camera: int, i: int) -> np.ndarray:
        if camera >= self.cameras:
            return np.zeros((1, 1, 3), np.uint8)
        image = image if self.view is None else self.view(image)
        side = self.image_size
        if image.shape != (side, side, 3) or image.dtype != np.uint8:
            name = ("agentview", "wrist")[camera]
            raise ValueError(
                f"observation {i}: {name} is {image.dtype} {list(image.shape)}, expected uint8 [{side}, {side}, 3]"
            )
        return image


def shift_images(images_BHWC: torch.Tensor, pixels: int, generator: torch.Generator) -> torch.Tensor:
    """Move each image by its own random offset in -`pixels`..`pixels`, rows and columns apart; edges repeat.

    Random-shift augmentation (DrQ, arXiv 2004.13649), for supervised training only: scores are taken on
    images as they were seen. Any dtype [B, H, W, C]; the generator lives on the CPU.
    """
    if pixels == 0:
        return images_BHWC
    batch, height, width, _ = images_BHWC.shape
    offsets = torch.randint(-pixels, pixels + 1, (2, batch, 1), generator=generator)
    rows = (torch.arange(height) + offsets[0]).clamp(0, height - 1).to(images_BHWC.device)
    columns = (torch.arange(width) + offsets[1]).clamp(0, width - 1).to(images_BHWC.device)
    image = torch.arange(batch, device=images_BHWC.device)[:, None, None]
    return images_BHWC[image, rows[:, :, None], columns[:, None, :]]
