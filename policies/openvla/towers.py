"""Vision transformers under the key names of published checkpoints (timm's), as OpenVLA holds them. Those of the small
networks made here are in `policies.openvla.vision`.

Letters: B images, H W rows and columns, C channels, N patches of an image, T tokens (extra ones first, then
patches), D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

EPSILON = 1e-6
"""Of every LayerNorm in both towers; PyTorch's own default is 1e-5."""
TOWER_NAMES = ("featurizer", "fused_featurizer")
"""What a checkpoint calls the first and the second tower."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TowerSizes:
    """One tower. Sizes carry timm's argument names, so that a checkpoint's own words fill them."""

    embed_dim: int
    depth: int
    num_heads: int
    mlp_ratio: float
    patch_size: int
    img_size: int
    """Rows and columns of the image, pixels."""
    extra_tokens: int
    """Class and register tokens together; 0: patches alone. With any, the class token is the first."""
    layer_scale: bool
    """DINOv2 scales each residual branch by learned factors."""
    attention_pool: bool
    """SigLIP ends in a pooling head, whose tensors no patch feature depends on."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    """Pixel normalisation of images in [0, 1], by channel."""

    def __post_init__(self) -> None:
        if self.depth < 2:
            raise ValueError(f"a tower needs 2 blocks or more (its last is left out), got depth {self.depth}")
        if self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim {self.embed_dim} is no multiple of num_heads {self.num_heads}")
        if self.img_size % self.patch_size:
            raise ValueError(f"img_size {self.img_size} is no multiple of patch_size {self.patch_size}")

    @property
    def patches(self) -> int:
        """Patches of an image."""
        return (self.img_size // self.patch_size) ** 2


class PatchEmbed(nn.Module):
    """Each patch's pixels to features, by one matrix (as a convolution whose stride is its size)."""

    def __init__(self, patch: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, kernel_size=patch, stride=patch)

    def forward(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        """[B, 3, H, W] -> [B, N, D], row by row."""
        return self.proj(pixels_BCHW).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        parts = self.qkv(x_BTD).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        queries, keys, values = parts.unbind(0)
        mixed = F.scaled_dot_product_attention(queries, keys, values)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x_BTD)))


class LayerScale(nn.Module):
    """A learned factor for each feature (CaiT, arXiv 2103.17239). Checkpoints say `scale_factor` where timm says
    `gamma`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale_factor = nn.Parameter(torch.full((width,), 1e-5))

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return x_BTD * self.scale_factor


class Block(nn.Module):
    """Attention and MLP, each on a normalised input and added to it (ViT, arXiv 2010.11929)."""

    def __init__(self, sizes: TowerSizes) -> None:
        super().__init__()
        width = sizes.embed_dim
        self.norm1 = nn.LayerNorm(width, eps=EPSILON)
        self.attn = Attention(width, sizes.num_heads)
        self.ls1 = LayerScale(width) if sizes.layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(width, eps=EPSILON)
        self.mlp = Mlp(width, int(width * sizes.mlp_ratio))
        self.ls2 = LayerScale(width) if sizes.layer_scale else nn.Identity()

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        x_BTD = x_BTD + self.ls1(self.attn(self.norm1(x_BTD)))
        return x_BTD + self.ls2(self.mlp(self.norm2(x_BTD)))


class AttentionPool(nn.Module):
    """SigLIP's pooling head. It holds what a checkpoint holds and is never run."""

    def __init__(self, sizes: TowerSizes) -> None:
        super().__init__()
        width = sizes.embed_dim
        self.latent = nn.Parameter(torch.zeros(1, 1, width))
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=EPSILON)
        self.mlp = Mlp(width, int(width * sizes.mlp_ratio))


