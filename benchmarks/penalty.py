"""What holding training apart from a vector costs, and what an auxiliary objective does: time and memory of a step.

    python -m benchmarks.penalty [--repeats 20] [--threads 1] [--output FILE]

A step is one of the supervised start (every weight trained, 32 decisions) of the tiny policy, with backward pass and
AdamW; or, for `lora` and `dora`, one of an update's steps after its first. CapVector
(arXiv 2605.10903) reports +0.002 % of arithmetic and +0.8 % of memory for the penalty. All variants alternate in one
run, so that a busy machine slows all of them; medians are reported, of wall time and of processor time, and each
variant's over that of the same step without. `kept` counts the tensors that a variant holds beside the plain step's:
the vector and the weights as they were, or the head and its targets (DoRA's products of rows, some kB, left out).
`peak` is the greatest memory that building a variant and taking steps needs, in a process of its own.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.fingerprint import software_fingerprint, write_json
from benchmarks.learner import IMAGE_SIZE, synthetic_trajectory
from benchmarks.processes import peak_bytes
from configs.policy import PolicyPart
from configs.preference import AdapterPart, GuardPart, PreferencePart
from configs.supervised import CapabilityPart, SupervisedPart
from learners.orthogonality import FullPenalty
from learners.preference import PreferenceLearner
from learners.supervised import SupervisedLearner
from policies.make import make_policy
from policies.protocol import Policy
from policies.weights.adapters import adapted_layers
from policies.weights.snapshots import state_tensors
from trajectories.records import PreferencePair, Trajectory

VARIANTS = {
    "plain": "plain",
    "elementwise": "plain",
    "cosine": "plain",
    "spatial": "plain",
    "future": "plain",
    "lora": "lora",
    "lora-cosine": "lora",
    "dora": "dora",
    "dora-cosine": "dora",
}
"""What is measured, and what it is compared with."""
DEMOS, PAIRS = 4, 4
UPDATE_STEPS = 5
PEAK_STEPS = 3


class Supervised:
    """One policy and its supervised learner, ready to take steps."""

    def __init__(self, name: str, part: PolicyPart, steps: int) -> None:
        policy = make_policy(part, image_size=IMAGE_SIZE, seed=0, device=torch.device("cpu"))
        weights = state_tensors(policy.module)
        self.kept = 0
        penalty = None
        if name in ("elementwise", "cosine"):
            capability = CapabilityPart.model_validate({"vector": "drawn", "penalty": name})
            penalty = FullPenalty(policy.module, capability, vector_of(policy))
            self.kept = 2 * sum(w.nbytes for w in weights.values())
        auxiliary = name if name in ("spatial", "future") else "none"
        demos = [_with_depth(synthetic_trajectory(policy, part, seed, "success")) for seed in range(DEMOS)]
        self._learner = SupervisedLearner(
            policy, SupervisedPart(steps=steps, auxiliary=auxiliary), seed=0, demos=demos, penalty=penalty
        )
        if auxiliary != "none":
            channels = {"spatial": 1, "future": 3}[auxiliary]
            pixels = sum(len(demo.decisions) for demo in demos) * IMAGE_SIZE**2
            # The head with its gradients and AdamW's moments, and the targets; float32.
            self.kept = 4 * (pixels * channels + 4 * self._learner.auxiliary_parameters)

    def step(self) -> tuple[float, float]:
        """Seconds of one optimizer step, by the clock and of processor time."""
        started, started_cpu = time.perf_counter(), time.process_time()
        self._learner.step()
        return time.perf_counter() - started, time.process_time() - started_cpu


class Adapter:
    """One policy and its preference learner."""

    def __init__(self, name: str, part: PolicyPart) -> None:
        policy = make_policy(part, image_size=IMAGE_SIZE, seed=0, device=torch.device("cpu"))
        vector = vector_of(policy) if name.endswith("-cosine") else None
        self._learner = PreferenceLearner(
            policy,
            adapter=AdapterPart.model_validate({"method": name.partition("-")[0]}),
            preference=PreferencePart(credit="uniform", demo_weight=0, steps=UPDATE_STEPS),
            guard=GuardPart(chosen_drop=1e9),
            base_hash="",
            seed=0,
            capability=CapabilityPart(vector="drawn", penalty="cosine"),
            vector=vector,
        )
        sides = [
            synthetic_trajectory(policy, part, seed, "timeout" if seed % 2 else "success")
            for seed in range(2 * PAIRS)
        ]
        self._pairs = [
            PreferencePair(chosen=chosen, rejected=rejected)
            for chosen, rejected in zip(sides[::2], sides[1::2], strict=True)
        ]
        adapted = {f"{layer}.weight" for layer, _ in adapted_layers(policy.module)}
        self.kept = sum(w.nbytes for n, w in (vector or {}).items() if n in adapted)

    def step(self) -> tuple[float, float]:
        """Seconds of one optimizer step, by the clock and of processor time; the mean of an update's, but the first."""
        clock: list[tuple[float, float]] = []
        self._learner.update(
            self._pairs,
            [pair.chosen for pair in self._pairs],
            [],
            on_step=lambda *_: clock.append((time.perf_counter(), time.process_time())),
        )
        # From the end of one step to the end of the next: what an update does once, before its first, is no step's.
        (first, first_cpu), (last, last_cpu) = clock[0], clock[-1]
        return (last - first) / (len(clock) - 1), (last_cpu - first_cpu) / (len(clock) - 1)


