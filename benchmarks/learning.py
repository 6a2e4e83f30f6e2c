"""Does the loop learn? One supervised start per training seed, and from each the same rollouts spent several ways.

    python -m benchmarks.learning [--seeds 0,1,2] [--arms sft,dpo-dora,dpo-lora] [--recipe configs/libero_object.yaml]
    python -m benchmarks.learning --recipe configs/tiny_pi05.yaml --name tiny_pi05 --arms sft,dpo-dora,demos

What is in brackets is the default: the table of docs/results.md. Every run is `launch.py train` on the recipe with the
overrides below, called NAME-ARM-sSEED. It writes every held-out episode to docs/results/NAME.jsonl, what each update
said of itself to NAME-updates.jsonl, and the table to NAME.md. What is in the first, or has finished under runs/, is
not run again, so the benchmark can be stopped and continued; what was run under other settings than are asked for now
is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.comparison import START, write_table
from configs.describe import settings_of
from configs.loader import RecipeError, load_recipe
from configs.schema import Recipe
from trajectories.journal import Journal, read_journal

ARMS: dict[str, tuple[str, ...]] = {
    "demos": (
        "preference.preference_weight=0",
        "preference.anchor_weight=0",
        "preference.success_weight=0",
        "preference.demo_weight=1",
    ),
    "sft": ("preference.preference_weight=0", "preference.anchor_weight=0"),
    "dpo-dora": ("adapter.method=dora",),
    "dpo-lora": ("adapter.method=lora",),
    "beta-found": ("preference.beta=null",),
}
"""What each arm changes in the recipe. `sft` is likelihood of the successes (and demonstrations) alone, `demos`, the
control, the same steps on the demonstrations alone: what more training of the start would have given. `beta-found` is
DPO with the beta that spreads its logits by 1."""

NOTHING = (
    "rollouts.rounds=1",
    "preference.preference_weight=0",
    "preference.proximal_weight=0",
    "preference.anchor_weight=0",
    "preference.success_weight=0",
    "preference.demo_weight=0",
)
"""The start's own run: it drives the first round, which the arms take up, and learns nothing from it."""
PUBLISHED_ARMS = ("sft", "dpo-dora", "dpo-lora")
SEEDS = ("seed", "demonstrations.seed")
"""Settings in which the runs of one arm differ."""
_PLACES = ("name", "root", "start", "rollouts.least_actors", "rollouts.release_after_s")
"""Settings that say where a run lies and who is at work on it, not what it does."""
_ASIDE = ("dashboard.", "deadlines.", "tracking.")
"""Parts that change nothing in what it does."""
_OF_UPDATES = ("preference.", "adapter.", "guard.")
"""Parts that an update alone reads."""


def run_name(name: str, arm: str, seed: int) -> str:
    return f"{name}-{arm}-s{seed}"


def overrides_of(prefix: str, arm: str, seed: int, root: Path, changes: Sequence[str]) -> list[str]:
    """What a run of an arm and a seed changes in the recipe."""
    overrides = [
        f"name={run_name(prefix, arm, seed)}",
        f"seed={seed}",
        f"demonstrations.seed={seed}",
        *changes,
    ]
    if arm == START:
        return [*overrides, *NOTHING]
    return [*overrides, f"start={root / run_name(prefix, START, seed)}", *ARMS[arm]]


def settings(recipe: Recipe) -> dict[str, Any]:
    """Every setting that says what a run does, by its dotted path; a run that learns nothing (the start's own) reads
    none of an update's."""
    told = settings_of(recipe)
    weights = [value for path, value in told.items() if re.fullmatch(r"preference\.\w+_weight", path)]
    unread: tuple[str, ...] = () if any(weights) else _OF_UPDATES
    return {
        path: v for path, v in told.items() if path not in _PLACES and not path.startswith((*unread, *_ASIDE))
    }


def recipe_hash(recipe: Recipe) -> str:
    """Eight digits that are the same for every seed of an arm, and others as soon as any setting differs."""
    told = {path: value for path, value in settings(recipe).items() if path not in SEEDS}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:8]


