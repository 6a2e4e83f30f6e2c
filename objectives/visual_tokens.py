"""Regression of pictures from visual tokens: what objectives that train tokens on a picture have in common.

Letters: T decisions of a data set, B of a batch, H W image rows and columns, C channels, N = G G tokens of one camera
in rows of G, D their width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

CELLS = 2
"""Rows, and columns, that one token's part of the picture is pooled to."""


def standardized(images_THWC: torch.Tensor) -> torch.Tensor:
    """Scaled to a mean square of 1 over the whole data set, so that predicting nothing costs 1; zeros stay zeros."""
    scale = images_THWC.square().mean().sqrt()
    return images_THWC / scale if scale > 0 else images_THWC


def token_cells(images_BHWC: torch.Tensor, grid: int) -> torch.Tensor:
    """What lies behind each token, [B, N, CELLS * CELLS * C]: the mean colour of each of its cells."""
    side = grid * CELLS
    pooled_BCHW = F.adaptive_avg_pool2d(images_BHWC.movedim(-1, 1), (side, side))
    cells_BNX = F.unfold(pooled_BCHW, kernel_size=CELLS, stride=CELLS).movedim(1, 2)
    return cells_BNX.contiguous()


def regression_loss(predicted_BNX: torch.Tensor, images_BHWC: torch.Tensor, grid: int) -> torch.Tensor:
    """Mean squared error of predicted cells, a scalar."""
    return F.mse_loss(predicted_BNX, token_cells(images_BHWC, grid))
