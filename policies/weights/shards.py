"""The tensors of a folder of safetensors files, some rows at a time in and some rows at a time out.

A model of any size then passes through in the memory of some blocks, whatever its largest tensor. safetensors writes a
file from tensors that are all in memory at once; its format (a length, a JSON header, the bytes:
https://github.com/huggingface/safetensors) lets a file be written front to back as soon as dtypes and shapes are
known, and that is done here.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from policies.weights.files import refuse_integers
from policies.weights.snapshots import to_array
from trajectories.bfloat16 import BFLOAT16
from trajectories.hashing import blocks_hash, root_hash

_DTYPES: dict[str, np.dtype] = {
    "BF16": BFLOAT16,
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}
_LENGTH = 8
"""Bytes that hold the header's length."""
PROCESSORS = "policy_*processor*.safetensors"
"""What LeRobot keeps statistics in, beside the weights."""
BLOCK = 1 << 20
"""Numbers in memory at once, or one row where that has more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
    """A tensor on the disk."""

    file: str
    """In the folder."""
    dtype: str
    """safetensors' name: BF16, F16, F32 or F64."""
    shape: tuple[int, ...]

    @property
    def array_dtype(self) -> np.dtype:
        """What the tensor is in memory (bfloat16: `trajectories.bfloat16`)."""
        return _DTYPES[self.dtype]

    @property
    def numbers(self) -> int:
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        """Bytes."""
        return self.numbers * self.array_dtype.itemsize


class ShardFolder:
    """The tensors of every `*.safetensors` file in a folder, by name, but of LeRobot's PROCESSORS.

    Example:
        folder = ShardFolder("checkpoints/openvla-7b")
        for name in folder.tensors:
            folder.read(name)
    """

    def __init__(self, path: str | Path) -> None:
        """Reads the headers alone. Raises ValueError for a folder without such files, a file that cannot be read, a
        name in two files, or integers."""
        self.path = Path(path)
        self.tensors: dict[str, Stored] = {}
        self.metadata: dict[str, dict[str, str]] = {}
        """File -> what it says of itself; official readers ask for `format`."""
        found = {file.name for file in self.path.glob("*.safetensors")}
        self.files = sorted(name for name in found if not fnmatch(name, PROCESSORS))
        if not self.files:
            raise ValueError(f"{path} has no *.safetensors file; expected a folder with weights")
        for file in self.files:
            for name, stored in self._header(file):
                if name in self.tensors:
                    raise ValueError(f"{self.path}: {name} is in {self.tensors[name].file} and in {file}")
                self.tensors[name] = stored

    def read(self, name: str) -> np.ndarray:
        """One tensor in memory of its own (bfloat16: `trajectories.bfloat16`). The file is open for that long only:
        what stays mapped counts as this process's memory."""
        with safe_open(self.path / self.tensors[name].file, framework="pt") as file:
            return to_array(file.get_tensor(name))

    def blocks(self, name: str) -> Iterator[np.ndarray]:
        """One tensor's rows in order, BLOCK numbers at a time; see `read`."""
        stored = self.tensors[name]
        if stored.numbers <= BLOCK or not stored.shape:
            yield self.read(name)
            return
        rows = max(1, BLOCK * stored.shape[0] // stored.numbers)
        for start in range(0, stored.shape[0], rows):
            with safe_open(self.path / stored.file, framework="pt") as file:
                block = to_array(file.get_slice(name)[start : start + rows])
            yield block

    def hash(self, name: str) -> str:
        """`trajectories.hashing.tensor_hash` of one tensor."""
        stored = self.tensors[name]
        return blocks_hash(stored.array_dtype, stored.shape, self.blocks(name))

    def content_hash(self) -> str:
        """Of all tensors."""
        return root_hash({name: self.hash(name) for name in self.tensors})

    def _header(self, file: str) -> Iterator[tuple[str, Stored]]:
        where = str(self.path / file)
        try:
            with safe_open(where, framework="pt") as opened:
                self.metadata[file] = dict(opened.metadata() or {})
                for name in opened.keys():  # noqa: SIM118  (no mapping: it has keys alone)
                    part = opened.get_slice(name)
                    refuse_integers(name, part.get_dtype(), where=where)
                    yield name, Stored(file=file, dtype=part.get_dtype(), shape=tuple(part.get_shape()))
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{where} cannot be read: {error}") from error


def write_shard(
    path: Path,
    stored: Mapping[str, Stored],
    tensors: Iterable[tuple[str, Iterable[np.ndarray]]],
    metadata: Mapping[str, str],
) -> None:
    """Write a safetensors file front to back and flush it to the disk; `tensors` come in the order of `stored`, each as
    its rows, block by block.

    Raises ValueError for a tensor that is not what `stored` says of it, or for one too few or too many.
    """
    header: dict[str, dict[str, object]] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, what in stored.items():
        header[name] = {
            "dtype": what.dtype,
            "shape": list(what.shape),
            "data_offsets": [end, end + what.size],
        }
        end += what.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _LENGTH)  # the data begin at a multiple of eight
    with path.open("wb") as file:
        file.write(len(text).to_bytes(_LENGTH, "little"))
        file.write(text)
        for (name, what), (given, blocks) in zip(stored.items(), tensors, strict=True):
            written = 0
            for block in blocks:
                if block.dtype != what.array_dtype or block.shape[1:] != what.shape[1:]:
                    raise ValueError(
                        f"{path}: got rows {list(block.shape[1:])} of {block.dtype} as {given}, expected "
                        f"{list(what.shape[1:])} of {what.array_dtype}"
                    )
                file.write(np.ascontiguousarray(block).data)
                written += block.nbytes
            if given != name or written != what.size:
                raise ValueError(
                    f"{path}: got {given} of {written} bytes, expected {name} {list(what.shape)} of {what.size}"
                )
        file.flush()
        os.fsync(file.fileno())
