"""Content hashes of weights: a Merkle root over named tensors, so shards can be hashed where they live."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import numpy as np


def tensor_hash(array: np.ndarray) -> str:
    """SHA-256 of dtype, shape and bytes (C order)."""
    digest = TensorDigest(array.dtype, array.shape)
    digest.update(array)
    return digest.hexdigest()


def blocks_hash(dtype: np.dtype, shape: tuple[int, ...], blocks: Iterable[np.ndarray]) -> str:
    """The `tensor_hash` of the array that these are the rows of, in order."""
    digest = TensorDigest(dtype, shape)
    for block in blocks:
        digest.update(block)
    return digest.hexdigest()


class TensorDigest:
    """A `tensor_hash` under way, of an array that is never in memory as a whole."""

    def __init__(self, dtype: np.dtype, shape: tuple[int, ...]) -> None:
        self._sha256 = hashlib.sha256(f"{dtype.str}{tuple(shape)}".encode())

    def update(self, block: np.ndarray) -> None:
        """Add the next rows."""
        self._sha256.update(np.ascontiguousarray(block).data)

    def hexdigest(self) -> str:
        """Once all rows are added."""
        return self._sha256.hexdigest()


def root_hash(tensor_hashes: Mapping[str, str]) -> str:
    """Combine per-tensor hashes; independent of order and of how the tensors are sharded."""
    lines = "".join(f"{name}:{tensor_hashes[name]}\n" for name in sorted(tensor_hashes))
    return hashlib.sha256(lines.encode()).hexdigest()


def weights_hash(tensors: Mapping[str, np.ndarray]) -> str:
    """Content hash of a full set of named tensors."""
    return root_hash({name: tensor_hash(array) for name, array in tensors.items()})
