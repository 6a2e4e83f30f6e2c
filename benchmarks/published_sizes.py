"""Networks as large as the published ones, on torch's meta device: their shapes without a byte of weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from configs.policy import PolicyPart
from policies.openvla.layout import OpenVLALayout, openvla_layout
from policies.openvla.network import OpenVLA
from policies.pi0.network import Pi0Network
from policies.pi0.sizes import PI0, PI05

OPENVLA_7B: dict[str, Any] = {
    "model_type": "openvla",
    "timm_model_ids": ["vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"],
    "timm_override_act_layers": [None, None],
    "image_sizes": [224, 224],
    "use_fused_vision_backbone": True,
    "text_config": {"model_type": "llama", "vocab_size": 32064},
    "pad_to_multiple_of": 64,
    "pad_token_id": 32000,
    "n_action_bins": 256,
}
"""What the published config.json says of its network."""


def openvla_7b() -> OpenVLALayout:
    """OpenVLA-7B's sizes."""
    return openvla_layout(OPENVLA_7B, where="OpenVLA-7B")


def published_network(part: PolicyPart) -> nn.Module:
    """The network of a recipe whose checkpoint has the published size, without memory."""
    if part.paradigm != "flow":
        return openvla_7b().empty()
    with torch.device("meta"):
        return Pi0Network(PI05 if part.flow.version == "pi0.5" else PI0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sight:
    """What a network sees of one decision."""

    tokens: int
    """Image tokens of all cameras."""
    width: int
    """Numbers of a token."""
    pixels: int
    """Bytes of the images as they go into its towers, uint8."""


def sight(network: nn.Module) -> Sight:
    """Of a network that `published_network` made."""
    if isinstance(network, Pi0Network):
        cameras, vision = 2, network.config.vision
        return Sight(
            tokens=cameras * vision.tokens,
            width=network.config.vlm.width,
            pixels=cameras * 3 * vision.image**2,
        )
    assert isinstance(network, OpenVLA)
    return Sight(
        tokens=network.cameras * network.vision_backbone.tokens,
        width=network.language_model.config.hidden_size,
        pixels=network.cameras * 3 * openvla_7b().towers[0].img_size ** 2,
    )
