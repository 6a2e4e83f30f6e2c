"""Content hashes of weights: a Merkle root over named tensors, so shards can be hashed where they live."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np


def tensor_hash(array: np.ndarray) -> str:
    """SHA-256 of dtype, shape and bytes (C order)."""
    digest = hashlib.sha256(f"{array.dtype.str}{array.shape}".encode())
    digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def root_hash(tensor_hashes: Mapping[str, str]) -> str:
    """Combine per-tensor hashes; independent of order and of how the tensors are sharded."""
    lines = "".join(f"{name}:{tensor_hashes[name]}\n" for name in sorted(tensor_hashes))
    return hashlib.sha256(lines.encode()).hexdigest()


def weights_hash(tensors: Mapping[str, np.ndarray]) -> str:
    """Content hash of a full set of named tensors."""
    return root_hash({name: tensor_hash(array) for name, array in tensors.items()})
