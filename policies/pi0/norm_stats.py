"""Statistics of states and actions as openpi or LeRobot keeps them, and the two scales that are made of them.

openpi maps the 1st and 99th percentile to -1 and 1, without clipping, for pi-0.5 (and pi-0-FAST), and takes z-scores
for pi-0: `src/openpi/transforms.py`, `src/openpi/shared/normalize.py`. LeRobot (`src/lerobot/processor/`) names the
scale of states and of actions in policy_preprocessor.json (its fine-tunes of pi-0.5 on LIBERO take z-scores), beside
the file with their statistics, and has a smaller EPS, which makes no difference that float32 would show.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from policies.weights.files import read_json

STATS_FILE = "norm_stats.json"
PREPROCESSOR = "policy_preprocessor.json"
"""LeRobot's."""
NORMALIZER = "normalizer_processor"
_LEROBOT_FEATURES = {"state": ("observation.state", "STATE"), "actions": ("action", "ACTION")}
"""Our name -> LeRobot's feature, and its type in `norm_map`."""
_LEROBOT_SCALES = ("QUANTILES", "MEAN_STD")
EPS = 1e-6
"""Added to a range or a standard deviation before dividing by it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NormStats:
    """Statistics of the dimensions of one vector, float64 [dims], in the data's own units."""

    mean: np.ndarray
    std: np.ndarray
    q01: np.ndarray | None = None
    """1st percentile; pi-0's statistics may lack it."""
    q99: np.ndarray | None = None

    by_quantile: bool | None = None
    """Which scale, where the file with the statistics says so; none: the model's, as openpi has it."""

    def affine(self, *, quantile: bool, dims: int) -> tuple[np.ndarray, np.ndarray]:
        """Centre and half-width of the first `dims` dimensions: normalised = (x - centre) / half-width; `quantile` is
        the model's scale, and counts unless `by_quantile` says another.

        Raises ValueError when quantiles are asked for and absent, or when `dims` are more than there are.
        """
        if dims > len(self.mean):
            raise ValueError(
                f"{dims} dimensions, but the statistics have {len(self.mean)}; pad after normalising"
            )
        if not (quantile if self.by_quantile is None else self.by_quantile):
            return self.mean[:dims], self.std[:dims] + EPS
        if self.q01 is None or self.q99 is None:
            raise ValueError("the statistics lack q01 and q99, which every policy but pi-0 is normalised by")
        half = (self.q99[:dims] - self.q01[:dims] + EPS) / 2
        return self.q01[:dims] + half, half


def normalise(x: np.ndarray, stats: NormStats, *, quantile: bool) -> np.ndarray:
    """To the model's scale, over the last axis: (x - q01) / (q99 - q01 + 1e-6) * 2 - 1, or (x - mean) / (std + 1e-6).

    A vector shorter than the statistics takes the first ones. Not clipped: the outer 2 % lie outside [-1, 1]. Raises
    ValueError as `NormStats.affine`.
    """
    centre, half = stats.affine(quantile=quantile, dims=x.shape[-1])
    return (x - centre) / half


def pad_dims(x: np.ndarray, dims: int) -> np.ndarray:
    """Zeros behind the last axis up to `dims`. Raises ValueError for more dimensions than that."""
    missing = dims - x.shape[-1]
    if missing < 0:
        raise ValueError(f"{x.shape[-1]} dimensions do not fit the model's {dims}")
    return np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)])


def read_norm_stats(path: str | Path, *, quantile: bool) -> dict[str, NormStats]:
    """`state` and `actions` from openpi's `norm_stats.json` or LeRobot's `policy_preprocessor.json`: the file, its
    folder or a checkpoint's.

    Raises ValueError in one line: no such file or several, no JSON, or an entry or statistic that is absent, not
    finite, or of another length than its neighbours; of LeRobot's also where it scales by neither quantiles nor
    z-scores.
    """
    file = _find(Path(path))
    content = read_json(file)
    if file.name == PREPROCESSOR:
        return _lerobot_stats(file, content)
    entries = content.get("norm_stats")
    if not isinstance(entries, dict):
        raise ValueError(f"{file} lacks the object 'norm_stats'")
    return {name: _entry(file, entries, name, quantile=quantile) for name in ("state", "actions")}


