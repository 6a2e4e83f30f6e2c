"""How fast merged weights reach the policy actors, beside a memcpy of the same bytes in the same run.

    python -m benchmarks.broadcast [--megabytes 64] [--receivers 2] [--repeats 7] [--output FILE]

One shard publishes a new version; every receiver pulls it and copies it into tensors of its own, all at once. The
clock runs from the first pull to the last copy: transport alone, for a policy actor also checks, loads and hashes what
it got. The memcpy copies the same bytes once per receiver, from one warm buffer to another. Hashing, done once by the
shard, is timed apart.
"""

from __future__ import annotations

import actors  # noqa: F401  (before ray: it settles how ray authenticates)

# isort: split
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import ray
import typer
from rich.console import Console
from rich.table import Table

from actors.parameter_server import ParameterServer, pull_snapshot
from actors.placement import connect
from benchmarks.fingerprint import software_fingerprint, write_json
from learners.checkpoint import save_checkpoint

TENSOR_BYTES = 4 << 20


@ray.remote(num_cpus=0.1)
class Receiver:
    """Pulls a version and copies it in, as a policy actor does first."""

    def __init__(self, shards: Sequence[Any]) -> None:
        self._shards = shards
        self._mine: dict[str, np.ndarray] = {}

    def receive(self, version: int) -> float:
        """Pull and copy; returns when it was done, seconds of the machine's clock."""
        snapshot = pull_snapshot(self._shards, version)
        for name, tensor in snapshot.tensors.items():
            if name not in self._mine:
                self._mine[name] = np.zeros_like(tensor)
            np.copyto(self._mine[name], tensor)
        return time.time()


def memcpy_seconds(total: int, receivers: int) -> float:
    """Copy `total` bytes once per receiver, warm buffers."""
    source = np.ones(total // 4, np.float32)
    targets = [np.ones_like(source) for _ in range(receivers)]
    started = time.perf_counter()
    for target in targets:
        np.copyto(target, source)
    return time.perf_counter() - started


def measure(megabytes: int, receivers: int, repeats: int) -> dict[str, Any]:
    """Interleave broadcasts and memcpys; the first of each warms up and is not counted."""
    total = megabytes << 20
    rng = np.random.default_rng(0)
    tensors = {
        f"layer{i}.weight": rng.standard_normal(TENSOR_BYTES // 4, dtype=np.float32).reshape(-1, 1024)
        for i in range(max(total // TENSOR_BYTES, 1))
    }
    pulls, copies, publishes = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(folder, "start", tensors, {})
        server = ParameterServer(start_checkpoint=str(Path(folder) / "start"), saved=folder, num_shards=1)
        actors = [Receiver.remote(server.shards) for _ in range(receivers)]  # type: ignore[attr-defined]
        for repeat in range(repeats + 1):
            started = time.perf_counter()
            version, _ = server.publish(None)
            published = time.perf_counter() - started
            started = time.time()
            done = max(ray.get([actor.receive.remote(version) for actor in actors]))
            copied = memcpy_seconds(total, receivers)
            if repeat:
                publishes.append(published)
                pulls.append(done - started)
                copies.append(copied)
    gigabytes = total * receivers / 1e9
    return {
        "megabytes": megabytes,
        "receivers": receivers,
        "repeats": repeats,
        "broadcast_s": statistics.median(pulls),
        "broadcast_gb_per_s": gigabytes / statistics.median(pulls),
        "memcpy_s": statistics.median(copies),
        "memcpy_gb_per_s": gigabytes / statistics.median(copies),
        "ratio_to_memcpy": statistics.median(b / m for b, m in zip(pulls, copies, strict=True)),
        "publish_s": statistics.median(publishes),
    }


def main(
    megabytes: Annotated[int, typer.Option(help="merged weights, MiB")] = 64,
    receivers: Annotated[int, typer.Option(help="policy actors")] = 2,
    repeats: Annotated[int, typer.Option(help="measured repeats")] = 7,
    output: Annotated[Path | None, typer.Option(help="JSON file to write")] = None,
) -> None:
    connect()
    result = measure(megabytes, receivers, repeats)
    table = Table(title=f"Broadcast of {megabytes} MiB to {receivers} policy actors (median of {repeats})")
    for column in ("", "seconds", "GB/s"):
        table.add_column(column, justify="right")
    table.add_row("broadcast", f"{result['broadcast_s']:.4f}", f"{result['broadcast_gb_per_s']:.2f}")
    table.add_row("memcpy", f"{result['memcpy_s']:.4f}", f"{result['memcpy_gb_per_s']:.2f}")
    table.add_row("merge + hash + put", f"{result['publish_s']:.4f}", "")
    Console().print(table)
    Console().print(f"broadcast / memcpy: {result['ratio_to_memcpy']:.2f}")
    if output is not None:
        write_json(output, {**result, "fingerprint": software_fingerprint()})


if __name__ == "__main__":
    typer.run(main)
