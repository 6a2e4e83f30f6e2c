"""A small policy, what it would have recorded, and demonstrations: what learners learn from."""

from __future__ import annotations

import numpy as np
import torch

from configs.policy import DecoderPart, PolicyPart, VisionPart
from configs.preference import AdapterPart
from policies.make import make_policy
from policies.protocol import Policy
from trajectories.records import (
    ActionSample,
    Cell,
    Decision,
    Observation,
    Outcome,
    PreferencePair,
    Trajectory,
)

SIZE, CHUNK = 16, 2
TOKENS = CHUNK * 7
PART = PolicyPart(
    vision=VisionPart(width=16, layers=1, heads=2),
    decoder=DecoderPart(width=32, layers=2, heads=2, mlp=48),
    bins=5,
    chunk=CHUNK,
)
ADAPTER = AdapterPart(rank=4, alpha=8)
TASKS = ("put the bowl on the plate", "open the middle drawer of the cabinet")


def new_policy() -> Policy:
    """As opinionated as a trained one, however fresh weights are drawn."""
    policy = make_policy(PART, image_size=SIZE, seed=0, device=torch.device("cpu"))
    with torch.no_grad():
        head = policy.module.get_parameter("language_model.lm_head.weight")
        head.normal_(std=0.4, generator=torch.Generator().manual_seed(0))
    return policy


def observations(count: int, seed: int) -> list[Observation]:
    rng = np.random.default_rng(seed)
    return [
        Observation(
            agentview=rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8),
            wrist=rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8),
            proprio=rng.standard_normal(8).astype(np.float32),
            instruction=TASKS[seed % 2],
        )
        for _ in range(count)
    ]


def episode(
    policy: Policy, *, seed: int, outcome: Outcome, init_state: int = 0, length: int = 6
) -> Trajectory:
    """What the policy would have recorded: its own samples and log-probs, on random observations."""
    seen = observations(length, seed)
    samples = policy.act(seen, seeds=[1000 * seed + k for k in range(length)], temperature=1.0)
    return Trajectory(
        cell=Cell(suite="libero_goal", task_id=0, init_state=init_state, seed=seed),
        decisions=tuple(
            Decision(observation=o, sample=s, executed=CHUNK) for o, s in zip(seen, samples, strict=True)
        ),
        outcome=outcome,
        env_steps=length * CHUNK,
        policy_version=0,
        policy_hash="start",
    )


def pairs_of(policy: Policy, count: int, length: int = 6) -> list[PreferencePair]:
    return [
        PreferencePair(
            chosen=episode(policy, seed=2 * i, outcome="success", init_state=i, length=length),
            rejected=episode(policy, seed=2 * i + 1, outcome="timeout", init_state=i, length=length + i),
        )
        for i in range(count)
    ]


def demonstration(seed: int, length: int = 6) -> Trajectory:
    rng = np.random.default_rng(seed)
    return Trajectory(
        cell=Cell(suite="libero_goal", task_id=0, init_state=0, seed=seed),
        decisions=tuple(
            Decision(
                observation=seen,
                sample=ActionSample(
                    actions=rng.uniform(-1, 1, (CHUNK, 7)).astype(np.float32),
                    model_chunk=np.zeros(0, np.int64),
                    logps=np.zeros(0, np.float32),
                ),
                executed=CHUNK,
            )
            for seen in observations(length, seed)
        ),
        outcome="success",
        env_steps=length * CHUNK,
        policy_version=-1,
        policy_hash="expert",
    )
