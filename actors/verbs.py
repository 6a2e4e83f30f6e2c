"""The verbs beside `train`: evaluate a finished run's policy, collect demonstrations."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from actors.checks import check_hash, check_served
from actors.crew import Crew
from actors.demonstrations import demonstrate
from actors.parameter_server import version_name
from actors.placement import check_fits, connect
from actors.run_folder import OWN_RUN, RunFolder, check_writable
from actors.stages import Outcomes, drive, take_fingerprint
from configs.loader import RecipeError, load_recipe
from configs.schema import Recipe
from envs.assets import ResolvedAssets, resolve_assets
from envs.experts import require_experts
from envs.fingerprint import differences, read_fingerprint
from envs.protocol import held_out_cells, published_cells, wilson
from learners.checkpoint import load_checkpoint, verify
from policies.weights.adapter_files import adapter_from_tensors
from trajectories.journal import read_journal
from trajectories.records import AdapterWeights, Cell

log = logging.getLogger(__name__)


def collect_demonstrations(recipe: Recipe) -> dict[str, Any]:
    """Run the scripted experts of a recipe; successful demonstrations go to `<root>/<name>/demonstrations/`.

    Returns the counts and the folder. Raises what `train` raises before its actors start.
    """
    require_experts(recipe.tasks.suite, recipe.tasks.task_ids)
    assets = resolve_assets(recipe.environment.assets)
    check_writable(Path(recipe.root))
    with _crew(recipe, assets, lambda: RunFolder.create(recipe)) as (crew, folder):
        demos = demonstrate(crew, folder, recipe)
        tried = sum(1 for _ in read_journal(folder.path / "episodes.jsonl"))
    return {"folder": str(folder.demonstrations), "kept": len(demos), "tried": tried}


def evaluate_run(
    path: Path, *, version: int | None, manifest: str, tasks: str | None = None
) -> dict[str, Any]:
    """Drive a finished run's policy over a manifest of cells; appends to the run's episodes.jsonl.

    Args:
        path: run folder.
        version: a published version; none: the last promoted one (0 when none was).
        manifest: `held-out` (the recipe's own) or `published` (10 tasks x 50 initial states).
        tasks: of the suite, such as `1,8`: drive their held-out states instead of those of the recipe's tasks.

    Returns:
        The rate, its interval, the kind of assets, and a warning (logged too) for each difference between this stack
        and the run's.

    Raises:
        RecipeError: no such run, version or manifest, or the run's folder cannot be written.
        CheckpointError: the weights are damaged, or are not those that the run published.
        FolderLockedError: the run is still going on.
        PublishedError: the checkpoint that the run began with is not there any more.
    """
    if not (path / "recipe.yaml").is_file():
        raise RecipeError(f"{path} is not a run folder: it has no recipe.yaml")
    recipe = load_recipe(path / "recipe.yaml", [])
    version = last_promoted(path) if version is None else version
    start = Path(recipe.start) if recipe.start else path
    verify(start / "checkpoints" / "start")
    adapter = _adapter(path, version)
    cells = _cells(recipe if tasks is None else _of_tasks(path, tasks, manifest), manifest)
    assets = resolve_assets(recipe.environment.assets)
    check_writable(path, remedy=OWN_RUN)
    size = check_served(recipe)
    with _crew(recipe, assets, lambda: RunFolder.open(path), weight_bytes=size) as (crew, folder):
        stack = take_fingerprint(crew, recipe.tasks, assets=assets, environment=recipe.environment)
        warnings = _differences_from(path, stack)
        _start_serving(crew, folder, recipe, start)
        published, content_hash = crew.server.publish(adapter, version=version)
        check_hash(path, start, version, content_hash)
        temperature = recipe.evaluation.temperature
        out = drive(
            crew,
            folder,
            cells,
            version=published,
            temperature=recipe.policy.temperature if temperature is None else temperature,
            phase=f"evaluation-{manifest}",
            round_index=-1,
            keep=False,
        )
    return {
        "run": str(path),
        "version": version,
        "hash": content_hash,
        "manifest": manifest,
        "assets": assets.kind,
        **_rates(out),
        "differs_from_published": stack["differs_from_published"],
        "warnings": warnings,
    }


def _start_serving(crew: Crew, folder: RunFolder, recipe: Recipe, start: Path) -> None:
    crew.start_serving(
        recipe.serving,
        policy=recipe.policy,
        image_size=recipe.environment.image_size,
        start_checkpoint=str((start / "checkpoints" / "start").resolve()),
        saved=str(folder.checkpoints.resolve()),
        num_shards=recipe.learner.parameter_shards,
    )


def _rates(out: Outcomes) -> dict[str, Any]:
    return {
        "episodes": len(out.success),
        "success": round(out.rate, 4),
        "wilson": [round(x, 4) for x in wilson(sum(out.success.values()), len(out.success))],
        "faults": len(out.faulted),
    }


def last_promoted(path: Path) -> int:
    """The version in force when a run ended."""
    promoted = [e["version"] for e in read_journal(path / "events.jsonl") if e["event"] == "promoted"]
    return promoted[-1] if promoted else 0


def _of_tasks(path: Path, tasks: str, manifest: str) -> Recipe:
    """A run's recipe, of other tasks."""
    if manifest != "held-out":
        raise RecipeError(
            f"--tasks {tasks} goes with the held-out manifest; the {manifest} one is of all tasks"
        )
    override = f"tasks.task_ids=[{tasks}]"
    try:
        return load_recipe(path / "recipe.yaml", [override])
    except RecipeError as error:
        raise RecipeError(str(error).replace(f"override {override}", f"--tasks {tasks}")) from error


def _cells(recipe: Recipe, manifest: str) -> tuple[Cell, ...]:
    match manifest:
        case "held-out":
            return held_out_cells(recipe.tasks, recipe.evaluation.sampling_seeds)
        case "published":
            return published_cells(recipe.tasks.suite)
    raise RecipeError(f"manifest must be held-out or published, got {manifest!r}")


def _differences_from(path: Path, stack: dict[str, Any]) -> list[str]:
    """One line, logged too, for each difference between a run's stack and this one."""
    lines = differences(read_fingerprint(path), stack)
    if lines:
        log.warning("the stack differs from the run's: %s", "; ".join(lines))
    return lines


def _adapter(path: Path, version: int) -> AdapterWeights | None:
    if version == 0:
        return None
    checkpoint = path / "checkpoints" / version_name(version)
    if not checkpoint.is_dir():
        held = sorted(p.name for p in (path / "checkpoints").glob("v*"))
        raise RecipeError(
            f"{path} holds no version {version}; it has the start and {', '.join(held) or 'no others'}"
        )
    tensors, metadata = load_checkpoint(checkpoint)
    return adapter_from_tensors(tensors, metadata)


@contextmanager
def _crew(
    recipe: Recipe, assets: ResolvedAssets, make_folder: Callable[[], RunFolder], *, weight_bytes: int = 0
) -> Iterator[tuple[Crew, RunFolder]]:
    """A fleet of rollout actors and the run folder they report to."""
    connect(weight_bytes=weight_bytes)
    check_fits(rollouts=recipe.rollouts, serving=recipe.serving, learner=recipe.learner)
    folder = make_folder()
    crew = Crew()
    try:
        crew.start_fleet(recipe, assets=assets, on_event=folder.event)
        yield crew, folder
    finally:
        crew.dismiss()
        folder.release()
