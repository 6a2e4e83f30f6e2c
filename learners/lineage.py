"""Where weights come from: the run that trained them, and the initial states that they, or what they began with, saw.

A run's `checkpoints/start` says so in its metadata, what `capability merge` made in its MERGED file; both tell of all
ancestors at once, so that nothing has to be where it was when they were made.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from configs.loader import load_recipe
from learners.checkpoint import METADATA, CheckpointError

MERGED = "merged.json"
"""Beside merged weights: what they are, and what they were merged from."""
STATES = "init_states"
"""Key, in either file, of the initial states."""


def recipe_of(weights: str | Path) -> Path | None:
    """The recipe of the run whose `checkpoints/start` these weights are; None where they are none's."""
    recipe = Path(weights).resolve().parent.parent / "recipe.yaml"
    return recipe if recipe.is_file() else None


def states_seen(weights: str | Path) -> list[int]:
    """Initial states, by number, whose demonstrations went into these weights; none of weights that do not say.

    Raises CheckpointError for a file that says so and cannot be read.
    """
    for file in (Path(weights) / MERGED, Path(weights) / METADATA):
        if file.is_file() and (states := read_origin(file).get(STATES)) is not None:
            return _numbers(file, states)
    recipe = recipe_of(weights)
    return list(load_recipe(recipe).tasks.demo_init_states) if recipe is not None else []


def read_origin(file: Path) -> dict[str, Any]:
    """The object in a file of this sort. Raises CheckpointError in one line where there is none."""
    try:
        content = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} is not JSON: {error}; make these weights again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds no object; make these weights again")
    return content


def _numbers(file: Path, states: Any) -> list[int]:
    if not isinstance(states, Sequence) or not all(isinstance(state, int) for state in states):
        raise CheckpointError(
            f"{file}: {STATES} is {states!r}, expected whole numbers; make these weights again"
        )
    return sorted(set(states))
