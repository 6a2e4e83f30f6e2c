"""An adapter as flat named tensors plus a few words of metadata: the form in which checkpoints hold it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from trajectories.records import AdapterWeights


def adapter_to_tensors(adapter: AdapterWeights) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Flatten to (`<layer>.<factor>` -> array, metadata)."""
    tensors = {
        f"{layer}.{factor}": array
        for layer, factors in adapter.factors.items()
        for factor, array in factors.items()
    }
    metadata = {"method": adapter.method, "scaling": adapter.scaling, "base_hash": adapter.base_hash}
    return tensors, metadata


def adapter_from_tensors(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, Any]) -> AdapterWeights:
    """Inverse of `adapter_to_tensors`; other metadata keys are passed over."""
    factors: dict[str, dict[str, np.ndarray]] = {}
    for name, array in tensors.items():
        layer, factor = name.rsplit(".", 1)
        factors.setdefault(layer, {})[factor] = array
    return AdapterWeights(
        method=metadata["method"],
        scaling=metadata["scaling"],
        base_hash=metadata["base_hash"],
        factors=factors,
    )
