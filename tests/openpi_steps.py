"""Steps of openpi's own policy that are taken otherwise here, to compare with."""

from __future__ import annotations

import numpy as np

from policies.pi0.norm_stats import NormStats


def rotate_180(image_HWC: np.ndarray) -> np.ndarray:
    """The simulator's own image, turned as LIBERO's cameras are for these models."""
    return np.ascontiguousarray(image_HWC[::-1, ::-1])


def to_model_range(image_HWC: np.ndarray) -> np.ndarray:
    """uint8 -> float32 in [-1, 1], channels first."""
    return np.moveaxis(image_HWC.astype(np.float32) / 255 * 2 - 1, -1, -3)


def unnormalise(x: np.ndarray, stats: NormStats, *, quantile: bool) -> np.ndarray:
    """To the data's own units, as openpi writes it; padding behind the statistics' dimensions is dropped."""
    x = x[..., : len(stats.mean)]
    if not quantile:
        return x * (stats.std + 1e-6) + stats.mean
    assert stats.q01 is not None
    assert stats.q99 is not None
    return (x + 1) / 2 * (stats.q99 - stats.q01 + 1e-6) + stats.q01
