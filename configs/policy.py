"""The policy's part of a recipe: its architecture, by paradigm, and how it samples."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from configs.part import Part


class VisionPart(Part):
    """One vision tower: a SigLIP encoder built from its configuration."""

    width: int = Field(96, ge=16, description="hidden size")
    layers: int = Field(3, ge=1, description="transformer layers")
    heads: int = Field(4, ge=1, description="attention heads")
    mlp: int = Field(256, ge=16, description="feed-forward size")
    patch: int = Field(8, ge=2, description="patch side, pixels")
    merge: int = Field(2, ge=1, description="side of the square of patches merged into one token")


class DecoderPart(Part):
    """The Llama decoder, built from its configuration."""

    width: int = Field(96, ge=16, description="hidden size")
    layers: int = Field(3, ge=1, description="transformer layers")
    heads: int = Field(4, ge=1, description="attention heads")
    mlp: int = Field(256, ge=16, description="feed-forward size")


class FlowPart(Part):
    """Flow matching: the action expert beside the decoder, how it samples and how it is scored."""

    version: Literal["pi0", "pi0.5"] = Field(
        "pi0.5",
        description="pi0: proprioception is an expert token; pi0.5: the flow time modulates the expert's norms, and "
        "proprioception is text or absent",
    )
    expert_width: int = Field(64, ge=16, description="hidden size of the action expert")
    expert_mlp: int = Field(128, ge=16, description="feed-forward size of the action expert")
    steps: int = Field(10, ge=1, description="Euler steps from noise to a chunk")
    score_draws: int = Field(4, ge=1, description="noise draws that a surrogate score averages over")


class DiffusionPart(Part):
    """Discrete diffusion: how a chunk is unmasked and how it is scored."""

    iterations: int = Field(12, ge=1, description="forward passes in which a chunk is unmasked")
    remask: bool = Field(False, description="let decoded tokens be masked again where confidence stays low")
    score_draws: int = Field(4, ge=1, description="masks that a score averages over")


class PolicyPart(Part):
    """The policy's architecture and how it samples."""

    paradigm: Literal["autoregressive", "flow", "diffusion"] = Field(
        "autoregressive",
        description="how action chunks are produced: token after token (OpenVLA), by flow matching (pi-0, pi-0.5), or "
        "by unmasking tokens in parallel (Discrete Diffusion VLA)",
    )
    vision: VisionPart = Field(default=VisionPart(), description="vision tower")
    decoder: DecoderPart = Field(default=DecoderPart(), description="language decoder")
    flow: FlowPart = Field(default=FlowPart(), description="flow matching")
    diffusion: DiffusionPart = Field(default=DiffusionPart(), description="discrete diffusion")
    bins: int = Field(256, ge=3, le=256, description="action bins per dimension (OpenVLA: 256)")
    chunk: int = Field(8, ge=1, description="actions per decision")
    temperature: float = Field(
        1.0,
        ge=0,
        description="sampling temperature of rollouts (flow: scale of the noise a chunk begins from); 0 is greedy",
    )
