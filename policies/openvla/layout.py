"""What an OpenVLA checkpoint's config.json says of its network: sizes, names, and the empty network itself."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from policies.encoding.action_tokens import ActionTokenizer
from policies.openvla.network import OpenVLA
from policies.openvla.towers import TimmBackbone, TowerSizes

DINOV2 = TowerSizes(
    embed_dim=1024,
    depth=24,
    num_heads=16,
    mlp_ratio=4,
    patch_size=14,
    img_size=224,
    extra_tokens=5,
    layer_scale=True,
    attention_pool=False,
    # ImageNet's statistics.
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
)
SIGLIP = TowerSizes(
    embed_dim=1152,
    depth=27,
    num_heads=16,
    mlp_ratio=3.7362,
    patch_size=14,
    img_size=224,
    extra_tokens=0,
    layer_scale=False,
    attention_pool=True,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
)
TOWERS = {
    "vit_large_patch14_reg4_dinov2.lvd142m": DINOV2,
    "vit_so400m_patch14_siglip_224": SIGLIP,
    "vit_so400m_patch14_siglip_384": SIGLIP,
}
"""timm's name in config.json -> the tower; config.json says the image size."""
RESIZABLE = ("embed_dim", "depth", "num_heads", "mlp_ratio", "patch_size", "img_size")
"""timm's arguments by which a tower may differ from its name: `timm_create_model_calls` in config.json, which
published checkpoints lack, has them as [name, arguments] of each tower."""
NO_MATTER = ("pretrained", "num_classes", "act_layer")
"""timm's arguments that change no patch feature (`act_layer` is looked at in `timm_override_act_layers`)."""
LLAMA_2_7B: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}
"""What a text_config means where it is silent; published ones name little more than their vocabulary."""

KINDS = {Mapping: "an object", list: "a list", int: "a whole number", bool: "true or false"}


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenVLALayout:
    """A network of one camera and no proprioception, as config.json describes it."""

    towers: tuple[TowerSizes, ...]
    text: Mapping[str, Any]
    """Arguments of LlamaConfig."""
    vocab_size: int
    """Text and action ids; the network's embedding has rows for padding behind them."""
    bins: int
    """Action ids, the last of the vocabulary."""
    bos_id: int
    pad_id: int

    @property
    def actions(self) -> ActionTokenizer:
        return ActionTokenizer(vocab_size=self.vocab_size, bins=self.bins, exact_ends=False)

    def empty(self) -> OpenVLA:
        """The network on torch's meta device: names and shapes, no memory."""
        text = dict(self.text)
        theta = text.pop("rope_theta")
        config = LlamaConfig(
            **text,
            rope_parameters={"rope_type": "default", "rope_theta": theta},
            bos_token_id=self.bos_id,
            pad_token_id=self.pad_id,
            tie_word_embeddings=False,
        )
        with torch.device("meta"):
            return OpenVLA(
                vision_backbone=TimmBackbone(self.towers),
                language_model=LlamaForCausalLM(config),
                action_first_id=self.actions.first_id,
                action_stop_id=self.actions.stop_id,
                cameras=1,
                proprioception=False,
            )

    def allocate(self, *, device: torch.device, dtype: torch.dtype) -> OpenVLA:
        """The network with memory of its own, nothing in it yet but what is computed from sizes."""
        network = self.empty().to(dtype).to_empty(device=device)
        # Frequencies are no weights: no file has them, and they stay float32.
        network.language_model.model.rotary_emb = LlamaRotaryEmbedding(network.language_model.config).to(
            device
        )
        return network.eval()


def openvla_layout(config: Mapping[str, Any], *, where: str) -> OpenVLALayout:
    """Read a checkpoint's config.json. Raises ValueError in one line, beginning with `where`, for what is missing or
    is not OpenVLA's."""
    try:
        kind = config.get("model_type")
        if kind != "openvla":
            raise ValueError(f"model_type is {kind!r}, expected 'openvla'")
        text = _text(_entry(config, "text_config", Mapping))
        padding = _entry(config, "pad_to_multiple_of", int)
        layout = OpenVLALayout(
            towers=_towers(config),
            text=text,
            vocab_size=text["vocab_size"] - padding,
            bins=_entry(config, "n_action_bins", int),
            bos_id=_entry({"bos_token_id": 1, **config["text_config"]}, "bos_token_id", int),
            pad_id=_entry(config, "pad_token_id", int),
        )
        for name, token in (("pad_token_id", layout.pad_id), ("bos_token_id", layout.bos_id)):
            if not 0 <= token < text["vocab_size"]:
                raise ValueError(f"{name} {token} is outside the vocabulary of {text['vocab_size']}")
        if padding < 0:
            raise ValueError(f"pad_to_multiple_of is {padding}, expected 0 or more")
        # Sizes that do not fit each other are found here, not halfway through the files.
        layout.empty()
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return layout


