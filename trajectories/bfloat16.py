"""bfloat16 in NumPy, which has no such type: its bits, the upper halves of float32, as uint16.

Weights are floats, so uint16 among them always stands for bfloat16; `BFLOAT16` is that dtype under its name.
"""

from __future__ import annotations

import numpy as np

BFLOAT16 = np.dtype(np.uint16)
_EXPONENT = np.uint16(0x7F80)
_NAN = np.uint16(0x7FC0)


def widen(array: np.ndarray) -> np.ndarray:
    """Weights of any dtype as float32; of bfloat16 exactly."""
    if array.dtype != BFLOAT16:
        return array.astype(np.float32)
    return (array.astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """float32 in a weight's dtype, rounded to the nearest (bfloat16: to even on a tie, as torch does)."""
    if dtype != BFLOAT16:
        return values.astype(dtype)
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), _NAN, rounded.astype(np.uint16))


def is_finite(array: np.ndarray) -> np.ndarray:
    """bool, of the array's shape: neither infinite nor NaN."""
    if array.dtype != BFLOAT16:
        return np.isfinite(array)
    return (array & _EXPONENT) != _EXPONENT
