"""What is each part of an update worth? One round's rollouts, learned from in several ways, each driven held-out.

    python -m benchmarks.updates RUN [--base RECIPE] [--variants NAME,...]

RUN is a finished run of `benchmarks.learning` that began from another run's start (say runs/learning-sft-s0). Its first
round of rollouts, driven by that start, is what every variant learns from, under the base recipe with the run's seeds
and the variant's changes; so variants differ in the update alone. Held-out episodes go to docs/results/updates.jsonl,
what each update measured of itself to docs/results/updates-reports.jsonl, and the table is written to
docs/results/updates.md. A variant that is in the file is not run again.
"""

from __future__ import annotations

import actors  # noqa: F401  (before ray: it settles how ray authenticates)

# isort: split
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import ray
import typer

from actors.cells import training_cells
from actors.crew import Crew
from actors.learning import Origin, Version, publish
from actors.pipeline import Loop, evaluate
from actors.placement import connect
from actors.run_folder import RunFolder
from benchmarks.comparison import START, write_table
from benchmarks.learning import recipe_hash, rows_of
from configs.loader import RecipeError, load_recipe
from configs.schema import Recipe
from envs.assets import resolve_assets
from preferences.pairing import candidate_of, mine_pairs
from trajectories.codec import load_trajectory
from trajectories.journal import Journal, read_journal
from trajectories.records import PreferencePair, Trajectory

VARIANTS: dict[str, tuple[str, ...]] = {
    "sft": ("preference.preference_weight=0", "preference.anchor_weight=0"),
    "sft-lr-5e-4": ("preference.preference_weight=0", "preference.anchor_weight=0", "preference.lr=5e-4"),
    "anchor": ("preference.preference_weight=0",),
    "dpo": (),
    "dpo-beta-found": ("preference.beta=null",),
    "dpo-weight-1": ("preference.preference_weight=1", "preference.rejected_floor=0.2"),
    "dpo-weight-1-beta-1": (
        "preference.preference_weight=1",
        "preference.beta=1",
        "preference.decisions_per_trajectory=8",
    ),
    "dpo-whole-trajectories": (
        "preference.credit=uniform",
        "preference.preference_weight=1",
        "preference.beta=0.02",
        "preference.rejected_floor=0.2",
        "preference.decisions_per_trajectory=12",
    ),
}
"""Changes to the recipe. `sft` is likelihood of the successes (and demonstrations) alone, `anchor` adds that of
the chosen sides' decisive chunks, `dpo` (no change) the preference itself."""


class Round:
    """The rollouts of a run's supervised start, and actors to learn from them and to drive what was learned."""

    def __init__(self, run: Path, folder: RunFolder, recipe: Recipe) -> None:
        self.folder, self.recipe = folder, recipe
        ran = load_recipe(run / "recipe.yaml")
        start = start_of(run)
        self._checkpoint = str((start / "checkpoints" / "start").resolve())
        cells = set(training_cells(ran.tasks, ran.rollouts, 0))
        driven = [load_trajectory(path) for path in sorted((run / "trajectories").iterdir())]
        trajectories = {t.trajectory_id: t for t in driven if t.policy_version == 0 and t.cell in cells}
        self._data = (
            ray.put(_pairs(trajectories, recipe)),
            ray.put([t for t in trajectories.values() if t.success]),
        )
        self._demos = [load_trajectory(path) for path in sorted((start / "demonstrations").iterdir())]
        self._crew = Crew()
        self._crew.start_store(str(folder.path), preference=recipe.preference, seed=recipe.seed)
        self._crew.start_fleet(
            recipe,
            assets=resolve_assets(recipe.environment.assets),
            on_event=folder.event,
        )
        self._crew.start_serving(
            recipe.serving,
            policy=recipe.policy,
            image_size=recipe.environment.image_size,
            start_checkpoint=self._checkpoint,
            saved=str(folder.checkpoints),
            num_shards=recipe.learner.parameter_shards,
        )
        self._start = publish(self._crew, folder, None)

    def drive_start(self) -> None:
        evaluate(self._loop(self.recipe), self._start)

    def _loop(self, recipe: Recipe) -> Loop:
        origin = Origin(
            checkpoint=Path(self._checkpoint),
            demonstrations=tuple(self._demos),
            content_hash=self._start.content_hash,
        )
        return Loop(
            recipe=recipe,
            folder=self.folder,
            crew=self._crew,
            origin=origin,
            start=self._start,
            good=self._start,
            first_round=0,
        )

    def learn(self, recipe: Recipe) -> tuple[dict[str, Any], Version | None]:
        """Learn from the round under another recipe; what the update says of itself, and what it gave."""
        self._crew.start_learner(recipe)
        learner = self._crew.learner
        ray.get(learner.load_start.remote(self._checkpoint, self._demos))
        ray.get(learner.attach.remote(self._start.content_hash))
        report, adapter = ray.get(learner.update.remote(*self._data))
        ray.kill(learner)
        if report.stopped:
            return report.summary(), None
        version = publish(self._crew, self.folder, adapter, keep=[0])
        evaluate(self._loop(recipe), version)
        return report.summary(), version

    def dismiss(self) -> None:
        self._crew.dismiss()


