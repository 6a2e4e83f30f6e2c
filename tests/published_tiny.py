"""Tiny checkpoint folders as published ones are laid out, and what LIBERO would show of a task."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel

from configs.policy import FlowPart, PolicyPart
from policies.encoding.prompts import WORDS
from policies.pi0.checkpoint import LAYOUTS
from policies.pi0.network import Pi0Network
from policies.protocol import Policy
from tests import openvla_tiny
from tests.pi0_tiny import TINY, in_layout
from trajectories.records import Cell, Decision, Observation, Outcome, Trajectory

CPU = torch.device("cpu")
VOCAB = 1024
PI0 = replace(TINY, vocab=VOCAB, action_dim=9, state_dim=10, horizon=5)
HEADS = {
    "vlm_config": {
        "text_config": {"head_dim": PI0.vlm.head_dim},
        "vision_config": {"num_attention_heads": PI0.vision.heads},
    }
}
STATS: dict[str, Any] = {
    "state": {
        "mean": [0.0, 0.1, 0.9, 3.0, 0.0, 0.1, 0.02, -0.02],
        "std": [0.1, 0.2, 0.3, 0.2, 0.3, 0.2, 0.01, 0.01],
        "q01": [-0.4, -0.3, 0.0, 1.5, -1.0, -1.0, 0.0, -0.04],
        "q99": [0.2, 0.3, 1.3, 3.6, 1.0, 1.0, 0.04, 0.0],
    },
    "actions": {
        "mean": [0.05, 0.0, -0.1, 0.0, 0.01, 0.0, -0.1],
        "std": [0.3, 0.4, 0.35, 0.05, 0.06, 0.07, 0.9],
        "q01": [-0.7, -0.8, -0.9, -0.1, -0.15, -0.2, -1.0],
        "q99": [0.9, 0.8, 0.9, 0.15, 0.2, 0.3, 1.0],
    },
}


def pi0_network(*, adaptive: bool, seed: int = 3) -> Pi0Network:
    """Random weights large enough that everything shows."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = Pi0Network(replace(PI0, adaptive=adaptive)).eval()
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                parameter.normal_(std=0.2 if "norm" in name else 0.3)
    return network


def write_pi0_tokenizer(file: Path, *, size: int = VOCAB, line_feed: int = 108) -> None:
    """Words, numbers and marks in place of PaliGemma's pieces, with its ids of BOS and the line feed."""
    words = ["Task", "State", "Action", ",", ":", ";", *map(str, range(-1, 256))]
    words += [word for word in WORDS.read_text(encoding="utf-8").split() if word not in words]
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", *words]
    tokens.insert(line_feed, "\n")
    tokens += [f"<{i}>" for i in range(len(tokens), size)]
    tokenizer = Tokenizer(WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(
        Regex(r"\n|-?\w+|[^\w\s]"), behavior="removed", invert=True
    )
    tokenizer.add_special_tokens(["<bos>"])
    tokenizer.save(str(file))


def write_pi0(folder: Path, *, adaptive: bool, layout: str = "openpi", config: Any = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = in_layout(pi0_network(adaptive=adaptive), LAYOUTS[layout])
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config or {"action_horizon": PI0.horizon, **HEADS}))
    (folder / "assets" / "libero").mkdir(parents=True)
    (folder / "assets" / "libero" / "norm_stats.json").write_text(json.dumps({"norm_stats": STATS}))
    write_pi0_tokenizer(folder / "tokenizer.json")
    return folder


def write_lerobot_stats(folder: Path, *, scaled: str = "QUANTILES") -> None:
    """STATS as LeRobot's processor keeps them."""
    names = {"state": "observation.state", "actions": "action"}
    tensors = {f"{names[n]}.{key}": torch.tensor(v) for n, s in STATS.items() for key, v in s.items()}
    file = "policy_preprocessor_step_2_normalizer_processor.safetensors"
    save_file(tensors | {"observation.state.count": torch.tensor([100])}, folder / file)
    config = {"eps": 1e-8, "norm_map": {"VISUAL": "IDENTITY", "STATE": scaled, "ACTION": scaled}}
    steps = [
        {"registry_name": "to_batch_processor", "config": {}},
        {"registry_name": "normalizer_processor", "config": config, "state_file": file},
    ]
    (folder / "policy_preprocessor.json").write_text(
        json.dumps({"name": "policy_preprocessor", "steps": steps})
    )


def parts(root: Path) -> dict[str, PolicyPart]:
    """A policy part of each kind of checkpoint, in folders written below `root`."""
    openvla = str(openvla_tiny.write_checkpoint(root / "openvla"))
    key = "libero_object_no_noops"
    pi0, pi05 = (str(write_pi0(root / name, adaptive=name == "pi05")) for name in ("pi0", "pi05"))
    return {
        "openvla": PolicyPart(checkpoint=openvla, unnorm_key=key, chunk=1),
        "pi0": PolicyPart(paradigm="flow", checkpoint=pi0, chunk=3, flow=FlowPart(version="pi0", steps=4)),
        "pi05": PolicyPart(paradigm="flow", checkpoint=pi05, chunk=3, flow=FlowPart(steps=4)),
        "diffusion": PolicyPart(paradigm="diffusion", checkpoint=openvla, unnorm_key=key, chunk=8),
    }


def observations(count: int, *, size: int = 64, seed: int = 0) -> list[Observation]:
    """Random ones near the poses that the statistics are of, with prompts of differing length."""
    rng = np.random.default_rng(seed)
    words = ["pick up the milk", "pick up the alphabet soup and place it in the basket", "open the drawer"]
    state = STATS["state"]
    return [
        Observation(
            agentview=rng.integers(0, 256, (size, size, 3), dtype=np.uint8),
            wrist=rng.integers(0, 256, (size, size, 3), dtype=np.uint8),
            proprio=rng.uniform(state["q01"], state["q99"]).astype(np.float32),
            instruction=words[i % len(words)],
        )
        for i in range(count)
    ]


def episode(policy: Policy, *, seed: int, outcome: Outcome, length: int = 3) -> Trajectory:
    """What the policy would have recorded: its own samples, on random observations."""
    seen = observations(length, seed=seed)
    samples = policy.act(seen, seeds=[100 * seed + k for k in range(length)], temperature=1.0)
    return Trajectory(
        cell=Cell(suite="libero_object", task_id=0, init_state=seed // 2, seed=seed),
        decisions=tuple(
            Decision(observation=o, sample=s, executed=len(s.actions))
            for o, s in zip(seen, samples, strict=True)
        ),
        outcome=outcome,
        env_steps=length,
        policy_version=0,
        policy_hash="start",
    )
