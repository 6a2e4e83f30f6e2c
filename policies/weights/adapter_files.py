"""Adapters as files: named tensors beside JSON, of our own and of peft. Who only merges needs no network for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from configs.preference import AdapterPart
from trajectories.records import AdapterWeights

_PEFT_PREFIX = "base_model.model."
_PEFT_FACTORS = {
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora_magnitude_vector": "m",
    "lora_magnitude_vector.weight": "m",
}


def adapter_tensors(weights: AdapterWeights) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Flat tensors (`<layer>.A`, ...) and JSON metadata of an adapter, for a checkpoint."""
    tensors = {
        f"{layer}.{key}": array
        for layer, factors in weights.factors.items()
        for key, array in factors.items()
    }
    return tensors, {"method": weights.method, "scaling": weights.scaling, "base_hash": weights.base_hash}


def adapter_from_tensors(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, Any]) -> AdapterWeights:
    """The inverse of `adapter_tensors`; other metadata is ignored. Raises KeyError when some is missing."""
    factors: dict[str, dict[str, np.ndarray]] = {}
    for name, array in tensors.items():
        layer, _, key = name.rpartition(".")
        factors.setdefault(layer, {})[key] = array
    return AdapterWeights(
        method=metadata["method"],
        scaling=metadata["scaling"],
        base_hash=metadata["base_hash"],
        factors=factors,
    )


def adapter_from_peft(
    tensors: Mapping[str, np.ndarray], settings: Mapping[str, Any]
) -> tuple[AdapterPart, AdapterWeights]:
    """An adapter as peft saves it (`adapter_model.safetensors`, `adapter_config.json`), and the part to attach for it.

    Rank-stabilised LoRA (arXiv 2312.03732), whose scaling is alpha / sqrt(r), becomes a part of alpha sqrt(r) and rank
    r. Dropout is left out. Raises ValueError naming the first tensor that is not a factor of a linear, or the setting
    that is missing or cannot be met.
    """
    for key in ("r", "lora_alpha"):
        if key not in settings:
            raise ValueError(f"the adapter's settings lack {key!r}; they have {sorted(settings)}")
    for key in ("rank_pattern", "alpha_pattern"):
        if settings.get(key):
            raise ValueError(
                f"the adapter's {key} is {settings[key]}; expected none: all its linears share one r and lora_alpha"
            )
    rank, alpha = settings["r"], settings["lora_alpha"]
    if not isinstance(rank, int) or rank < 1:
        raise ValueError(f"the adapter's r is {rank!r}, expected a whole number of 1 or more")
    if not isinstance(alpha, int | float):
        raise ValueError(f"the adapter's lora_alpha is {alpha!r}, expected a number")
    if settings.get("use_rslora"):
        alpha *= rank**0.5
    part = AdapterPart(method="dora" if settings.get("use_dora") else "lora", rank=rank, alpha=alpha)
    factors: dict[str, dict[str, np.ndarray]] = {}
    for name, array in tensors.items():
        layer, dot, key = name.removeprefix(_PEFT_PREFIX).partition(".lora_")
        if not dot or f"lora_{key}" not in _PEFT_FACTORS:
            raise ValueError(
                f"{name} is not a factor that peft saves for a linear; expected {_PEFT_PREFIX}<layer>.lora_A.weight, "
                ".lora_B.weight or .lora_magnitude_vector"
            )
        factors.setdefault(layer, {})[_PEFT_FACTORS[f"lora_{key}"]] = array
    return part, AdapterWeights(
        method=part.method, scaling=part.alpha / part.rank, base_hash="", factors=factors
    )
