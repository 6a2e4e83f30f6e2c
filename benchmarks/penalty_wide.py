"""What holding an adapter apart from a vector costs at the width of OpenVLA-7B, on CPUs: time of a step.

    python -m benchmarks.penalty_wide [--layers 1] [--repeats 5] [--threads 2] [--output FILE]

The decoder's layers are OpenVLA-7B's in every size, with random float32 weights, and there are `--layers` of them
instead of 32; the vision towers, which take no part in a step, are cut short. Both a step and the penalty grow with the
number of layers, so their ratio is about that of all; the embedding and the head, which the penalty has no part in,
weigh more than they would. Steps with and without the penalty alternate in one update, and each is divided by the one
beside it. On a GPU kernels are to be started besides: `benchmarks.real_size` measures that.
"""

from __future__ import annotations

import statistics
import time
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.fingerprint import software_fingerprint, write_json
from benchmarks.published_sizes import OPENVLA_7B
from benchmarks.real_size import Method, episode, learner_of, openvla
from policies.openvla.layout import OpenVLALayout, openvla_layout
from trajectories.records import PreferencePair

MICRO_BATCH = 8
IMAGE = 224
TOWER_LAYERS = 2


def layout(layers: int) -> OpenVLALayout:
    """OpenVLA-7B's, with so many layers of decoder and few of vision."""
    sizes = ({"embed_dim": 1024, "num_heads": 16}, {"embed_dim": 1152, "num_heads": 16})
    towers = [
        [name, {"pretrained": False, "depth": TOWER_LAYERS, **size}]
        for name, size in zip(OPENVLA_7B["timm_model_ids"], sizes, strict=True)
    ]
    text = {**OPENVLA_7B["text_config"], "num_hidden_layers": layers}
    changed = {"timm_create_model_calls": towers, "text_config": text}
    return openvla_layout(OPENVLA_7B | changed, where="OpenVLA-7B")


def measure(method: Method, *, layers: int, repeats: int) -> dict[str, Any]:
    """Seconds of a step without and with the penalty, the latter over the former, and what the penalty takes alone."""
    policy = openvla(layout(layers), torch.device("cpu"), torch.float32)
    pair = PreferencePair(
        chosen=episode(policy, 0, "success", IMAGE), rejected=episode(policy, 1, "timeout", IMAGE)
    )
    learner = learner_of(policy, method, MICRO_BATCH, steps=2 * repeats + 1)
    penalty = learner.penalty
    ended: list[float] = []
    assert penalty is not None  # `method` has one

    def on_step(step: int, _: object) -> None:
        ended.append(time.perf_counter())
        learner.penalty = penalty if step % 2 == 0 else None  # of the next step

    learner.update([pair], [pair.chosen], [], on_step=on_step)
    seconds = [later - earlier for earlier, later in pairwise(ended)]
    without, with_it = seconds[0::2], seconds[1::2]
    alone = []
    for _ in range(repeats):
        started = time.perf_counter()
        penalty.add_gradients()
        alone.append(time.perf_counter() - started)
    ratios = [one / other for one, other in zip(with_it, without, strict=True)]
    step = statistics.median(without)
    return {
        "adapter": method.partition("-")[0],
        "step_s": round(step, 3),
        "with_penalty_s": round(statistics.median(with_it), 3),
        "times": round(statistics.median(ratios), 4),
        "penalty_s": round(statistics.median(alone), 4),
        "share": round(statistics.median(alone) / step, 4),
    }


def main(
    layers: Annotated[int, typer.Option(help="of the decoder", min=1)] = 1,
    repeats: Annotated[int, typer.Option(help="timed steps with, and as many without", min=1)] = 5,
    threads: Annotated[int, typer.Option(help="torch threads", min=1)] = 2,
    output: Annotated[Path | None, typer.Option(help="write the result as JSON")] = None,
) -> None:
    torch.set_num_threads(threads)
    rows = [
        measure(cast(Method, method), layers=layers, repeats=repeats)
        for method in ("lora-apart", "dora-apart")
    ]
    table = Table(title=f"one step of an update, OpenVLA-7B's width, {layers} layer(s), {threads} threads")
    for name in rows[0]:
        table.add_column(name.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console().print(table)
    if output is not None:
        settings = {"layers": layers, "micro_batch": MICRO_BATCH, "threads": threads}
        write_json(output, {"settings": settings, "rows": rows, "fingerprint": software_fingerprint()})


if __name__ == "__main__":
    typer.run(main)