def check_held(recipe: Recipe, folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Raise RecipeError, in one line, when a run that is to be reused was of another recipe: the run in `folder`, if it
    has finished, or `rows`, its outcomes; rows that do not say theirs are taken as they are."""
    remedy = "give another --name, or remove that run and its rows"
    if (folder / "result.json").is_file():
        there, here = settings(load_recipe(folder / "recipe.yaml")), settings(recipe)
        unlike = [
            f"{key} is {there.get(key, 'unread')} there and {here[key]} here"
            for key in here
            if there.get(key, "unread") != here[key]
        ]
        if unlike:
            raise RecipeError(f"{folder} was run under other settings: {'; '.join(unlike)}; {remedy}")
    asked = recipe_hash(recipe)
    other = next((row["recipe"] for row in rows if row.get("recipe", asked) != asked), None)
    if other is not None:
        raise RecipeError(f"{recipe.name} has outcomes of recipe {other} and {asked} is asked for; {remedy}")


def run_arm(recipe: Path, overrides: Sequence[str], folder: Path) -> None:
    """Run one arm of one training seed, unless it has finished."""
    if (folder / "result.json").is_file():
        return
    command = [sys.executable, "launch.py", "train", str(recipe), *overrides]
    typer.echo(" ".join(command))
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def held_out(folder: Path, version: int, phase: str = "evaluation") -> list[dict[str, Any]]:
    """The evaluation episodes of one version, each cell once."""
    lines = [e for e in read_journal(folder / "episodes.jsonl") if e["phase"] == phase]
    return list({cell_of(e): e for e in lines if e["policy_version"] == version}.values())


def cell_of(episode: Mapping[str, Any]) -> tuple[int, int, int]:
    return episode["task_id"], episode["init_state"], episode["seed"]


def last_version(folder: Path) -> int:
    promoted = [e["version"] for e in read_journal(folder / "events.jsonl") if e["event"] == "promoted"]
    return promoted[-1] if promoted else 0


def rows_of(
    folder: Path, recipe: Recipe, arm: str, seed: int, version: int, phase: str = "evaluation"
) -> list[dict[str, Any]]:
    """Every raw held-out outcome of one version of a run; an episode that ended in a fault has none. `recipe` is what
    the version came of, `phase` what drove it."""
    return [
        {
            "paradigm": recipe.policy.paradigm,
            "arm": arm,
            "recipe": recipe_hash(recipe),
            "training_seed": seed,
            "suite": e["suite"],
            "task": e["task_id"],
            "init_state": e["init_state"],
            "sampling_seed": e["seed"],
            "success": e["success"],
            "policy_version": e["policy_version"],
            "policy_hash": e["policy_hash"],
        }
        for e in held_out(folder, version, phase)
        if e["outcome"] != "fault"
    ]


def updates_of(folder: Path, arm: str, seed: int) -> list[dict[str, Any]]:
    """What every update of a run said of itself: see `learners.terms` and `learners.spread`."""
    learned = [line for line in read_journal(folder / "metrics.jsonl") if line["stage"] == "learned"]
    return [
        {"arm": arm, "training_seed": seed} | {k: v for k, v in line.items() if k not in ("time", "stage")}
        for line in learned
    ]


def measure(
    recipe: Path,
    arms: Sequence[str],
    seeds: Sequence[int],
    file: Path,
    root: Path,
    changes: Sequence[str],
    *,
    run: bool = True,
) -> None:
    """Check that what is held is of this recipe; then, unless not to `run`, run what `file` does not hold yet, seed by
    seed, and add each run's outcomes to it as it finishes. Raises RecipeError as `check_held`."""
    held: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in read_journal(file):
        held.setdefault((row["arm"], row["training_seed"]), []).append(row)
    plan = {}
    for arm, seed in product((START, *arms), seeds):
        overrides = overrides_of(file.stem, arm, seed, root, changes)
        folder, asked = root / run_name(file.stem, arm, seed), load_recipe(recipe, overrides)
        check_held(asked, folder, held.get((arm, seed), []))
        plan[arm, seed] = overrides, folder, asked
    journal = Journal(file, fsync=True)
    updates = Journal(file.with_name(f"{file.stem}-updates.jsonl"), fsync=True)
    for seed, arm in product(seeds, (START, *arms)) if run else ():
        # The start is needed by every arm that is not there yet.
        if all((other, seed) in held for other in ((START, *arms) if arm == START else (arm,))):
            continue
        overrides, folder, asked = plan[arm, seed]
        run_arm(recipe, overrides, folder)
        if (arm, seed) not in held:
            version = 0 if arm == START else last_version(folder)
            journal.extend(rows_of(folder, asked, arm, seed, version))
            if arm != START:
                updates.extend(updates_of(folder, arm, seed))


def main(
    changes: Annotated[list[str] | None, typer.Argument(help="settings to change in every run")] = None,
    recipe: Annotated[Path, typer.Option(help="recipe of every run")] = Path("configs/libero_object.yaml"),
    seeds: Annotated[str, typer.Option(help="training seeds")] = "0,1,2",
    arms: Annotated[str, typer.Option(help="arms to run")] = ",".join(PUBLISHED_ARMS),
    name: Annotated[
        str, typer.Option(help="of the files written, and the first part of every run's")
    ] = "learning",
    output: Annotated[Path, typer.Option(help="folder of the table and the episodes")] = Path("docs/results"),
    report_only: Annotated[bool, typer.Option(help="write from finished runs, run nothing")] = False,
) -> None:
    root = Path("runs")
    chosen, numbers = arms.split(","), [int(s) for s in seeds.split(",")]
    unknown = [arm for arm in chosen if arm not in ARMS]
    if unknown:
        raise typer.BadParameter(f"unknown arm {unknown[0]!r}; known: {', '.join(ARMS)}")
    output.mkdir(parents=True, exist_ok=True)
    file = output / f"{name}.jsonl"
    try:
        measure(recipe, chosen, numbers, file, root, changes or [], run=not report_only)
    except RecipeError as error:
        typer.echo(f"pairloom: {error}", err=True)
        raise typer.Exit(2) from error
    write_table(file, root / run_name(name, START, numbers[0]), changes or [])


if __name__ == "__main__":
    typer.run(main)