def _entry(config: Mapping[str, Any], name: str, kind: type) -> Any:
    value = config.get(name)
    if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
        raise ValueError(f"{name} is {value!r}, expected {KINDS[kind]}")
    return value


def _text(given: Mapping[str, Any]) -> dict[str, Any]:
    kind = given.get("model_type", "llama")
    if kind != "llama":
        raise ValueError(f"text_config.model_type is {kind!r}, expected 'llama'")
    if given.get("rope_scaling") is not None:
        raise ValueError(f"text_config.rope_scaling is {given['rope_scaling']!r}, expected none")
    text = {name: given.get(name, default) for name, default in LLAMA_2_7B.items()}
    text["num_key_value_heads"] = text["num_key_value_heads"] or text["num_attention_heads"]
    text["vocab_size"] = given.get("vocab_size")
    for name, value in text.items():
        default = LLAMA_2_7B.get(name) or 1
        kind = (int, float) if isinstance(default, float) else type(default)
        if not isinstance(value, kind) or isinstance(value, bool) or (name != "hidden_act" and value <= 0):
            raise ValueError(f"text_config.{name} is {value!r}, expected such as {default!r}")
    if text["hidden_act"] not in ACT2FN:
        raise ValueError(
            f"text_config.hidden_act is {text['hidden_act']!r}, expected one that transformers knows"
        )
    width, heads, groups = text["hidden_size"], text["num_attention_heads"], text["num_key_value_heads"]
    if width % heads or heads % groups:
        raise ValueError(
            f"text_config: hidden_size {width}, num_attention_heads {heads} and num_key_value_heads {groups} "
            "must each be a multiple of the next"
        )
    return text


def _calls(config: Mapping[str, Any], names: list[Any]) -> list[Any]:
    """Of each tower its name and the arguments that it was made with."""
    layers = config.get("timm_override_act_layers") or []
    for layer in layers if isinstance(layers, list) else [layers]:
        if layer is not None:
            raise ValueError(f"timm_override_act_layers has {layer!r}; only towers with GELU are read")
    calls = config.get("timm_create_model_calls") or [[name, {}] for name in names]
    if not isinstance(calls, list) or not all(_is_call(call) for call in calls):
        raise ValueError(f"timm_create_model_calls is {calls!r}, expected pairs of a name and its arguments")
    if [call[0] for call in calls] != names:
        raise ValueError(f"timm_create_model_calls are of {[call[0] for call in calls]}, expected of {names}")
    return calls


def _is_call(call: Any) -> bool:
    return isinstance(call, list) and len(call) == 2 and isinstance(call[1], Mapping)


def _towers(config: Mapping[str, Any]) -> tuple[TowerSizes, ...]:
    names, images = _entry(config, "timm_model_ids", list), _entry(config, "image_sizes", list)
    fused = _entry(config, "use_fused_vision_backbone", bool)
    if len(names) != len(images) or len(names) != 1 + fused:
        raise ValueError(
            f"timm_model_ids {names} and image_sizes {images} need {1 + fused} entries each "
            f"(use_fused_vision_backbone is {fused})"
        )
    calls = _calls(config, names)
    towers = []
    for name, image, (_, arguments) in zip(names, images, calls, strict=True):
        if name not in TOWERS:
            near = difflib.get_close_matches(str(name), TOWERS, n=1, cutoff=0)[0]
            raise ValueError(f"timm_model_ids has {name!r}, which cannot be read; nearest known is {near!r}")
        for argument in arguments:
            if argument not in (*RESIZABLE, *NO_MATTER):
                raise ValueError(f"timm_create_model_calls of {name!r} has {argument!r}; known: {RESIZABLE}")
        sizes = {"img_size": image, **{key: arguments[key] for key in RESIZABLE if key in arguments}}
        for key, value in sizes.items():
            if not isinstance(value, int if key != "mlp_ratio" else int | float) or value <= 0:
                raise ValueError(f"{key} of {name!r} is {value!r}, expected a positive number")
        towers.append(replace(TOWERS[name], **sizes))
    return tuple(towers)
