"""Sizes of pi-0 (arXiv 2410.24164) and pi-0.5 (arXiv 2504.16054), and transformers' configurations made of them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from transformers import GemmaConfig, PaliGemmaConfig, PI0Config

NORM_EPS = 1e-6
"""Epsilon of every RMS norm and layer norm."""
ROPE_THETA = 1e4
_GELU = "gelu_pytorch_tanh"
_SDPA: dict[str, Any] = {"attn_implementation": "sdpa"}
"""The attention that takes bool masks."""
MIN_PERIOD, MAX_PERIOD = 4e-3, 4.0
"""Periods of the time embedding, in units of flow time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamSize:
    """A stack of Gemma layers."""

    width: int
    depth: int
    mlp: int
    heads: int = 8
    kv_heads: int = 1
    head_dim: int = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionSize:
    """A SigLIP tower; image and patch sides in pixels."""

    width: int
    depth: int
    mlp: int
    heads: int
    image: int
    patch: int

    @property
    def tokens(self) -> int:
        """Tokens of one image; rows and columns beyond its last whole patch are seen by none."""
        return (self.image // self.patch) ** 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Pi0Config:
    """A whole network. Raises ValueError for sizes that cannot work together."""

    adaptive: bool
    """pi-0.5: flow time enters through adaptive RMS norms and no state token. Otherwise pi-0."""
    vision: VisionSize
    vlm: StreamSize
    expert: StreamSize
    vocab: int
    horizon: int
    """Actions of a chunk."""
    action_dim: int = 32
    """Dimensions of a padded action."""
    state_dim: int = 32
    """Dimensions of a padded state; pi-0 alone reads it."""
    time: Literal["openpi", "transformers"] = "openpi"
    """Whose arithmetic of flow time. openpi embeds it in float64 and sums it up over Euler steps, as every published
    checkpoint was trained and served; transformers' pi-0 embeds it in float32 and takes step k at 1 - k / steps."""

    def __post_init__(self) -> None:
        if self.adaptive and self.time != "openpi":
            raise ValueError(f"time is {self.time!r}, expected 'openpi': pi-0.5 is not in transformers")
        self._refuse_what_is_no_size()
        for name in ("depth", "heads", "kv_heads", "head_dim"):
            vlm, expert = getattr(self.vlm, name), getattr(self.expert, name)
            if vlm != expert:
                raise ValueError(
                    f"expert.{name} is {expert}, expected the VLM's {vlm}: the two attend to each other per layer"
                )
        for name, stream in (("vlm", self.vlm), ("expert", self.expert)):
            if stream.heads % stream.kv_heads:
                raise ValueError(f"{name}.heads {stream.heads} is no multiple of kv_heads {stream.kv_heads}")
            if stream.head_dim % 2:
                raise ValueError(f"{name}.head_dim {stream.head_dim} must be even (rotary pairs)")
        if self.expert.width % 2 or self.expert.width < 4:
            raise ValueError(
                f"expert.width {self.expert.width} must be even and at least 4 (sine and cosine of flow time)"
            )
        if self.vision.image < self.vision.patch:
            raise ValueError(
                f"vision.image is {self.vision.image}, expected at least one patch of {self.vision.patch}"
            )
        if self.vision.width % self.vision.heads:
            raise ValueError(f"vision.width {self.vision.width} is no multiple of heads {self.vision.heads}")

    def _refuse_what_is_no_size(self) -> None:
        parts = (("vision.", self.vision), ("vlm.", self.vlm), ("expert.", self.expert))
        sizes = {
            f"{of}{field.name}": getattr(part, field.name) for of, part in parts for field in fields(part)
        }
        sizes |= {name: getattr(self, name) for name in ("vocab", "horizon", "action_dim", "state_dim")}
        for name, size in sizes.items():
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"{name} is {size!r}, expected a whole number of 1 or more")


SO400M = VisionSize(width=1152, depth=27, mlp=4304, heads=16, image=224, patch=14)
GEMMA_2B = StreamSize(width=2048, depth=18, mlp=16384)
GEMMA_300M = StreamSize(width=1024, depth=18, mlp=4096)
PI0 = Pi0Config(adaptive=False, vision=SO400M, vlm=GEMMA_2B, expert=GEMMA_300M, vocab=257152, horizon=50)
"""Published pi-0."""
PI05 = Pi0Config(adaptive=True, vision=SO400M, vlm=GEMMA_2B, expert=GEMMA_300M, vocab=257152, horizon=50)
"""Published pi-0.5; the LIBERO fine-tune differs in its horizon, 10."""


