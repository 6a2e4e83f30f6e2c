"""Merge a low-rank adapter into base weights, one tensor at a time, always from a pristine base array.

NumPy in and out, so that whoever holds some of the tensors merges just those. In fp32 whatever the stored
dtype, cast once at the end: merging and unmerging in place drifts, and bf16 arithmetic loses three digits.

LoRA: Hu et al. 2021, arXiv 2106.09685, Eq. 3. DoRA: Liu et al. 2024, arXiv 2402.09353, Eq. 5.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from trajectories.bfloat16 import is_finite, narrow, widen
from trajectories.records import AdapterWeights


class MergeError(ValueError):
    """An adapter that does not merge into its base: a shape or factor that does not fit, a result that is not finite,
    or one that computes something else; one line."""


_FACTORS = {"lora": {"A", "B"}, "dora": {"A", "B", "m"}}
DRIFT_LIMIT = 0.02
"""Most that a merge may change what base and adapter compute. Rounding to bfloat16 costs 0.002, float32 1e-6."""
_PROBES = 4


def merge_tensor(
    name: str, base: np.ndarray, factors: Mapping[str, np.ndarray], *, scaling: float
) -> np.ndarray:
    """The merged weight of one linear layer, in the base's dtype; `base` [out, in] is left as it is.

    With A [r, in] and B [out, r] only: W' = W + s B A. With m [out] too: W' = m V / ||V||, V = W + s B A, by
    output row. Raises MergeError naming the tensor for a shape that does not fit, or when the result is not
    finite.
    """
    down, up = factors["A"], factors["B"]
    if base.ndim != 2 or down.shape[1:] != base.shape[1:] or up.shape != (base.shape[0], down.shape[0]):
        raise MergeError(
            f"cannot merge into {name}: base {base.shape}, A {down.shape}, B {up.shape}; "
            "expected [out, in], [r, in], [out, r]"
        )
    # A non-finite result is reported below, by name; NumPy's own warnings would say less.
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        direction = widen(base) + np.float32(scaling) * (up @ down).astype(np.float32)
        if "m" in factors:
            magnitude = factors["m"]
            if magnitude.shape != base.shape[:1]:
                raise MergeError(f"cannot merge into {name}: m {magnitude.shape}, expected {base.shape[:1]}")
            direction = (magnitude / _row_norms(direction))[:, None] * direction
        merged = narrow(direction, base.dtype)
    bad = merged.size - int(is_finite(merged).sum())
    if bad:
        raise MergeError(
            f"merging gives {bad} non-finite of {merged.size} values in {name}; the adapter is damaged: "
            "keep serving the last good version"
        )
    return merged


def _row_norms(direction: np.ndarray) -> np.ndarray:
    """float32 [out], added up in torch's order: to the bit what a new adapter's m is, which then changes nothing."""
    return torch.linalg.vector_norm(torch.from_numpy(direction), dim=1).numpy()


def merge(base: Mapping[str, np.ndarray], adapter: AdapterWeights | None) -> dict[str, np.ndarray]:
    """Merge `adapter` into those of its tensors that `base` holds (a shard holds some); others pass through.

    `base` maps parameter name to array, e.g. `decoder.layers.0.self_attn.q_proj.weight`. An adapter of None
    gives the base itself. Tensors without factors are the very arrays given, not copies. Raises MergeError
    naming the tensor, or the factors that the adapter's method lacks.
    """
    merged = dict(base)
    if adapter is None:
        return merged
    expected = _FACTORS[adapter.method]
    for layer, factors in adapter.factors.items():
        if set(factors) != expected:
            raise MergeError(
                f"{layer} has factors {sorted(factors)}, {adapter.method} needs {sorted(expected)}"
            )
        name = f"{layer}.weight"
        if name in base:
            merged[name] = merge_tensor(name, base[name], factors, scaling=adapter.scaling)
    return merged


def drift(
    base: Mapping[str, np.ndarray], merged: Mapping[str, np.ndarray], adapter: AdapterWeights | None
) -> float:
    """How far merged weights compute something else than base and adapter side by side: over those of the adapter's
    layers that `base` holds, the largest |W'x - y| / |y| on random inputs x, y = W x + s B (A x) in float64 (DoRA:
    scaled by m / ||V||). 0 without an adapter.

    Raises MergeError naming the layer whose drift is above DRIFT_LIMIT.
    """
    largest = 0.0
    for layer, factors in adapter.factors.items() if adapter is not None else ():
        name = f"{layer}.weight"
        if adapter is None or name not in base:
            continue
        found = _layer_drift(base[name], merged[name], factors, adapter.scaling)
        if not found <= DRIFT_LIMIT:
            raise MergeError(
                f"merged {name} gives outputs that are {found:.2g} from those of base and adapter, limit "
                f"{DRIFT_LIMIT}; keep serving the last good version"
            )
        largest = max(largest, found)
    return largest


def _layer_drift(
    base: np.ndarray, merged: np.ndarray, factors: Mapping[str, np.ndarray], scaling: float
) -> float:
    down, up = factors["A"].astype(np.float64), factors["B"].astype(np.float64)
    inputs = np.random.default_rng(0).standard_normal((base.shape[1], _PROBES), dtype=np.float32)
    weight = widen(base)
    expected = weight @ inputs + scaling * (up @ (down @ inputs))
    if "m" in factors:
        # ||V||^2 from the factors, so that V = W + s B A is not built a second time as the merge built it.
        squares = np.einsum("oi,oi->o", weight, weight, dtype=np.float64)
        squares += 2 * scaling * np.einsum("or,or->o", weight @ down.T.astype(np.float32), up)
        squares += scaling**2 * np.einsum("or,rs,os->o", up, down @ down.T, up)
        expected *= (factors["m"] / np.sqrt(squares))[:, None]
    difference = np.linalg.norm(widen(merged) @ inputs - expected)
    return float(difference / max(np.linalg.norm(expected), np.finfo(np.float64).tiny))
