"""What published checkpoint folders have in common: JSON beside the weights, and weights that must be floats."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

CONFIG = "config.json"
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
"""safetensors' names of what weights may be stored in."""


def read_json(file: Path) -> dict[str, Any]:
    """The object in a file. Raises ValueError in one line when it is missing or anything else."""
    if not file.is_file():
        raise ValueError(f"{file.parent} has no {file.name}; expected a checkpoint folder as on the Hub")
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} holds a {type(value).__name__}, expected an object")
    return value


def refuse_quantised(config: Mapping[str, Any], *, where: str) -> None:
    """Raises ValueError naming the method of a checkpoint that says it is quantised."""
    settings = config.get("quantization_config")
    if settings is None:
        return
    method = settings.get("quant_method") if isinstance(settings, Mapping) else None
    raise ValueError(
        f"{where}: quantization_config says that these weights are quantised ({method or 'method not named'}); "
        "adapters are merged into floats alone: name the checkpoint that was quantised, in float32 or bfloat16"
    )


def refuse_integers(name: str, stored: str, *, where: str) -> None:
    """Raises ValueError for a tensor that is not stored in one of DTYPES."""
    if stored not in DTYPES:
        raise ValueError(
            f"{where}: {name} is stored as {stored}, expected one of {', '.join(DTYPES)}; integers are what "
            "bitsandbytes, GPTQ or AWQ leave: name the checkpoint that was quantised"
        )


def and_more(names: Sequence[str]) -> str:
    """How many follow the first, in brackets; nothing where none do."""
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
