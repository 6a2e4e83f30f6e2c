"""Pairs per second of DPO on the token policy: LoRA and DoRA, cached and recomputed references, and the forward pass.

    python -m benchmarks.learner [--repeats 10] [--threads 1] [--bins 21] [--output FILE]

One step is some pairs of 25-decision trajectories, some decisions of each side, with backward pass and AdamW.
`cached`: reference log-probs are those recorded at rollout, or computed once. `recomputed`: the adapter-off policy
scores the same decisions again at each step, as trainers without a cache do. `merged` is the forward pass of the
learner (weights merged once a step), `peft` the adapter layers' own. All variants alternate in one run, so that a
busy machine slows all of them; medians are reported, of wall time and of processor time.
"""

from __future__ import annotations

import itertools
import statistics
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.fingerprint import software_fingerprint, write_json
from configs.policy import PolicyPart
from configs.preference import AdapterPart, PreferencePart
from learners.decisions import DecisionPool
from learners.terms import Draw, Side, accumulate_gradients
from policies.make import make_policy
from policies.protocol import Policy
from policies.weights import adapters
from trajectories.records import ActionSample, Cell, Decision, Observation, Outcome, Trajectory

IMAGE_SIZE = 64
DECISIONS = 25
INSTRUCTION = "pick up the alphabet soup and place it in the basket"
Method = Literal["lora", "dora"]


def synthetic_trajectory(policy: Policy, part: PolicyPart, seed: int, outcome: Outcome) -> Trajectory:
    """Noise for images and random chunks: what they show does not change what they cost."""
    rng = np.random.default_rng(seed)
    decisions = []
    for _ in range(DECISIONS):
        actions = rng.uniform(-1, 1, (part.chunk, 7)).astype(np.float32)
        seen = Observation(
            agentview=rng.integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8),
            wrist=rng.integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8),
            proprio=rng.normal(size=8).astype(np.float32),
            instruction=INSTRUCTION,
        )
        chunk = policy.encode(actions)
        logps = np.full(chunk.shape, -np.log(part.bins), np.float32)
        sample = ActionSample(actions=actions, model_chunk=chunk, logps=logps)
        decisions.append(Decision(observation=seen, sample=sample, executed=part.chunk))
    return Trajectory(
        cell=Cell(suite="libero_object", task_id=0, init_state=0, seed=seed),
        decisions=tuple(decisions),
        outcome=outcome,
        env_steps=DECISIONS * part.chunk,
        policy_version=0,
        policy_hash="synthetic",
    )


class Variant:
    """One policy with its adapter, ready to take steps."""

    def __init__(self, part: PolicyPart, method: Method, preference: PreferencePart, *, merged: bool) -> None:
        self.policy = make_policy(part, image_size=IMAGE_SIZE, seed=0, device=torch.device("cpu"))
        adapters.attach(self.policy.module, AdapterPart(method=method), seed=0, decoders=self.policy.adapted)
        self._preference = preference
        self._merged = merged
        self._parameters = list(adapters.parameters(self.policy.module).values())
        self._optimizer = torch.optim.AdamW(self._parameters, lr=preference.lr, weight_decay=0.0)
        self._trajectories = [
            synthetic_trajectory(self.policy, part, seed, "success" if seed % 2 == 0 else "timeout")
            for seed in range(2 * preference.pairs_per_step)
        ]
        self._pool = DecisionPool(self.policy, start_reference=False, micro_batch=preference.micro_batch)
        self._pool.hold(self._trajectories, update=0)
        self._generator = torch.Generator().manual_seed(0)

    def step(self, *, recompute_reference: bool) -> tuple[float, float]:
        """Seconds of one optimizer step, by the clock and of processor time."""
        count = min(self._preference.decisions_per_trajectory, DECISIONS)
        sides = [
            Side(
                rows=self._pool.rows(trajectory)[
                    torch.randperm(DECISIONS, generator=self._generator)[:count]
                ],
                weights=torch.full((count,), DECISIONS / count),
            )
            for trajectory in self._trajectories
        ]
        draw = Draw(
            pairs=list(zip(sides[::2], sides[1::2], strict=True)),
            successes=torch.empty(0, dtype=torch.int64),
            demos=torch.empty(0, dtype=torch.int64),
        )
        started, started_cpu = time.perf_counter(), time.process_time()
        if recompute_reference:
            rows = torch.cat([side.rows for side in sides])
            with torch.no_grad(), adapters.disabled(self.policy.module):
                for part in rows.split(self._preference.micro_batch):
                    self._pool.score(part)
        self._optimizer.zero_grad(set_to_none=True)
        with adapters.merged_forward(self.policy.module) if self._merged else nullcontext():
            accumulate_gradients(draw, self._pool, self._preference)
        torch.nn.utils.clip_grad_norm_(self._parameters, self._preference.grad_clip)
        self._optimizer.step()
        return time.perf_counter() - started, time.process_time() - started_cpu


