"""Images to tokens: the SigLIP towers of the small networks made here, fused per patch, and the projector into the
decoder's width of any network. Towers of published checkpoints (timm's key names) are in `policies.openvla.towers`.

Letters: B images, H W rows and columns, N tokens of an image, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from configs.policy import VisionPart

NO_HEAD: dict[str, Any] = {"vision_use_head": False}
"""Leaves out the pooling head, whose weights no patch feature depends on."""


class SiglipTower(nn.Module):
    """SigLIP's encoder (arXiv 2303.15343) without its pooling head, and its own pixel normalisation."""

    def __init__(self, part: VisionPart, image_size: int) -> None:
        super().__init__()
        if image_size % part.patch:
            raise ValueError(f"image_size {image_size} is no multiple of vision.patch {part.patch}")
        if part.width % part.heads:
            raise ValueError(f"vision.width {part.width} is no multiple of vision.heads {part.heads}")
        self.width = part.width
        self.grid = image_size // part.patch
        """Patches along each side."""
        self.encoder = SiglipVisionModel(
            SiglipVisionConfig(
                hidden_size=part.width,
                intermediate_size=part.mlp,
                num_hidden_layers=part.layers,
                num_attention_heads=part.heads,
                image_size=image_size,
                patch_size=part.patch,
                hidden_act="gelu",
                **NO_HEAD,
            )
        )

    def forward(self, images_BHWC: torch.Tensor) -> torch.Tensor:
        """uint8 [B, H, W, 3] -> patch features [B, grid * grid, width], row by row."""
        # SigLIP's normalisation is (p / 255 - 0.5) / 0.5.
        pixels = images_BHWC.permute(0, 3, 1, 2).to(self.encoder.dtype) / 127.5 - 1
        return self.encoder(pixel_values=pixels).last_hidden_state


class VisionBackbone(nn.Module):
    """Towers that see the same image, concatenated per patch (OpenVLA, arXiv 2406.09246, section 3.1), then
    each `merge` x `merge` square of patches laid side by side as one token."""

    def __init__(self, towers: Sequence[SiglipTower], merge: int) -> None:
        super().__init__()
        grids = {tower.grid for tower in towers}
        if len(grids) != 1:
            raise ValueError(f"vision towers must share one patch grid, got sides {sorted(grids)}")
        (self.grid,) = grids
        if self.grid % merge:
            raise ValueError(f"vision.merge {merge} does not divide the {self.grid} x {self.grid} patch grid")
        self.towers = nn.ModuleList(towers)
        self.merge = merge
        self.fused = len(towers) > 1
        self.width = sum(tower.width for tower in towers) * merge**2
        """Features of a merged token."""
        self.tokens = (self.grid // merge) ** 2
        """Merged tokens of an image."""

    def forward(self, images_BHWC: torch.Tensor) -> torch.Tensor:
        """uint8 [B, H, W, 3] -> merged tokens [B, N, D], row by row."""
        patches_BND = torch.cat([tower(images_BHWC) for tower in self.towers], dim=-1)
        m, side = self.merge, self.grid // self.merge
        squares = patches_BND.unflatten(1, (side, m, side, m)).transpose(2, 3)
        return squares.flatten(3, 5).flatten(1, 2)


class Projector(nn.Module):
    """Vision features to decoder width: two layers for one tower, three (4x wide first) for fused towers."""

    def __init__(self, vision_width: int, width: int, *, fused: bool) -> None:
        super().__init__()
        hidden = 4 * vision_width if fused else width
        self.fc1 = nn.Linear(vision_width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.fc3 = nn.Linear(width, width) if fused else None

    def forward(self, tokens_BND: torch.Tensor) -> torch.Tensor:
        x = self.fc2(F.gelu(self.fc1(tokens_BND)))
        return x if self.fc3 is None else self.fc3(F.gelu(x))
