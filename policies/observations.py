"""Observations as tensors, checked on the way in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from policies.text import PromptTokenizer
from trajectories.records import PROPRIO_DIM, Observation


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


def stack_observations(
    observations: Sequence[Observation], prompts: PromptTokenizer, *, image_size: int, device: torch.device
) -> ObservationBatch:
    """Raises ValueError naming the first observation whose images or proprioception do not fit."""
    if not observations:
        raise ValueError("a batch needs at least one observation")
    for i, seen in enumerate(observations):
        for name, image in (("agentview", seen.agentview), ("wrist", seen.wrist)):
            if image.shape != (image_size, image_size, 3) or image.dtype != np.uint8:
                raise ValueError(
                    f"observation {i}: {name} is {image.dtype} {list(image.shape)}, "
                    f"expected uint8 [{image_size}, {image_size}, 3]"
                )
        if seen.proprio.shape != (PROPRIO_DIM,) or not np.isfinite(seen.proprio).all():
            raise ValueError(
                f"observation {i}: proprio must be {PROPRIO_DIM} finite numbers, got {seen.proprio}"
            )
    prompt, mask = prompts.stack([seen.instruction for seen in observations])
    proprio = np.stack([seen.proprio for seen in observations]).astype(np.float32)
    return ObservationBatch(
        agentview_BHWC=torch.from_numpy(np.stack([seen.agentview for seen in observations])).to(device),
        wrist_BHWC=torch.from_numpy(np.stack([seen.wrist for seen in observations])).to(device),
        proprio_BP=torch.from_numpy(proprio).to(device),
        prompt_BT=torch.from_numpy(prompt).to(device),
        prompt_mask_BT=torch.from_numpy(mask).to(device),
    )
