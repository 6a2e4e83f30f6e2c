"""Decisions per second of the token policy, and what lean decoding is worth, on one thread.

    python -m benchmarks.serving [--batches 1,4,16] [--repeats 15] [--bins 21] [--output FILE]

`decide` is a whole `act`: images, prompt and the chunk's tokens. `lean` and `plain` decode the same chunks from the
same prefixes: `plain` is transformers' own forward with its dynamic cache, token by token, as `generate` runs it less
its bookkeeping. The two alternate in one run, so that a busy machine slows both; medians are reported.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import DynamicCache

from benchmarks.fingerprint import software_fingerprint, write_json
from configs.policy import PolicyPart
from policies.autoregressive import AutoregressivePolicy
from policies.decoding.engine import decode
from policies.decoding.packed import PackedDecoder
from policies.make import make_policy
from policies.openvla.network import OpenVLA
from trajectories.records import ActionSample, Observation

IMAGE_SIZE = 64


def random_observations(count: int) -> list[Observation]:
    """Noise for images: what a picture shows does not change what it costs."""
    rng = np.random.default_rng(0)
    return [
        Observation(
            agentview=rng.integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8),
            wrist=rng.integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8),
            proprio=rng.normal(size=8).astype(np.float32),
            instruction="pick up the alphabet soup and place it in the basket",
        )
        for _ in range(count)
    ]


def plain_decode(network: OpenVLA, prefix: torch.Tensor, length: int) -> torch.Tensor:
    """Greedy chunk ids [length, B] through transformers' forward and DynamicCache, one token at a time."""
    model = network.language_model.model
    cache = DynamicCache(config=network.language_model.config)
    first_id, stop_id = network.action_first_id, network.action_stop_id
    head = network.language_model.lm_head.weight[first_id:stop_id]
    inputs, chosen = prefix, []
    for _ in range(length):
        hidden = model(inputs_embeds=inputs, past_key_values=cache, use_cache=True).last_hidden_state
        ids = F.linear(hidden[:, -1:], head).argmax(dim=-1) + first_id
        chosen.append(ids[:, 0])
        inputs = model.embed_tokens(ids)
    return torch.stack(chosen)


def lean_decode(network: OpenVLA, prefix: torch.Tensor, length: int) -> torch.Tensor:
    """The same ids, as the policy decodes them; packing the weights is part of the cost."""
    first_id, stop_id = network.action_first_id, network.action_stop_id
    decoder = PackedDecoder(network.language_model, first_id=first_id, stop_id=stop_id)
    batch, tokens, _ = prefix.shape
    noise = torch.zeros(length, batch, stop_id - first_id)
    return decode(decoder, prefix, [tokens] * batch, noise)[0] + first_id


def alternate(tasks: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Median seconds of each task, all run in turn `repeats` times after one round of warming up."""
    seconds: list[list[float]] = [[] for _ in tasks]
    for repeat in range(repeats + 1):
        for task, durations in zip(tasks, seconds, strict=True):
            started = time.perf_counter()
            task()
            if repeat:
                durations.append(time.perf_counter() - started)
    return [statistics.median(durations) for durations in seconds]


@torch.inference_mode()
def measure(policy: AutoregressivePolicy, batch: int, repeats: int) -> dict[str, float]:
    """One row of the table. Raises RuntimeError should the two ways of decoding differ."""
    network = policy.network
    observations = random_observations(batch)
    inputs = policy.batch(observations, [sample.model_chunk for sample in _act(policy, observations)])
    prefix = network.embed(inputs.prompt_BT, policy.encode_context(inputs), inputs.proprio_BP)
    length = policy.tokens
    if not torch.equal(lean_decode(network, prefix, length), plain_decode(network, prefix, length)):
        raise RuntimeError(f"lean and plain decoding chose different tokens at batch {batch}")
    decide, lean, plain = alternate(
        [
            lambda: _act(policy, observations),
            lambda: lean_decode(network, prefix, length),
            lambda: plain_decode(network, prefix, length),
        ],
        repeats,
    )
    return {
        "batch": batch,
        "decide_ms": 1000 * decide,
        "decisions_per_s": batch / decide,
        "lean_decode_ms": 1000 * lean,
        "plain_decode_ms": 1000 * plain,
        "plain_over_lean": plain / lean,
    }


def main(
    batches: Annotated[str, typer.Option(help="batch sizes, separated by commas")] = "1,4,16",
    repeats: Annotated[int, typer.Option(help="timed runs of each", min=1)] = 15,
    bins: Annotated[int, typer.Option(help="action bins per dimension")] = 21,
    output: Annotated[Path | None, typer.Option(help="write the result as JSON")] = None,
) -> None:
    """Measure, print a table, and write JSON when asked."""
    torch.set_num_threads(1)
    part = PolicyPart(bins=bins)
    policy = make_policy(part, image_size=IMAGE_SIZE, seed=0, device=torch.device("cpu"))
    assert isinstance(policy, AutoregressivePolicy)
    sizes = [int(size) for size in batches.split(",")]
    rows = [measure(policy, size, repeats) for size in track(sizes, description="batches")]
    table = Table(title=f"{policy.tokens} tokens per decision, one thread")
    for column in rows[0]:
        table.add_column(column.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(*(f"{value:.0f}" if name == "batch" else f"{value:.1f}" for name, value in row.items()))
    Console().print(table)
    if output is not None:
        result: dict[str, Any] = {"policy": part.model_dump(), "image_size": IMAGE_SIZE, "rows": rows}
        write_json(output, {**result, "fingerprint": software_fingerprint()})


def _act(policy: AutoregressivePolicy, observations: Sequence[Observation]) -> list[ActionSample]:
    return policy.act(observations, seeds=range(len(observations)), temperature=1.0)


if __name__ == "__main__":
    typer.run(main)