def _lerobot_stats(file: Path, content: Mapping[str, Any]) -> dict[str, NormStats]:
    steps = content.get("steps")
    known = [step for step in steps if isinstance(step, dict)] if isinstance(steps, list) else []
    found = [step for step in known if step.get("registry_name") == NORMALIZER]
    if len(found) != 1 or not isinstance(found[0].get("state_file"), str):
        raise ValueError(f"{file} names no state_file of one {NORMALIZER}, in which statistics would be")
    config = found[0].get("config")
    scales = config.get("norm_map") if isinstance(config, dict) else None
    tensors = file.parent / Path(found[0]["state_file"]).name
    try:
        held = load_file(tensors)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{tensors}, which {file.name} names, cannot be read: {error}") from error
    stats = {}
    for name, (feature, kind) in _LEROBOT_FEATURES.items():
        scaled = scales.get(kind) if isinstance(scales, dict) else None
        if scaled not in _LEROBOT_SCALES:
            raise ValueError(
                f"{file} scales {kind} by {scaled!r}, expected one of {', '.join(_LEROBOT_SCALES)}; write openpi's "
                f"{STATS_FILE}, and name it as policy.norm_stats"
            )
        entry = {
            key: held[f"{feature}.{key}"].tolist()
            for key in ("mean", "std", "q01", "q99")
            if f"{feature}.{key}" in held
        }
        quantile = scaled == "QUANTILES"
        stats[name] = replace(_entry(tensors, {name: entry}, name, quantile=quantile), by_quantile=quantile)
    return stats


def _find(path: Path) -> Path:
    if path.is_file():
        return path
    files = (
        [path / STATS_FILE] if (path / STATS_FILE).is_file() else sorted((path / "assets").rglob(STATS_FILE))
    )
    if not files and (path / PREPROCESSOR).is_file():
        return path / PREPROCESSOR
    if not files:
        raise ValueError(
            f"{path} has no {STATS_FILE}, nor have its assets, nor has it LeRobot's {PREPROCESSOR}; without one "
            "actions have no scale"
        )
    if len(files) > 1:
        names = ", ".join(str(file.relative_to(path).parent) for file in files)
        raise ValueError(f"{path} has {len(files)} of {STATS_FILE} ({names}); name the folder of one")
    return files[0]


def _entry(file: Path, entries: Mapping[str, Any], name: str, *, quantile: bool) -> NormStats:
    entry = entries.get(name)
    if not isinstance(entry, dict):
        raise ValueError(f"{file} lacks norm_stats.{name}; it has {sorted(entries)}")
    found: dict[str, np.ndarray] = {}
    for key in ("mean", "std", "q01", "q99"):
        if entry.get(key) is None:
            if quantile or key in ("mean", "std"):
                raise ValueError(f"{file} lacks norm_stats.{name}.{key}")
            continue
        try:
            values = np.asarray(entry[key], dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{file}: norm_stats.{name}.{key} is no list of numbers") from error
        dims = len(found["mean"]) if found else values.size
        if values.shape != (dims,) or not dims or not np.isfinite(values).all():
            raise ValueError(
                f"{file}: norm_stats.{name}.{key} is {entry[key]!r}, expected {dims or 'some'} finite numbers"
            )
        found[key] = values
    if (found["std"] < 0).any():
        raise ValueError(f"{file}: norm_stats.{name}.std is {entry['std']!r}, expected none below 0")
    if "q01" in found and "q99" in found and (found["q01"] > found["q99"]).any():
        raise ValueError(f"{file}: norm_stats.{name} has a q01 above its q99, which would turn motions round")
    return NormStats(mean=found["mean"], std=found["std"], q01=found.get("q01"), q99=found.get("q99"))
