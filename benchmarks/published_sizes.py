"""Networks as large as the published ones, on torch's meta device: their shapes without a byte of weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from configs.policy import PolicyPart
from policies.openvla.layout import OpenVLALayout, openvla_layout
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


def context_numbers(network: nn.Module) -> int:
    """Numbers that a kept context (the image tokens of one decision) has."""
    if isinstance(network, Pi0Network):
        cameras = 2
        return cameras * network.config.vision.tokens * network.config.vlm.width
    model = network.get_submodule("language_model")
    return network.get_submodule("vision_backbone").tokens * model.config.hidden_size  # type: ignore[operator,union-attr,return-value]
