"""Noise that follows from a key alone: counter-based generators (Philox), so that no draw depends on another."""

from __future__ import annotations

import numpy as np


def generator(key: int, draw: int, stream: int) -> np.random.Generator:
    """That of one draw of a key, 0 .. 2^64 - 1; streams tell apart what is drawn. Raises ValueError for another key."""
    if not 0 <= key < 2**64:
        raise ValueError(f"a key must lie in 0 .. 2^64 - 1, got {key}")
    return np.random.Generator(np.random.Philox(key=np.array([key, stream << 32 | draw], np.uint64)))