def paligemma_config(config: Pi0Config) -> PaliGemmaConfig:
    """The vision-language model, for `transformers.PaliGemmaModel`."""
    return PaliGemmaConfig(**_paligemma(config))


def expert_config(config: Pi0Config) -> GemmaConfig:
    """The action expert's layers, for transformers' Gemma modules."""
    return GemmaConfig(**_gemma(config.expert, vocab=1), **_SDPA)


def pi0_config(config: Pi0Config) -> PI0Config:
    """The whole of pi-0, for `transformers.PI0ForConditionalGeneration`."""
    return PI0Config(
        vlm_config=_paligemma(config),
        dit_config=_gemma(config.expert, vocab=1),
        chunk_size=config.horizon,
        max_state_dim=config.state_dim,
        max_action_dim=config.action_dim,
        min_period=MIN_PERIOD,
        max_period=MAX_PERIOD,
        loss_reduction="none",
        **_SDPA,
    )


def config_of_transformers(official: PI0Config) -> Pi0Config:
    """The sizes of transformers' own pi-0, and its arithmetic of flow time. Raises ValueError for a setting that no
    network here has."""
    vlm: Any = official.vlm_config  # made of a dictionary by then
    dit: Any = official.dit_config
    vision, text = vlm.vision_config, vlm.text_config
    fixed = {
        "min_period": (official.min_period, MIN_PERIOD),
        "max_period": (official.max_period, MAX_PERIOD),
        "vision_config.layer_norm_eps": (vision.layer_norm_eps, NORM_EPS),
        "vision_config.hidden_act": (vision.hidden_act, _GELU),
    }
    for name, stream in (("text_config", text), ("dit_config", dit)):
        fixed |= {
            f"{name}.rms_norm_eps": (stream.rms_norm_eps, NORM_EPS),
            f"{name}.hidden_act": (stream.hidden_act, _GELU),
            f"{name}.rope_theta": (stream.rope_parameters["rope_theta"], ROPE_THETA),
            f"{name}.attention_bias": (stream.attention_bias, False),
        }
    for name, (value, expected) in fixed.items():
        if value != expected:
            raise ValueError(f"{name} is {value!r}, expected pi-0's {expected!r}")
    return Pi0Config(
        adaptive=False,
        vision=VisionSize(
            width=vision.hidden_size,
            depth=vision.num_hidden_layers,
            mlp=vision.intermediate_size,
            heads=vision.num_attention_heads,
            image=vision.image_size,
            patch=vision.patch_size,
        ),
        vlm=_stream(text),
        expert=_stream(dit),
        vocab=text.vocab_size,
        horizon=official.chunk_size,
        action_dim=official.max_action_dim,
        state_dim=official.max_state_dim,
        time="transformers",
    )


def _stream(official: GemmaConfig) -> StreamSize:
    return StreamSize(
        width=official.hidden_size,
        depth=official.num_hidden_layers,
        mlp=official.intermediate_size,
        heads=official.num_attention_heads,
        kv_heads=official.num_key_value_heads,
        head_dim=official.head_dim,
    )


def _paligemma(config: Pi0Config) -> dict[str, Any]:
    vision = config.vision
    return {
        "model_type": "paligemma",
        "text_config": _gemma(config.vlm, vocab=config.vocab),
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": vision.width,
            "intermediate_size": vision.mlp,
            "num_hidden_layers": vision.depth,
            "num_attention_heads": vision.heads,
            "image_size": vision.image,
            "patch_size": vision.patch,
            "layer_norm_eps": NORM_EPS,
            "vision_use_head": False,
        },
        "projection_dim": config.vlm.width,
        "hidden_size": config.vlm.width,
        "vocab_size": config.vocab,
        # The id after the last word: images are never looked up among the words.
        "image_token_index": config.vocab,
        **_SDPA,
    }


def _gemma(size: StreamSize, *, vocab: int) -> dict[str, Any]:
    return {
        "model_type": "gemma",
        "hidden_size": size.width,
        "intermediate_size": size.mlp,
        "num_hidden_layers": size.depth,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "head_dim": size.head_dim,
        "vocab_size": vocab,
        "bos_token_id": None,
        "eos_token_id": None,
        "rms_norm_eps": NORM_EPS,
        "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_THETA},
    }
