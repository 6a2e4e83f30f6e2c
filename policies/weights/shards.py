"""The tensors of a folder of safetensors files, one at a time in and one at a time out.

A model of 7 B weights then passes through in the memory of its largest tensor. safetensors writes a file from tensors
that are all in memory at once; its format (a length, a JSON header, the bytes:
https://github.com/huggingface/safetensors) lets a file be written front to back as soon as dtypes and shapes are
known, and that is done here.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from policies.weights.files import refuse_integers
from policies.weights.snapshots import to_array

_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8}
_LENGTH = 8
"""Bytes that hold the header's length."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
    """A tensor on the disk."""

    file: str
    """In the folder."""
    dtype: str
    """safetensors' name: BF16, F16, F32 or F64."""
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * _BYTES[self.dtype]


class ShardFolder:
    """The tensors of every `*.safetensors` file in a folder, by name.

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
        self.files = sorted(file.name for file in self.path.glob("*.safetensors"))
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
    arrays: Iterable[tuple[str, np.ndarray]],
    metadata: Mapping[str, str],
) -> None:
    """Write a safetensors file front to back and flush it to the disk; `arrays` come in the order of `stored`.

    Raises ValueError for an array that is not what `stored` says of it, or for one too few or too many.
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
        for (name, what), (given, array) in zip(stored.items(), arrays, strict=True):
            if given != name or array.shape != what.shape or array.nbytes != what.size:
                raise ValueError(
                    f"{path}: got {given} {list(array.shape)} of {array.nbytes} bytes, expected {name} "
                    f"{list(what.shape)} of {what.size}"
                )
            file.write(np.ascontiguousarray(array).data)
        file.flush()
        os.fsync(file.fileno())
