"""A small policy of every paradigm, and observations for it."""

from __future__ import annotations

import numpy as np
import torch

from configs.policy import DecoderPart, DiffusionPart, FlowPart, PolicyPart, VisionPart
from policies.make import make_policy
from policies.protocol import Policy
from trajectories.records import Observation

SIZE = 32
TINY = {
    "vision": VisionPart(width=16, layers=2, heads=2, mlp=32),
    "decoder": DecoderPart(width=16, layers=2, heads=2, mlp=32),
    "chunk": 2,
}
PARADIGMS = {
    "autoregressive": PolicyPart(paradigm="autoregressive", bins=7, **TINY),
    "parallel": PolicyPart(paradigm="autoregressive", decoding="parallel", bins=7, **TINY),
    "pi0": PolicyPart(paradigm="flow", flow=FlowPart(version="pi0", expert_width=16, expert_mlp=32), **TINY),
    "pi0.5": PolicyPart(paradigm="flow", flow=FlowPart(expert_width=16, expert_mlp=32), **TINY),
    "diffusion": PolicyPart(paradigm="diffusion", bins=7, diffusion=DiffusionPart(iterations=4), **TINY),
}
SURROGATES = [name for name in PARADIGMS if name not in ("autoregressive", "parallel")]


def new(name: str, seed: int = 0, device: torch.device | None = None) -> Policy:
    """A random policy, the same on every device. pi-0.5's gates, which begin at zero and let nothing through, are
    opened."""
    policy = make_policy(PARADIGMS[name], image_size=SIZE, seed=seed, device=device or torch.device("cpu"))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter_name, parameter in policy.module.named_parameters():
            if "norm.dense." in parameter_name:
                drawn = torch.empty(parameter.shape).normal_(std=0.3, generator=generator)
                parameter.copy_(drawn)
    return policy


def observations(count: int, seed: int = 0) -> list[Observation]:
    """Random ones, whose prompts differ in length."""
    rng = np.random.default_rng(seed)
    words = ["pick up the milk", "pick up the alphabet soup and place it in the basket", "open the drawer"]
    return [
        Observation(
            agentview=rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8),
            wrist=rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8),
            proprio=rng.normal(size=8).astype(np.float32),
            instruction=words[i % len(words)],
        )
        for i in range(count)
    ]