class TimmTower(nn.Module):
    """A vision transformer that gives its second-to-last block's patch features, without the final norm.

    The last block, the final norm and the pooling head are held, because checkpoints hold them, and are not run.
    """

    def __init__(self, sizes: TowerSizes) -> None:
        super().__init__()
        self.sizes = sizes
        width = sizes.embed_dim
        registers = sizes.extra_tokens - 1
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width)) if registers >= 0 else None
        self.reg_token = nn.Parameter(torch.zeros(1, registers, width)) if registers > 0 else None
        # Patches alone have positions; class and register tokens have none.
        self.pos_embed = nn.Parameter(torch.zeros(1, sizes.patches, width))
        self.patch_embed = PatchEmbed(sizes.patch_size, width)
        self.blocks = nn.ModuleList(Block(sizes) for _ in range(sizes.depth))
        self.norm = nn.LayerNorm(width, eps=EPSILON)
        if sizes.attention_pool:
            self.attn_pool = AttentionPool(sizes)

    def normalize(self, images_BHWC: torch.Tensor) -> torch.Tensor:
        """uint8 [B, H, W, 3] -> this tower's pixels, float32 [B, 3, H, W]."""
        pixels_BHWC = images_BHWC.float() / 255
        mean, std = pixels_BHWC.new_tensor(self.sizes.mean), pixels_BHWC.new_tensor(self.sizes.std)
        return ((pixels_BHWC - mean) / std).permute(0, 3, 1, 2)

    def forward(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        """Normalised pixels [B, 3, H, W] -> patch features [B, N, D], row by row. ValueError for another size."""
        side = self.sizes.img_size
        if tuple(pixels_BCHW.shape[1:]) != (3, side, side):
            raise ValueError(
                f"a tower for {side} x {side} images got pixels of shape {list(pixels_BCHW.shape)}, "
                f"expected [images, 3, {side}, {side}]"
            )
        x_BTD = self.patch_embed(pixels_BCHW.to(self.pos_embed.dtype)) + self.pos_embed
        extra = [token for token in (self.cls_token, self.reg_token) if token is not None]
        x_BTD = torch.cat([*(token.expand(len(x_BTD), -1, -1) for token in extra), x_BTD], dim=1)
        for block in self.blocks[:-1]:
            x_BTD = block(x_BTD)
        return x_BTD[:, self.sizes.extra_tokens :]


class TimmBackbone(nn.Module):
    """One tower, or two that see the same image and are concatenated per patch (OpenVLA, arXiv 2406.09246,
    section 3.1), named as checkpoints name them."""

    def __init__(self, towers: Sequence[TowerSizes]) -> None:
        """Raises ValueError unless there are one or two towers of one image size and one patch grid."""
        super().__init__()
        if not 1 <= len(towers) <= len(TOWER_NAMES):
            raise ValueError(f"a vision backbone has 1 or 2 towers, got {len(towers)}")
        for name in ("img_size", "patches"):
            sizes = [getattr(tower, name) for tower in towers]
            if len(set(sizes)) > 1:
                raise ValueError(f"vision towers must share one {name}, got {sizes[0]} and {sizes[1]}")
        for name, tower in zip(TOWER_NAMES, towers, strict=False):
            self.add_module(name, TimmTower(tower))
        self.image_size = towers[0].img_size
        self.tokens = towers[0].patches
        """Tokens of an image: its patches."""
        self.width = sum(tower.embed_dim for tower in towers)
        """Features of a token."""
        self.fused = len(towers) > 1

    @property
    def towers(self) -> list[TimmTower]:
        return [tower for tower in self.children() if isinstance(tower, TimmTower)]

    def forward(self, images_BHWC: torch.Tensor) -> torch.Tensor:
        """uint8 [B, H, W, 3] -> fused patch features [B, N, D], row by row."""
        return self.patches(torch.cat([tower.normalize(images_BHWC) for tower in self.towers], dim=1))

    def patches(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        """Pixels that each tower's normalisation has been applied to, [B, 3 or 6, H, W] (three channels a tower, in
        their order) -> fused patch features [B, N, D]. ValueError for another shape."""
        towers = self.towers
        if pixels_BCHW.ndim != 4 or pixels_BCHW.shape[1] != 3 * len(towers):
            raise ValueError(
                f"pixels have shape {list(pixels_BCHW.shape)}, expected [images, {3 * len(towers)}, rows, columns]"
            )
        pairs = zip(towers, pixels_BCHW.split(3, dim=1), strict=True)
        return torch.cat([tower(pixels) for tower, pixels in pairs], dim=-1)
