"""A tiny OpenVLA checkpoint with random weights, laid out as on the Hugging Face Hub, and observations for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import WordLevel

from policies.encoding.prompts import WORDS
from policies.openvla.layout import openvla_layout
from policies.openvla.prompts import SPACE, SPACE_ID
from trajectories.records import Observation

TEXT_IDS = 32000
SIDE = 28
"""Rows and columns of its images, two patches each."""
DINOV2, SIGLIP = "vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"
KEY = "libero_object_no_noops"
STATISTICS = {
    KEY: {
        "action": {
            "q01": [-0.5, -0.75, -0.9, -0.1, -0.15, -0.2, 0.0],
            "q99": [0.6, 0.8, 0.9, 0.15, 0.1, 0.3, 1.0],
            "mask": [True] * 6 + [False],
        }
    },
    "bridge_orig": {"action": {"q01": [-0.03] * 6 + [0.0], "q99": [0.04] * 6 + [1.0]}},
}
CONFIG: dict[str, Any] = {
    "model_type": "openvla",
    "timm_model_ids": [DINOV2, SIGLIP],
    "timm_override_act_layers": [None, None],
    "image_sizes": [SIDE, SIDE],
    "use_fused_vision_backbone": True,
    "timm_create_model_calls": [
        [DINOV2, {"pretrained": False, "embed_dim": 16, "depth": 3, "num_heads": 2}],
        [SIGLIP, {"pretrained": False, "embed_dim": 24, "depth": 3, "num_heads": 4}],
    ],
    "text_config": {
        "model_type": "llama",
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": TEXT_IDS + 64,
    },
    "pad_to_multiple_of": 64,
    "pad_token_id": TEXT_IDS,
    "n_action_bins": 256,
    "norm_stats": STATISTICS,
}


def random_tensors(config: dict[str, Any] = CONFIG, *, seed: int = 0) -> dict[str, torch.Tensor]:
    """Every tensor of the layout, from one seed, large enough that each matters."""
    generator = torch.Generator().manual_seed(seed)
    empty = openvla_layout(config, where="test").empty().state_dict()
    return {
        name: torch.randn(tensor.shape, generator=generator) * (0.3 if tensor.ndim > 1 else 1)
        for name, tensor in empty.items()
    }


def write_tokenizer(file: Path, *, size: int = TEXT_IDS, space: str = SPACE) -> None:
    """Whole words in place of Llama 2's pieces, and its lone space."""
    tokens = ["<unk>", "<s>", "</s>", *WORDS.read_text(encoding="utf-8").split()]
    tokens += [f"<{i}>" for i in range(len(tokens), size)]
    tokens[SPACE_ID] = space
    tokenizer = Tokenizer(WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<PAD>"])
    tokenizer.save(str(file))


def write_weights(folder: Path, tensors: dict[str, torch.Tensor], *, shards: int) -> None:
    """One model.safetensors, or as many shards with their index."""
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return
    names = sorted(tensors)
    places = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        own = names[shard::shards]
        save_file({name: tensors[name] for name in own}, folder / file)
        places |= dict.fromkeys(own, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def write_checkpoint(
    folder: Path,
    *,
    config: dict[str, Any] | None = None,
    tensors: dict[str, torch.Tensor] | None = None,
    shards: int = 3,
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    write_tokenizer(folder / "tokenizer.json")
    write_weights(folder, random_tensors() if tensors is None else tensors, shards=shards)
    return folder


def observations(count: int) -> list[Observation]:
    """Random ones of 48 x 48 pixels, whose prompts differ in length."""
    rng = np.random.default_rng(0)
    instructions = (
        "open the middle drawer of the cabinet",
        "pick up the milk",
        "pick up the black bowl",
    )
    return [
        Observation(
            agentview=rng.integers(0, 256, (48, 48, 3), dtype=np.uint8),
            wrist=rng.integers(0, 256, (48, 48, 3), dtype=np.uint8),
            proprio=rng.normal(size=8).astype(np.float32),
            instruction=instructions[i % 3],
        )
        for i in range(count)
    ]