def _pairs(trajectories: dict[str, Trajectory], recipe: Recipe) -> list[PreferencePair]:
    part = recipe.preference
    refs, _ = mine_pairs(
        [candidate_of(t) for t in trajectories.values()],
        current_version=0,
        max_staleness=part.max_staleness,
        pairs_per_state=part.pairs_per_state,
        seed=recipe.seed,
    )
    return [PreferencePair(chosen=trajectories[r.chosen], rejected=trajectories[r.rejected]) for r in refs]


def start_of(run: Path) -> Path:
    """The run folder whose start a run took up. Raises RecipeError when it made its own."""
    start = load_recipe(run / "recipe.yaml").start
    if start is None:
        raise RecipeError(f"{run} trained its own start; name a run that began from another's (start=...)")
    return Path(start)


def recipe_for(run: Path, base: Path, changes: Sequence[str] = ()) -> Recipe:
    """The recipe `base` with a run's seeds and some changes. Raises RecipeError where the run was of other tasks,
    another environment or another policy."""
    ran = load_recipe(run / "recipe.yaml")
    seeds = (f"seed={ran.seed}", f"demonstrations.seed={ran.demonstrations.seed}")
    recipe = load_recipe(base, [*seeds, *changes])
    for part in ("tasks", "environment", "policy"):
        if getattr(recipe, part) != getattr(ran, part):
            raise RecipeError(f"{run} was of another {part} than {base}; name the recipe it was run with")
    return recipe


def measure(run: Path, base: Path, variants: list[str], file: Path, notes: Path) -> None:
    """Run what `file` does not hold yet, and add each variant's outcomes to it as it finishes."""
    recipe = recipe_for(run, base)
    seed = recipe.seed
    rows = read_journal(file)
    held = {(row["arm"], row["training_seed"]) for row in rows}
    missing = [name for name in (START, *variants) if (name, seed) not in held]
    if not missing:
        return
    started = [row for row in rows if (row["arm"], row["training_seed"]) == (START, seed)]
    connect()
    journal, said = Journal(file, fsync=True), Journal(notes, fsync=True)
    folder = RunFolder.create(recipe.model_copy(update={"name": f"updates-s{seed}"}))
    this = Round(run, folder, recipe)
    try:
        for name in missing:
            version: Version | None = None
            changed = recipe if name == START else recipe_for(run, base, VARIANTS[name])
            if name == START:
                this.drive_start()
                started = rows_of(folder.path, recipe, START, seed, 0)
            else:
                report, version = this.learn(changed)
                if report["stopped"] == "skipped":
                    raise RecipeError(f"{name} had nothing to learn from: {report['reason']}")
                said.append({"arm": name, "training_seed": seed, "changes": VARIANTS[name], **report})
            # An update that the tripwire undid leaves the start in force.
            mine = rows_of(folder.path, changed, name, seed, version.version) if version else started
            journal.extend([row | {"arm": name, "recipe": recipe_hash(changed)} for row in mine])
    finally:
        this.dismiss()


def main(
    run: Annotated[Path, typer.Argument(help="a finished run that began from another run's start")],
    base: Annotated[Path, typer.Option(help="recipe that the variants change")] = Path(
        "configs/libero_object.yaml"
    ),
    variants: Annotated[str, typer.Option(help="variants to run")] = ",".join(VARIANTS),
    output: Annotated[Path, typer.Option(help="folder of the table and the episodes")] = Path("docs/results"),
) -> None:
    chosen = variants.split(",")
    unknown = [name for name in chosen if name not in VARIANTS]
    if unknown:
        raise typer.BadParameter(f"unknown variant {unknown[0]!r}; known: {', '.join(VARIANTS)}")
    output.mkdir(parents=True, exist_ok=True)
    file = output / "updates.jsonl"
    try:
        measure(run, base, chosen, file, output / "updates-reports.jsonl")
    except RecipeError as error:
        typer.echo(f"pairloom: {error}", err=True)
        raise typer.Exit(2) from error
    write_table(file, start_of(run))


if __name__ == "__main__":
    typer.run(main)
