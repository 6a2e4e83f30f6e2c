"""Memory and time of extracting and merging a capability vector for a model of 7 B weights, from disk to disk.

    python -m benchmarks.merging [--layers 32] [--folder FOLDER] [--output FILE]

Weights are random bfloat16 numbers in the shapes and names of OpenVLA-7B, in shards of at most 7 GB as they are
published. Two such models are written (the second is what auxiliary fine-tuning gave; plain fine-tuning gave the first
again), the vector is extracted from them and merged, each by a process of its own, whose greatest memory beyond what
it took to begin with (VmHWM) is compared with the largest shard. All layers take 46 GB of disk while it goes on; fewer
`--layers` of the language model take less, and keep the largest tensors.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks.fingerprint import report
from benchmarks.processes import peak_bytes
from benchmarks.published_sizes import openvla_7b
from learners.capability import extract
from learners.merging import ALPHA, merge
from policies.weights.shards import BLOCK, Stored, write_shard
from trajectories.bfloat16 import BFLOAT16

ROOT = Path(__file__).parents[1]
SHARD_BYTES = 7 * 10**9


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """By name, of OpenVLA-7B with its first `layers` layers of language model."""
    found = {}
    for name, tensor in openvla_7b().empty().state_dict().items():
        layer = re.search(r"language_model.*\.layers\.(\d+)\.", name)
        if layer is None or int(layer[1]) < layers:
            found[name] = tuple(tensor.shape)
    return found


def write_model(folder: Path, wanted: dict[str, tuple[int, ...]], seed: int) -> None:
    """A model of random weights, in shards that are filled one after the other."""
    folder.mkdir()
    shards: list[dict[str, Stored]] = [{}]
    for name, shape in wanted.items():
        tensor = Stored(file="", dtype="BF16", shape=shape)
        if sum(t.size for t in shards[-1].values()) + tensor.size > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = tensor
    rng = np.random.default_rng(seed)
    for number, shard in enumerate(shards):
        file = folder / f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        write_shard(
            file, shard, ((name, rows(rng, tensor)) for name, tensor in shard.items()), {"format": "pt"}
        )


def rows(rng: np.random.Generator, tensor: Stored) -> Iterator[np.ndarray]:
    """Random numbers of either sign between 2^-7 and 2^-6, some rows at a time."""
    first = tensor.shape[0] if tensor.shape else 1
    step = max(1, BLOCK * first // max(tensor.numbers, 1))
    for start in range(0, first, step):
        shape = (min(step, first - start), *tensor.shape[1:]) if tensor.shape else ()
        bits = rng.integers(0, 1 << 16, size=shape, dtype=np.uint16) & np.uint16(0x807F)
        yield (bits | np.uint16(0x3C00)).view(BFLOAT16)


def work(what: str, base: Path, other: Path, out: Path) -> None:
    """In a process of its own: do one thing, and say what it took."""
    before, started = peak_bytes(), time.perf_counter()
    if what == "extract":
        extract(base, sft=base, aux=other, out=out)
    else:
        merge(base, other, alpha=ALPHA, out=out)
    print(json.dumps({"peak_bytes": peak_bytes() - before, "seconds": time.perf_counter() - started}))


def measured(what: str, base: Path, other: Path, out: Path) -> dict[str, Any]:
    """What `extract` or `merge` takes of `base` and the other (absolute paths), in a process of its own."""
    code = "import sys; from pathlib import Path; from benchmarks.merging import work; "
    code += "work(sys.argv[1], *map(Path, sys.argv[2:]))"
    command = [sys.executable, "-c", code, what, *map(str, (base, other, out))]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    said = json.loads(done.stdout)
    shard = max(file.stat().st_size for file in base.glob("*.safetensors"))
    return {
        "step": what,
        "seconds": round(said["seconds"], 1),
        "peak_mib": round(said["peak_bytes"] / 2**20, 1),
        "largest_shard_mib": round(shard / 2**20, 1),
        "of_a_shard": round(said["peak_bytes"] / shard, 4),
    }


def main(
    layers: Annotated[int, typer.Option(help="of the language model", min=1, max=32)] = 32,
    folder: Annotated[
        Path | None, typer.Option(help="where there is room; none: the temporary folder")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file to write")] = None,
) -> None:
    wanted = shapes(layers)
    model = 2 * sum(int(np.prod(shape)) for shape in wanted.values())
    folder = folder or Path(tempfile.gettempdir())
    free = shutil.disk_usage(folder).free
    if free < 3.1 * model:
        raise typer.BadParameter(
            f"{folder} has {free / 1e9:.1f} GB free, {3.1 * model / 1e9:.1f} are needed; name another --folder, or "
            "fewer --layers"
        )
    with tempfile.TemporaryDirectory(dir=folder) as place:
        base, aux, gamma, merged = (Path(place) / name for name in ("base", "aux", "gamma", "merged"))
        write_model(base, wanted, seed=0)
        write_model(aux, wanted, seed=1)
        found = [measured("extract", base, aux, gamma)]
        shutil.rmtree(aux)
        found.append(measured("merge", base, gamma, merged))
    settings = {"layers": layers, "weights": model // 2, "block": BLOCK}
    report(f"a model of {model / 2e9:.2f} B weights in bfloat16", found, settings=settings, output=output)


if __name__ == "__main__":
    typer.run(main)
