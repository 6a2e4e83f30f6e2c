"""Time and memory of acting, scoring and one preference step at published size, on one CUDA device.

    python -m benchmarks.real_size [--models openvla,pi05] [--batches 1,8] [--micro-batch 8] [--output FILE]

Weights are random, which changes neither time nor memory; they are made on the device, so no checkpoint is needed.
Each model's device memory is freed before the next. Peak memory is torch's own count of what it had allocated.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console

from benchmarks.fingerprint import software_fingerprint, write_json
from benchmarks.published_sizes import openvla_7b
from configs.policy import FlowPart
from configs.schema import AdapterPart, GuardPart, PreferencePart
from learners.preference import PreferenceLearner
from policies.autoregressive import AutoregressivePolicy
from policies.decoding.modules import ModuleDecoder
from policies.encoding.prompts import PromptTokenizer
from policies.flow import FlowPolicy
from policies.openvla.actions import ActionStatistics, OpenVLAActions
from policies.openvla.images import openvla_view
from policies.openvla.inputs import OpenVLAInputs
from policies.openvla.layout import OpenVLALayout
from policies.pi0.inputs import PlainInputs
from policies.pi0.network import Pi0Network
from policies.pi0.sizes import PI05, Pi0Config
from policies.protocol import Policy
from trajectories.records import Cell, Decision, Observation, Outcome, PreferencePair, Trajectory

PROMPT = "pick up the alphabet soup and place it in the basket"


class WordPrompts:
    """This project's own words, whose ids every published vocabulary has room for; only their number costs."""

    def __init__(self) -> None:
        self._words = PromptTokenizer()

    def stack(self, instructions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        return self._words.stack(instructions)


@torch.no_grad()
def draw_weights(network: torch.nn.Module) -> None:
    """Small normal weights, so that nothing overflows and no two logits are the same."""
    for parameter in network.parameters():
        parameter.normal_(std=0.02)


def openvla(layout: OpenVLALayout, device: torch.device, dtype: torch.dtype) -> Policy:
    """A token policy of the layout's size with random weights."""
    network = layout.allocate(device=device, dtype=dtype)
    draw_weights(network)
    unit = ActionStatistics(q01=-np.ones(7), q99=np.ones(7), mask=np.array([True] * 6 + [False]))
    size = layout.towers[0].img_size
    inputs = OpenVLAInputs(
        prompts=WordPrompts(),
        actions=OpenVLAActions(layout.actions, unit),
        chunk=1,
        image_size=size,
        view=partial(openvla_view, size=size),
    )
    return AutoregressivePolicy(network, inputs=inputs, decoder=ModuleDecoder)


def pi05(config: Pi0Config, device: torch.device, dtype: torch.dtype) -> Policy:
    """A flow policy of the configuration's size with random weights, deciding five actions at once."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            network = Pi0Network(config).eval()
    finally:
        torch.set_default_dtype(default)
    draw_weights(network)
    inputs = PlainInputs(
        PromptTokenizer(), image_size=config.vision.image, adaptive=True, state_in_prompt=True
    )
    return FlowPolicy(network, inputs=inputs, part=FlowPart(), chunk=5)


def observations(count: int, size: int) -> list[Observation]:
    """Noise for images: what a picture shows does not change what it costs."""
    rng = np.random.default_rng(0)
    return [
        Observation(
            agentview=rng.integers(0, 256, (size, size, 3), dtype=np.uint8),
            wrist=rng.integers(0, 256, (size, size, 3), dtype=np.uint8),
            proprio=rng.normal(size=8).astype(np.float32),
            instruction=PROMPT,
        )
        for _ in range(count)
    ]


def measure(
    policy: Policy, *, image_size: int, batches: Sequence[int], micro_batch: int, repeats: int
) -> dict[str, Any]:
    """Parameters, and milliseconds and peak bytes of each of `act`, `score` and a preference step."""
    device = next(policy.module.parameters()).device
    timed = partial(_timed, device=device, repeats=repeats)
    found: dict[str, Any] = {"parameters": sum(p.numel() for p in policy.module.parameters())}
    for count in batches:
        seen = observations(count, image_size)
        act = partial(policy.act, seen, seeds=range(count), temperature=1.0)
        chunks = [sample.model_chunk for sample in act()]
        found[f"act_{count}"] = timed(act)
        batch = policy.batch(seen, chunks)
        with torch.no_grad():
            found[f"score_{count}"] = timed(partial(policy.score, batch, noise_keys=torch.arange(count)))
    pairs = [
        PreferencePair(
            chosen=_episode(policy, 0, "success", image_size),
            rejected=_episode(policy, 1, "timeout", image_size),
        )
    ]
    learner = PreferenceLearner(
        policy,
        adapter=AdapterPart(method="lora", rank=32, alpha=64),
        preference=PreferencePart(
            reference="start", credit="uniform", demo_weight=0, steps=1, micro_batch=micro_batch
        ),
        guard=GuardPart(chosen_drop=1e9),
        base_hash="",
        seed=0,
    )
    found["preference_step"] = timed(partial(learner.update, pairs, [pairs[0].chosen], []))
    return found


def _episode(policy: Policy, seed: int, outcome: Outcome, size: int) -> Trajectory:
    seen = observations(4, size)
    samples = policy.act(seen, seeds=range(4), temperature=1.0)
    return Trajectory(
        cell=Cell(suite="libero_object", task_id=0, init_state=0, seed=seed),
        decisions=tuple(
            Decision(observation=o, sample=s, executed=1) for o, s in zip(seen, samples, strict=True)
        ),
        outcome=outcome,
        env_steps=4,
        policy_version=0,
        policy_hash="random",
    )


def _timed(task: Callable[[], object], *, device: torch.device, repeats: int) -> dict[str, float]:
    """Median milliseconds after one round of warming up, and the most device memory in use; 0 off CUDA."""
    cuda = device.type == "cuda"
    task()
    durations = []
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(repeats):
        started = time.perf_counter()
        task()
        if cuda:
            torch.cuda.synchronize(device)
        durations.append(time.perf_counter() - started)
    peak = torch.cuda.max_memory_allocated(device) if cuda else 0
    return {"ms": round(1000 * statistics.median(durations), 2), "peak_bytes": float(peak)}


@contextmanager
def _freed() -> Iterator[None]:
    yield
    gc.collect()
    torch.cuda.empty_cache()


def main(
    models: Annotated[str, typer.Option(help="openvla, pi05 or both, separated by commas")] = "openvla,pi05",
    batches: Annotated[str, typer.Option(help="batch sizes, separated by commas")] = "1,8",
    micro_batch: Annotated[int, typer.Option(help="decisions in one pass of the step", min=1)] = 8,
    repeats: Annotated[int, typer.Option(help="timed runs of each", min=1)] = 5,
    output: Annotated[Path | None, typer.Option(help="write the result as JSON")] = None,
) -> None:
    """Measure, print JSON, and write it when asked. Without a CUDA device: one line, and exit code 2."""
    if not torch.cuda.is_available():
        typer.echo("pairloom: benchmarks.real_size needs a CUDA device, and torch finds none here", err=True)
        raise typer.Exit(2)
    device, dtype = torch.device("cuda"), torch.bfloat16
    sizes = [int(size) for size in batches.split(",")]
    build: dict[str, Callable[[], Policy]] = {
        "openvla": lambda: openvla(openvla_7b(), device, dtype),
        "pi05": lambda: pi05(PI05, device, dtype),
    }
    result: dict[str, Any] = {"dtype": "bfloat16", "micro_batch": micro_batch}
    for name in models.split(","):
        if name not in build:
            typer.echo(f"pairloom: models must be openvla or pi05, got {name!r}", err=True)
            raise typer.Exit(2)
        with _freed():
            result[name] = measure(
                build[name](),
                image_size=PI05.vision.image,
                batches=sizes,
                micro_batch=micro_batch,
                repeats=repeats,
            )
    result["fingerprint"] = software_fingerprint()
    Console().print_json(data=result)
    if output is not None:
        write_json(output, result)


if __name__ == "__main__":
    typer.run(main)
