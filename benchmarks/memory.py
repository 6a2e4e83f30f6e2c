"""Memory that weights of published size take, computed on torch's meta device from the recipes' own settings.

    python -m benchmarks.memory [RECIPE...] [--output FILE]

| column         | what is counted                                                                                     |
|----------------|-----------------------------------------------------------------------------------------------------|
| weights        | one copy in the recipe's dtype                                                                      |
| policy actor   | the versions that it holds (the fleet's and a candidate's)                                          |
| shards         | of all parameter shards together: the pristine base, and the merged versions in the object store    |
| supervised     | the learner in the supervised start: weights, gradients and AdamW's two moments                     |
| update         | the learner in a preference update: weights; adapter with gradients, moments and the copies that a  |
|                | tripped update puts back, in float32; merged weights of the adapted layers and gradients on them    |
| context        | image tokens of one decision, which the towers make for each micro-batch or, kept, once             |
| kept           | what the learner keeps of one decision, in the host's memory: the context, or the images that the   |
|                | towers read where they take less; and its mean row, for the credit                                  |
| decisions      | most that an update holds: every episode, to its step limit, of the rounds and canaries whose       |
|                | versions preference.max_staleness admits, and the demonstrations                                    |
| held           | those decisions in the learner's host memory: as kept, and the images as they were recorded         |

Activations are not counted: they grow with preference.micro_batch, supervised.batch_size and serving.max_batch, and are
measured by `benchmarks.real_size`. Nor is the preference store's own copy of what it hands to the learner.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from actors.placement import LIVE_VERSIONS
from actors.policy import HELD_VERSIONS
from benchmarks.fingerprint import write_json
from benchmarks.published_sizes import Sight, published_network, sight
from configs.loader import load_recipe
from configs.schema import Recipe
from envs.tasks import MAX_STEPS
from policies.autoregressive import AutoregressivePolicy
from policies.flow import FlowPolicy
from policies.published import DTYPES
from policies.weights import adapters
from trajectories.records import PROPRIO_DIM

RECIPES = tuple(
    Path("configs") / f"{name}_libero.yaml" for name in ("openvla", "openvla_oft", "pi0", "pi05", "ddvla")
)
KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
ADAPTER_COPIES = 1 + 1 + 2 + 3
"""Factors, gradients, two moments, and what a tripped update puts back: factors and moments."""


def measure(recipe: Recipe) -> dict[str, Any]:
    """One row: parameters, and bytes as in the table above."""
    network = published_network(recipe.policy)
    parameters = sum(p.numel() for p in network.parameters())
    item = DTYPES[recipe.policy.dtype].itemsize
    weights = parameters * item
    seen = sight(network)
    context, decisions = seen.tokens * seen.width * item, most_decisions(recipe)
    kept = kept_bytes(seen, context)
    recorded = 2 * 3 * recipe.environment.image_size**2
    policy = FlowPolicy if recipe.policy.paradigm == "flow" else AutoregressivePolicy
    adapters.attach(network, recipe.adapter, seed=0, decoders=policy.adapted)
    factors = sum(p.numel() for p in adapters.parameters(network).values())
    adapted = sum(
        layer.get_base_layer().get_parameter("weight").numel()
        for _, layer in adapters.adapted_layers(network)
    )
    merged = 0 if recipe.adapter.dropout else 2 * adapted * item
    if merged and recipe.adapter.method == "dora":
        merged += adapted * torch.float32.itemsize  # kept for the backward pass through the row norms
    # With each trained number go its gradient and AdamW's two moments.
    supervised = 4 * weights
    if recipe.supervised.trains == "adapter":
        supervised = weights + 4 * factors * torch.float32.itemsize + merged
    return {
        "recipe": recipe.name,
        "parameters": parameters,
        "adapter_parameters": factors,
        "dtype": recipe.policy.dtype,
        "weights": weights,
        "policy_actor": HELD_VERSIONS * weights,
        "shards": (1 + LIVE_VERSIONS) * weights,
        "supervised": supervised if recipe.supervised.steps else 0,
        "update": weights + ADAPTER_COPIES * factors * torch.float32.itemsize + merged,
        "context": context,
        "kept": kept,
        "decisions": decisions,
        "held": decisions * (kept + recorded),
    }


def kept_bytes(seen: Sight, context: int) -> int:
    """What `learners.decisions.DecisionPool` keeps of one decision, but for a few numbers."""
    features = (seen.width + PROPRIO_DIM) * torch.float32.itemsize
    return min(context, seen.pixels) + features


def most_decisions(recipe: Recipe) -> int:
    """Decisions that an update of the recipe holds at most."""
    part, tasks = recipe.rollouts, len(recipe.tasks.task_ids)
    states = min(part.init_states_per_round, len(recipe.tasks.train_init_states))
    # A canary drives whole initial states.
    canary = math.ceil(recipe.guard.canary_episodes / part.samples_per_state) * part.samples_per_state
    versions = min(part.rounds, 1 + recipe.preference.max_staleness)
    episodes = versions * (tasks * states * part.samples_per_state + canary)
    if recipe.preference.demo_weight:
        episodes += tasks * recipe.demonstrations.per_task
    steps = recipe.environment.max_steps or MAX_STEPS[recipe.tasks.suite]
    return episodes * math.ceil(steps / recipe.policy.chunk)


def shown(row: Mapping[str, Any]) -> list[str]:
    """A row in words: GiB, and what one decision takes in MiB and KiB."""
    columns = ("weights", "policy_actor", "shards", "supervised", "update")
    sizes = [f"{row[name] / GIB:.1f}" if row[name] else "-" for name in columns]
    return [
        row["recipe"],
        f"{row['parameters']:,}",
        row["dtype"],
        *sizes,
        f"{row['context'] / MIB:.1f} MiB",
        f"{row['kept'] / KIB:.0f} KiB",
        f"{row['decisions']:,}",
        f"{row['held'] / GIB:.1f}",
    ]


def main(
    recipes: Annotated[
        list[Path] | None, typer.Argument(help="recipes; none: those of published weights")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="write the result as JSON")] = None,
) -> None:
    """Compute, print a table, and write JSON when asked."""
    rows = [measure(load_recipe(path)) for path in recipes or RECIPES]
    table = Table(title="GiB of weights, without activations, and of an update's decisions (held)")
    for column in (
        "recipe",
        "parameters",
        "dtype",
        "weights",
        "policy actor",
        "shards",
        "supervised",
        "update",
        "context",
        "kept",
        "decisions",
        "held",
    ):
        table.add_column(column, justify="left" if column in ("recipe", "dtype") else "right")
    for row in rows:
        table.add_row(*shown(row))
    Console(width=160).print(table)
    if output is not None:
        write_json(output, {"unit": "bytes", "rows": rows})


if __name__ == "__main__":
    typer.run(main)
