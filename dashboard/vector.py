"""The capability vector of a run, in its report: how it lies to plain fine-tuning, and the run to it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from dashboard.run_folder import Run
from dashboard.wording import number, table_row

SHOWN = 10
"""Weights in the table, those that the vector changes most first."""


def vector_section(run: Run) -> list[str]:
    """The lines of the section; none of a run that was kept apart from nothing."""
    if not run.vector:
        return []
    layers: Mapping[str, Mapping[str, float]] = run.vector["layers"]
    part = run.recipe.capability
    lines = [
        "## Capability vector",
        "",
        f"`{part.vector}`, of base {run.vector['base_hash'][:12]}; {part.penalty} penalty of weight {part.weight:g}.",
        "",
        table_row("weight", "norm", "norm over plain fine-tuning's", "cosine with it"),
        table_row("---", "---:", "---:", "---:"),
        _row("**all**", _total(layers)),
    ]
    most = sorted(layers.items(), key=lambda item: -item[1]["gamma_norm"])
    lines += [_row(f"`{name}`", layer) for name, layer in most[:SHOWN]]
    if len(layers) > SHOWN:
        lines += ["", f"The {SHOWN} of {len(layers)} weights that it changes most."]
    for stage, what in (("supervised", "the supervised start"), ("learned", "an update")):
        said = [line for line in run.stage(stage) if line.get("vector_cosine") is not None]
        if said:
            last = said[-1]
            lines += [
                "",
                f"After {what}, what had changed lay at a cosine of {last['vector_cosine']:+.4f} to it in the mean "
                f"over weights, {last['vector_cosine_most']:+.4f} at most; the penalty stood at "
                f"{last['orthogonal_penalty']:.3g}.",
            ]
    return lines


def _total(layers: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    return {
        "gamma_norm": math.hypot(*(layer["gamma_norm"] for layer in layers.values())),
        "sft_norm": math.hypot(*(layer["sft_norm"] for layer in layers.values())),
        "inner": sum(layer["inner"] for layer in layers.values()),
    }


def _row(name: str, layer: Mapping[str, Any]) -> str:
    gamma, moved = layer["gamma_norm"], layer["sft_norm"]
    ratio = number(gamma / moved, 3) if moved else "-"
    cosine = number(layer["inner"] / (gamma * moved), 3) if gamma and moved else "-"
    return table_row(name, f"{gamma:.4g}", ratio, cosine)