def vector_of(policy: Policy) -> dict[str, np.ndarray]:
    """A vector of random numbers."""
    rng = np.random.default_rng(0)
    weights = state_tensors(policy.module)
    return {name: rng.normal(0, 0.01, array.shape).astype(np.float32) for name, array in weights.items()}


def _with_depth(demo: Trajectory) -> Trajectory:
    decisions = tuple(
        replace(
            d, observation=replace(d.observation, depth=d.observation.agentview[..., 0].astype(np.float32))
        )
        for d in demo.decisions
    )
    return replace(demo, decisions=decisions)


def make(name: str, part: PolicyPart, steps: int) -> Supervised | Adapter:
    return Supervised(name, part, steps) if VARIANTS[name] == "plain" else Adapter(name, part)


def measure(part: PolicyPart, repeats: int) -> list[dict[str, Any]]:
    """One row per variant, all alternating after a step of warming up."""
    variants = {name: make(name, part, repeats + 1) for name in VARIANTS}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in VARIANTS}
    for repeat in track(range(repeats + 1), description="steps"):
        for name, variant in variants.items():
            duration = variant.step()
            if repeat:
                seconds[name].append(duration)
    rows = []
    for name, values in seconds.items():
        # Of one turn the variant and the step without saw the same machine: the ratio is taken turn by turn.
        over = [cpu / without for (_, cpu), (_, without) in zip(values, seconds[VARIANTS[name]], strict=True)]
        rows.append(
            {
                "variant": name,
                "step_ms": 1000 * statistics.median(wall for wall, _ in values),
                "step_cpu_ms": 1000 * statistics.median(cpu for _, cpu in values),
                "over": VARIANTS[name],
                "times": statistics.median(over),
                "kept_mib": variants[name].kept / 2**20,
                "peak_mib": alone(name, part) / 2**20,
            }
        )
    return rows


def alone(name: str, part: PolicyPart) -> int:
    """Bytes that a variant takes at most, in a process of its own."""
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(peak, (name, part))


def peak(name: str, part: PolicyPart) -> int:
    """Bytes that a variant takes at most beyond what this process has taken before."""
    torch.set_num_threads(1)
    before = peak_bytes()
    variant = make(name, part, PEAK_STEPS)
    for _ in range(PEAK_STEPS):
        variant.step()
    return peak_bytes() - before


def main(
    repeats: Annotated[int, typer.Option(help="timed steps of each variant", min=1)] = 20,
    threads: Annotated[int, typer.Option(help="torch threads", min=1)] = 1,
    output: Annotated[Path | None, typer.Option(help="write the result as JSON")] = None,
) -> None:
    """Measure, print a table, and write JSON when asked."""
    torch.set_num_threads(threads)
    part = PolicyPart(bins=21)
    rows = measure(part, repeats)
    table = Table(title=f"one optimizer step, {threads} thread(s)")
    for column in rows[0]:
        table.add_column(column.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(*(value if isinstance(value, str) else f"{value:.3f}" for value in row.values()))
    Console().print(table)
    if output is not None:
        write_json(output, {"policy": part.model_dump(), "rows": rows, "fingerprint": software_fingerprint()})


if __name__ == "__main__":
    typer.run(main)
