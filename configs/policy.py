"""The policy's part of a recipe: its architecture, by paradigm, and how it samples."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from configs.part import Part

STATE_WORDS = 8
"""Numbers of the robot's state."""


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
    state_in_prompt: bool = Field(
        True, description="pi0.5: tell proprioception in the prompt; openpi's pi05_libero does without"
    )
    state_words: int = Field(
        STATE_WORDS,
        ge=STATE_WORDS,
        le=64,
        description="pi0.5 with a checkpoint: how many numbers of the state the prompt tells, those behind the robot's "
        "8 being zeros; LeRobot filled up to 32 when it trained pi05_libero_finetuned",
    )
    delta_actions: bool = Field(
        False,
        description="with a checkpoint: its actions are less the state in the first six dimensions, as in openpi's "
        "pi0_libero",
    )
    expert_width: int = Field(64, ge=16, description="hidden size of the action expert")
    expert_mlp: int = Field(128, ge=16, description="feed-forward size of the action expert")
    steps: int = Field(10, ge=1, description="Euler steps from noise to a chunk")
    score_draws: int = Field(
        4, ge=1, description="noise draws that a surrogate score, or a supervised step, averages over"
    )


class DiffusionPart(Part):
    """Discrete diffusion: how a chunk is unmasked and how it is scored."""

    iterations: int = Field(12, ge=1, description="forward passes in which a chunk is unmasked")
    remask: bool = Field(False, description="let decoded tokens be masked again where confidence stays low")
    choice_temperature: float | None = Field(
        None,
        ge=0,
        description="scale of the noise on the order in which tokens are kept, beside their log-probability, whatever "
        "the sampling temperature (0 alone, which is greedy, has no noise here either): large is a random order; none: "
        "the sampling temperature",
    )
    score_draws: int = Field(4, ge=1, description="masks that a score averages over")


_ONLY_FOR = {
    "flow": ("flow",),
    "diffusion": ("diffusion",),
    "bins": ("autoregressive", "diffusion"),
    "decoding": ("autoregressive",),
    "vision.merge": ("autoregressive", "diffusion"),
}
"""Parts and settings of a policy that not every paradigm reads, and which do."""


def unread_settings(paradigm: object, version: object) -> dict[str, str]:
    """Settings of a policy that mean nothing under this `paradigm` and `flow.version`, by path under `policy`, and to
    what they mean nothing."""
    parts: dict[str, type[Part]] = {"flow": FlowPart, "diffusion": DiffusionPart}
    unread: dict[str, str] = {}
    for name, readers in _ONLY_FOR.items():
        if paradigm not in readers:
            paths = [f"{name}.{key}" for key in parts[name].model_fields] if name in parts else [name]
            unread |= dict.fromkeys(paths, f"paradigm {paradigm}")
    if paradigm == "flow" and version == "pi0":
        unread |= dict.fromkeys(("flow.state_in_prompt", "flow.state_words"), "version pi0")
    return unread


class PolicyPart(Part):
    """The policy's architecture and how it samples."""

    SAMPLING: ClassVar[dict[str, bool | set[str]]] = {
        "temperature": True,
        "diffusion": True,
        "flow": {"steps", "score_draws"},
    }
    """Settings under which the same weights may be sampled and scored otherwise; the others are the weights' own."""

    paradigm: Literal["autoregressive", "flow", "diffusion"] = Field(
        "autoregressive",
        description="how action chunks are produced: token after token (OpenVLA), by flow matching (pi-0, pi-0.5), or "
        "by unmasking tokens in parallel (Discrete Diffusion VLA)",
    )
    decoding: Literal["sequential", "parallel"] = Field(
        "sequential",
        description="autoregressive: each token seeing those before it (OpenVLA), or all of a chunk in one pass, none "
        "seeing what another came to be (OpenVLA-OFT with the token head)",
    )
    checkpoint: str | None = Field(
        None,
        description="folder with published weights, whose sizes are then the policy's (autoregressive and diffusion: "
        "OpenVLA as on the Hub; flow: pi-0 or pi-0.5 of openpi, LeRobot or transformers); none: a small policy of the "
        "sizes below, with random weights. An absolute path when actors run on other nodes",
    )
    unnorm_key: str | None = Field(
        None,
        description="OpenVLA checkpoints: data set whose statistics scale the actions; none: the only one",
    )
    norm_stats: str | None = Field(
        None,
        description="flow checkpoints: openpi's norm_stats.json, LeRobot's policy_preprocessor.json, or the folder of "
        "either; none: in the checkpoint's folder or its assets",
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="what a checkpoint's weights are held, merged to and served in"
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

    @model_validator(mode="after")
    def _settings_are_read(self) -> PolicyPart:
        given, plain = (
            self.model_dump(),
            {name: info.default for name, info in type(self).model_fields.items()},
        )
        for path, what in unread_settings(self.paradigm, self.flow.version).items():
            part, _, key = path.partition(".")
            default = getattr(plain[part], key) if key else plain[part]
            if (given[part][key] if key else given[part]) != default:
                raise ValueError(f"policy.{path} means nothing to {what}; leave it out")
        return self

    @model_validator(mode="after")
    def _settings_fit_the_checkpoint(self) -> PolicyPart:
        flow = self.flow
        needs = {
            "unnorm_key": self.unnorm_key is not None,
            "norm_stats": self.norm_stats is not None,
            "dtype": self.dtype != "float32",
            "flow.delta_actions": flow.delta_actions,
            "flow.state_words": flow.state_words != STATE_WORDS,
        }
        plain = FlowPart()
        has_its_own = {
            "vision": self.vision != VisionPart(),
            "decoder": self.decoder != DecoderPart(),
            "bins": self.bins != PolicyPart.model_fields["bins"].default,
            "flow.expert_width": flow.expert_width != plain.expert_width,
            "flow.expert_mlp": flow.expert_mlp != plain.expert_mlp,
        }
        if self.checkpoint is None:
            for name in (name for name, given in needs.items() if given):
                raise ValueError(f"{name} means something with policy.checkpoint alone; leave it out")
            return self
        for name in (name for name, given in has_its_own.items() if given):
            raise ValueError(f"{name} contradicts policy.checkpoint, which brings its own; leave it out")
        unused = "unnorm_key" if self.paradigm == "flow" else "norm_stats"
        if needs[unused]:
            raise ValueError(f"{unused} is not for a checkpoint of paradigm {self.paradigm}; leave it out")
        return self
