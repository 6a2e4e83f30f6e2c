"""Decisions per second of the token policy with vLLM and with torch, in one process.

    make setup-vllm
    .venv-vllm/bin/python -m benchmarks.vllm_serving [--batches 1,8,32] [--repeats 5] [--threads 1] [--output FILE]

Two sizes of policy: `tiny`, the recipes' default, and `wide`, whose decoder has 37 times the weights. A decision is
a whole `act` at temperature 1: images, prompt and the chunk's tokens. The two engines take turns in one run, so that a
busy machine slows both; medians are reported. They must choose the same tokens. `hand over` is what it costs to put
another version's weights into a running vLLM, as when a fleet and a candidate are served in turn.
"""

from __future__ import annotations

import gc
import importlib.util
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.fingerprint import software_fingerprint, write_json
from benchmarks.serving import IMAGE_SIZE, alternate, random_observations
from configs.policy import DecoderPart, PolicyPart
from policies.autoregressive import AutoregressivePolicy
from policies.decoding.engine import Engine
from policies.make import make_policy
from trajectories.records import ActionSample, Observation

if TYPE_CHECKING:
    from policies.decoding.vllm_engine import VllmEngine

SIZES = {
    "tiny": PolicyPart(bins=21),
    "wide": PolicyPart(bins=21, decoder=DecoderPart(width=512, layers=4, heads=8, mlp=1408)),
}


def make(part: PolicyPart, seed: int) -> AutoregressivePolicy:
    """A policy with random weights."""
    policy = make_policy(part, image_size=IMAGE_SIZE, seed=seed, device=torch.device("cpu"))
    assert isinstance(policy, AutoregressivePolicy)
    return policy


def act(
    policy: AutoregressivePolicy, engine: Engine, observations: Sequence[Observation]
) -> list[ActionSample]:
    """One batch of decisions with an engine."""
    policy.engine = engine
    return policy.act(observations, seeds=range(len(observations)), temperature=1.0)


def measure(
    policy: AutoregressivePolicy, torchs: Engine, vllms: VllmEngine, batch: int, repeats: int
) -> dict[str, float]:
    """One row of the table. Raises RuntimeError should the two engines choose different tokens."""
    observations = random_observations(batch)
    mine, other = act(policy, vllms, observations), act(policy, torchs, observations)
    if any((a.model_chunk != b.model_chunk).any() for a, b in zip(mine, other, strict=True)):
        raise RuntimeError(f"vLLM and torch chose different tokens at batch {batch}")
    apart = max(np.abs(a.logps - b.logps).max() for a, b in zip(mine, other, strict=True))
    torch_s, vllm_s = alternate(
        [partial(act, policy, torchs, observations), partial(act, policy, vllms, observations)], repeats
    )
    return {
        "batch": batch,
        "torch_decisions_per_s": batch / torch_s,
        "vllm_decisions_per_s": batch / vllm_s,
        "vllm_over_torch": torch_s / vllm_s,
        "logps_apart": float(apart),
    }


def measure_size(part: PolicyPart, batches: Sequence[int], repeats: int) -> dict[str, Any]:
    """The rows of one size, and the milliseconds of a hand-over."""
    # An extra: `main` has seen to it that it is installed.
    from policies.decoding.vllm_engine import VllmEngine

    policy, candidate = make(part, 0), make(part, 1)
    network, torchs = policy.network, policy.engine
    engine = VllmEngine(
        network.language_model,
        first_id=network.action_first_id,
        stop_id=network.action_stop_id,
        tokens=policy.tokens,
        max_batch=max(batches),
    )
    rows = [measure(policy, torchs, engine, batch, repeats) for batch in batches]
    models = (candidate.network.language_model, network.language_model)
    hand_over = alternate([partial(engine.follow, model) for model in models], repeats)
    weights = sum(parameter.numel() for parameter in network.language_model.parameters())
    return {
        "policy": part.model_dump(),
        "decoder_weights": weights,
        "rows": rows,
        "hand_over_ms": 500 * sum(hand_over),
    }


def main(
    batches: Annotated[str, typer.Option(help="batch sizes, separated by commas")] = "1,8,32",
    repeats: Annotated[int, typer.Option(help="timed runs of each", min=1)] = 5,
    threads: Annotated[int, typer.Option(help="torch threads, and vLLM's", min=1)] = 1,
    sizes: Annotated[str, typer.Option(help="sizes of policy, separated by commas")] = ",".join(SIZES),
    output: Annotated[Path | None, typer.Option(help="write the result as JSON")] = None,
) -> None:
    """Measure, print a table, and write JSON when asked."""
    if importlib.util.find_spec("vllm") is None:
        typer.echo(
            "vLLM is not installed here: make setup-vllm, then .venv-vllm/bin/python -m benchmarks.vllm_serving",
            err=True,
        )
        raise typer.Exit(2)
    # An extra, which the line above asks for.
    import vllm

    torch.set_num_threads(threads)
    wanted = [int(batch) for batch in batches.split(",")]
    results = {}
    for name in sizes.split(","):
        results[name] = measure_size(SIZES[name], wanted, repeats)
        gc.collect()  # the next vLLM starts when this one has gone
    for name, result in results.items():
        table = Table(
            title=f"{name}: {result['decoder_weights'] / 1e6:.2f} M weights in the decoder, {threads} thread(s), "
            f"hand over {result['hand_over_ms']:.0f} ms"
        )
        for column in result["rows"][0]:
            table.add_column(column.replace("_", " "), justify="right")
        for row in result["rows"]:
            table.add_row(*(f"{value:.3g}" for value in row.values()))
        Console().print(table)
    if output is not None:
        fingerprint = software_fingerprint()
        fingerprint["packages"]["vllm"] = vllm.__version__
        write_json(output, {"image_size": IMAGE_SIZE, "sizes": results, "fingerprint": fingerprint})


if __name__ == "__main__":
    typer.run(main)
