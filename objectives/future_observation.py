"""Future observation: from each visual token it must be readable how its part of the picture is about to change.

Predicting observations beside actions is the auxiliary objective of many VLA models (GR-1, arXiv 2312.13139, predicts
future images; FLARE, arXiv 2505.15659, future embeddings). Here a small head on each token regresses the change of
colour of its cells from now to a later decision (`objectives.visual_tokens`); with the picture as it will be, most of
the loss would be the picture as it is.
"""

from __future__ import annotations

import torch

AHEAD = 4
"""Decisions from now to then; with demonstrations' stride of two, as many steps as a chunk of eight has, or more where
decisions between were left out because of a push."""


def change_targets(images_THWC: torch.Tensor, ahead: int = AHEAD) -> torch.Tensor:
    """The pictures of one trajectory's decisions in order, uint8 -> float32 [T, H, W, 3]: what each will have changed
    by `ahead` decisions later (at the trajectory's last ones: by its end), in shares of full brightness."""
    images_THWC = images_THWC.float() / 255
    later = (torch.arange(len(images_THWC)) + ahead).clamp(max=len(images_THWC) - 1)
    return images_THWC[later] - images_THWC
