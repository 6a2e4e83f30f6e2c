"""Where weights come from: the run that trained them, and the initial states that they, or what they began with, saw.

A run's `checkpoints/start` says so in its metadata, what `capability merge` made in its MERGED file; both tell of all
ancestors at once, so that nothing has to be where it was when they were made. Runs from before they did are asked for
their recipes instead, one after another.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from configs.loader import load_recipe
from learners.checkpoint import MANIFEST, METADATA, CheckpointError
from policies.weights.files import read_json

MERGED = "merged.json"
"""Beside merged weights: what they are, and what they were merged from."""
STATES = "init_states"
"""Key, in either file, of the initial states."""


def recipe_of(weights: str | Path) -> Path | None:
    """The recipe of the run whose `checkpoints/start` these weights are; None where they are none's."""
    start = Path(weights).resolve()
    recipe = start.parent.parent / "recipe.yaml"
    return (
        recipe if (start.parent.name, start.name) == ("checkpoints", "start") and recipe.is_file() else None
    )


def states_seen(weights: str | Path) -> list[int]:
    """Initial states, by number, whose demonstrations went into these weights; none of weights that are no run's and
    were not merged here.

    Raises CheckpointError where they ought to say so and do not, or where what they began with is gone.
    """
    weights = Path(weights)
    if (weights / MERGED).is_file():
        origin = read_origin(weights / MERGED)
        if STATES not in origin:
            raise CheckpointError(f"{weights / MERGED} does not say which {STATES} were seen; merge again")
        return _numbers(weights / MERGED, origin[STATES])
    if (weights / MANIFEST).is_file() and (weights / METADATA).is_file():  # a checkpoint of ours
        states = read_origin(weights / METADATA).get(STATES)
        if states is not None:
            return _numbers(weights / METADATA, states)
    source = recipe_of(weights)
    return [] if source is None else _by_recipe(weights, source)


def _by_recipe(weights: Path, source: Path) -> list[int]:
    recipe = load_recipe(source)
    seen = set(recipe.tasks.demo_init_states)
    for began in (recipe.supervised.init, recipe.policy.checkpoint):
        if began is None:
            continue
        if not Path(began).is_dir():
            raise CheckpointError(
                f"{weights} does not say which initial states it has seen, and {began}, which it began with, is gone; "
                "put that back, or train again"
            )
        seen |= set(states_seen(began))
    return sorted(seen)


def read_origin(file: Path) -> dict[str, Any]:
    """The object in a file of this sort. Raises CheckpointError in one line where there is none."""
    try:
        return read_json(file)
    except ValueError as error:
        raise CheckpointError(f"{error}; make these weights again") from error


def _numbers(file: Path, states: Any) -> list[int]:
    if not isinstance(states, Sequence) or not all(isinstance(state, int) for state in states):
        raise CheckpointError(
            f"{file}: {STATES} is {states!r}, expected whole numbers; make these weights again"
        )
    return sorted(set(states))
