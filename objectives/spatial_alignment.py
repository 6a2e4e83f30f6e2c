"""Spatial alignment: from each visual token it must be readable how far what it shows lies from the camera.

Spatial Forcing (arXiv 2510.12276) aligns visual tokens with the features of a frozen geometry network by cosine. A
simulator gives the geometry itself, drawn with the demonstration, so a small head on each token regresses it
(`objectives.visual_tokens`); and it is taken on the tokens as they enter the decoder, not inside it.
"""

from __future__ import annotations

import torch

from objectives.visual_tokens import standardized


def depth_targets(depths_THW: torch.Tensor) -> torch.Tensor:
    """Depths in metres -> float32 [T, H, W, 1]: how much nearer or farther than in the mean picture, standardized.

    What never moves says nothing about a token and would be learned by its position alone, so the mean is taken off.
    """
    depths_THWC = depths_THW.float()[..., None]
    return standardized(depths_THWC - depths_THWC.mean(dim=0))