def measure(part: PolicyPart, preference: PreferencePart, repeats: int) -> list[dict[str, str | float]]:
    """One row per adapter, forward pass and kind of reference, all alternating after a step of warming up."""
    methods: tuple[Method, ...] = ("lora", "dora")
    keys = list(itertools.product(methods, ("merged", "peft"), ("cached", "recomputed")))
    variants = {
        (method, forward): Variant(part, method, preference, merged=forward == "merged")
        for method, forward in itertools.product(methods, ("merged", "peft"))
    }
    seconds: dict[tuple[str, str, str], list[tuple[float, float]]] = {key: [] for key in keys}
    for repeat in track(range(repeats + 1), description="steps"):
        for method, forward, reference in keys:
            duration = variants[method, forward].step(recompute_reference=reference == "recomputed")
            if repeat:
                seconds[method, forward, reference].append(duration)
    wall = {key: statistics.median(by_clock for by_clock, _ in values) for key, values in seconds.items()}
    cpu = {key: statistics.median(by_cpu for _, by_cpu in values) for key, values in seconds.items()}
    return [
        {
            "adapter": key[0],
            "forward": key[1],
            "reference": key[2],
            "step_s": wall[key],
            "step_cpu_s": cpu[key],
            "pairs_per_s": preference.pairs_per_step / wall[key],
            "pairs_per_cpu_s": preference.pairs_per_step / cpu[key],
        }
        for key in keys
    ]


def main(
    repeats: Annotated[int, typer.Option(help="timed steps of each variant", min=1)] = 10,
    threads: Annotated[int, typer.Option(help="torch threads", min=1)] = 1,
    pairs_per_step: Annotated[int, typer.Option(help="pairs per optimizer step", min=1)] = 4,
    decisions_per_trajectory: Annotated[int, typer.Option(help="decisions drawn from each side", min=1)] = 4,
    bins: Annotated[int, typer.Option(help="action bins per dimension")] = 21,
    output: Annotated[Path | None, typer.Option(help="write the result as JSON")] = None,
) -> None:
    """Measure, print a table, and write JSON when asked."""
    torch.set_num_threads(threads)
    part = PolicyPart(bins=bins)
    preference = PreferencePart(
        pairs_per_step=pairs_per_step, decisions_per_trajectory=decisions_per_trajectory
    )
    rows = measure(part, preference, repeats)
    decisions = 2 * pairs_per_step * min(decisions_per_trajectory, DECISIONS)
    table = Table(title=f"{pairs_per_step} pairs, {decisions} decisions a step, {threads} thread(s)")
    for column in rows[0]:
        table.add_column(column.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(*(value if isinstance(value, str) else f"{value:.2f}" for value in row.values()))
    Console().print(table)
    if output is not None:
        result = {
            "policy": part.model_dump(),
            "preference": preference.model_dump(),
            "image_size": IMAGE_SIZE,
            "decisions_per_step": decisions,
            "rows": rows,
            "fingerprint": software_fingerprint(),
        }
        write_json(output, result)


if __name__ == "__main__":
    typer.run(main)
