"""The schedule of a run: a supervised start, then rounds of collect, learn, trial.

      scripted experts --demonstrations--> learner (supervised start) --> parameter server (version 0)
                                                                               |
      +--> collect:  rollout actors <-> policy actors (version v) --trajectories--> store
      |    learn:    store --pairs, successes--> learner --adapter--> parameter server (candidate)
      |    trial:    the candidate drives cells that v has just driven; promoted unless significantly worse
      +------------- the version in force drives the next round

| stage   | consumes                    | produces                 | waits for               |
|---------|-----------------------------|--------------------------|-------------------------|
| collect | cells, a version            | trajectories, durably    | every cell of the round |
| learn   | pairs, successes, demos     | a candidate, or a trip   | the optimizer steps     |
| trial   | canary cells, two versions  | promotion or rollback    | every canary cell       |

Two schedules, one function each: `synchronous` alternates the stages; `overlapped` collects the next round with the
version in force while the learner works, so trajectories are at most one version behind.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.cells import training_cells
from actors.checks import check_hash, check_policy, check_start
from actors.crew import Crew
from actors.demonstrations import make_start
from actors.learning import (
    Origin,
    Update,
    Version,
    begin,
    begin_update,
    end_update,
    last_good,
    publish,
)
from actors.placement import check_fits, connect
from actors.run_folder import OWN_RUN, RunFolder, check_writable, report_early_end, serve_page
from actors.stages import Outcomes, drive, record_stack, take_fingerprint, take_recorded, trial
from actors.trackers import check_tracking
from configs.loader import load_recipe
from configs.schema import Recipe
from dashboard.report import write_report
from envs.assets import ResolvedAssets, resolve_assets
from envs.experts import require_experts
from envs.fingerprint import differences, read_fingerprint
from envs.protocol import held_out_cells, mcnemar, wilson
from trajectories.records import Cell


def train(recipe: Recipe, *, resume: Path | None = None) -> dict[str, Any]:
    """Run a recipe from start to report, or go on with the run in the folder `resume`, which is of this recipe.

    Returns the result that is also written to `result.json`. Before any actor starts, raises PlacementError when the
    cluster is too small, PublishedError for published weights that do not fit, RecipeError, CheckpointError or
    FingerprintError for a start that is missing, damaged or of another world, RecipeError for a folder that cannot be
    written, NoExpertError for a task that nothing can demonstrate, and FileNotFoundError for missing assets.
    """
    started = time.monotonic()
    check_tracking(recipe.tracking)
    size = check_policy(recipe)
    assets = resolve_assets(recipe.environment.assets)
    if recipe.start is not None:
        check_start(Path(recipe.start), recipe, assets)
    elif recipe.demonstrated:
        require_experts(recipe.tasks.suite, recipe.tasks.task_ids)
    if resume is None:
        check_writable(Path(recipe.root))
    else:
        check_writable(resume, remedy=OWN_RUN)
    connect(weight_bytes=size)
    check_fits(rollouts=recipe.rollouts, serving=recipe.serving, learner=recipe.learner)
    folder = RunFolder.create(recipe) if resume is None else RunFolder.resume(resume, recipe)
    if recipe.capability.vector is not None and recipe.capability.weight:
        folder.keep_manifest(recipe.capability.vector)
    page = None
    crew = Crew()
    try:
        page = serve_page(recipe.dashboard, folder)
        loop = prepare(recipe, folder, crew, assets)
        before = evaluate(loop, loop.start)
        match recipe.schedule:
            case "synchronous":
                good = synchronous(loop)
            case "overlapped":
                good = overlapped(loop)
        after = evaluate(loop, good) if good is not loop.start else before
        result = summarize(recipe, folder, assets, before, after, wall_s=time.monotonic() - started)
        write_report(folder.path)
        return result
    except BaseException:
        report_early_end(folder.path)
        raise
    finally:
        crew.dismiss()
        folder.release()
        if page is not None:
            page.stop()


@dataclass(frozen=True, kw_only=True, slots=True)
class Loop:
    """A run whose actors are up and whose start is published."""

    recipe: Recipe
    folder: RunFolder
    crew: Crew
    origin: Origin
    start: Version
    good: Version
    """In force when the schedule begins: the start, unless the run is resumed."""
    first_round: int


def synchronous(loop: Loop) -> Version:
    """Collect, learn, trial, one after the other. Returns the last version in force."""
    good = loop.good
    for index in range(loop.first_round, loop.recipe.rollouts.rounds):
        driven = collect(loop, good, index)
        update = begin_update(loop.crew, loop.folder, good.version, index)
        good = settle(loop, good, update, driven)
    return good


def overlapped(loop: Loop) -> Version:
    """Collect the next round while the learner works on the last one. Returns the last version in force."""
    good, rounds = loop.good, loop.recipe.rollouts.rounds
    driven = collect(loop, good, loop.first_round) if loop.first_round < rounds else Outcomes(version=0)
    for index in range(loop.first_round, rounds):
        update = begin_update(loop.crew, loop.folder, good.version, index)
        ahead = driven if index + 1 == rounds else collect(loop, good, index + 1)
        good = settle(loop, good, update, driven)
        driven = ahead
    return good


def prepare(recipe: Recipe, folder: RunFolder, crew: Crew, assets: ResolvedAssets) -> Loop:
    """Start the actors, train (or take up) the start, publish it as version 0, and find where the schedule begins."""
    crew.start_store(str(folder.path), preference=recipe.preference, seed=recipe.seed)
    crew.start_fleet(recipe, assets=assets, on_event=folder.event)
    stack = take_fingerprint(crew, recipe.tasks, assets=assets, environment=recipe.environment)
    record_stack(folder, stack, start=recipe.start)
    crew.start_learner(recipe)
    checkpoint, demos, trained = make_start(recipe, folder, crew)
    crew.start_serving(
        recipe.serving,
        policy=recipe.policy,
        image_size=recipe.environment.image_size,
        start_checkpoint=str(checkpoint.resolve()),
        saved=str(folder.checkpoints),
        num_shards=recipe.learner.parameter_shards,
    )
    earlier = folder.published()
    start = publish(crew, folder, None)
    check_hash(folder.path, checkpoint, 0, start.content_hash)
    crew.server.rise_above(max(earlier, default=0))
    origin = Origin(checkpoint=checkpoint, demonstrations=tuple(demos), content_hash=start.content_hash)
    good, first = last_good(folder, start) if folder.resumed else (start, 0)
    begin(crew, folder, origin, good, trained=trained)
    if folder.resumed:
        folder.event({"event": "resumed", "version": good.version, "next_round": first})
    return Loop(
        recipe=recipe, folder=folder, crew=crew, origin=origin, start=start, good=good, first_round=first
    )


def collect(loop: Loop, good: Version, index: int) -> Outcomes:
    """One round of rollouts with the version in force; the start's first one may have been driven before. A round that
    an earlier process of this run began is ended with the version that it was begun with."""
    recipe = loop.recipe
    begun = [record["policy_version"] for record in loop.folder.driven("rollout", index)]
    cells = training_cells(recipe.tasks, recipe.rollouts, index)
    return recorded(loop, good, cells, phase="rollout", round_index=index, keep=True) or drive(
        loop.crew,
        loop.folder,
        cells,
        version=begun[0] if begun else good.version,
        temperature=recipe.policy.temperature,
        phase="rollout",
        round_index=index,
        keep=True,
    )


def settle(loop: Loop, good: Version, update: Update, driven: Outcomes) -> Version:
    """End an update and try what it learned; returns the version in force afterwards."""
    recipe, crew, folder = loop.recipe, loop.crew, loop.folder
    candidate = end_update(crew, folder, loop.origin, update, good=good, steps=recipe.preference.steps)
    if candidate is None:
        return good
    return trial(
        crew,
        folder,
        loop.origin,
        recipe.guard,
        good=good,
        candidate=candidate,
        driven=driven,
        temperature=recipe.policy.temperature,
        round_index=update.round_index,
    )


def recorded(
    loop: Loop, version: Version, cells: Sequence[Cell], *, phase: str, round_index: int, keep: bool
) -> Outcomes | None:
    """These cells as the run whose start was taken up has driven them, when it did so with these very weights, in the
    same way and on the same stack: to drive them again would give the same. None otherwise."""
    recipe, folder = loop.recipe, loop.folder
    if (
        recipe.start is None
        or version.adapter is not None
        or folder.driven(phase, round_index)
        or differences(read_fingerprint(Path(recipe.start)), read_fingerprint(folder.path))
    ):
        return None
    source = load_recipe(Path(recipe.start) / "recipe.yaml")
    ways = (
        (r.environment, r.policy, r.serving.engine, r.serving.gpus_per_actor > 0, r.evaluation.temperature)
        for r in (source, recipe)
    )
    if next(ways) != next(ways):
        return None
    return take_recorded(
        loop.crew,
        folder,
        Path(recipe.start),
        cells,
        version=version,
        phase=phase,
        round_index=round_index,
        keep=keep,
    )


def evaluate(loop: Loop, version: Version) -> Outcomes:
    """Drive the held-out manifest with a version. Nothing of it is stored for training."""
    part = loop.recipe.evaluation
    cells = held_out_cells(loop.recipe.tasks, part.sampling_seeds)
    return recorded(loop, version, cells, phase="evaluation", round_index=-1, keep=False) or drive(
        loop.crew,
        loop.folder,
        cells,
        version=version.version,
        temperature=loop.recipe.policy.temperature if part.temperature is None else part.temperature,
        phase="evaluation",
        round_index=-1,
        keep=False,
    )


def summarize(
    recipe: Recipe,
    folder: RunFolder,
    assets: ResolvedAssets,
    before: Outcomes,
    after: Outcomes,
    *,
    wall_s: float,
) -> dict[str, Any]:
    """Write and return the result: paired held-out success before and after."""
    shared = sorted(before.success.keys() & after.success.keys())
    if not shared:
        raise RuntimeError("no held-out episode ended without a fault; see events.jsonl for what went wrong")
    first, last = ({c: side.success[c] for c in shared} for side in (before, after))
    test = mcnemar(first, last)
    driven = folder.rollout_throughput()
    result = {
        "suite": recipe.tasks.suite,
        "task_ids": list(recipe.tasks.task_ids),
        "assets": assets.kind,
        "held_out_episodes": len(shared),
        "success_before": round(sum(first.values()) / len(shared), 4),
        "success_after": round(sum(last.values()) / len(shared), 4),
        "wilson_before": [round(x, 4) for x in wilson(sum(first.values()), len(shared))],
        "wilson_after": [round(x, 4) for x in wilson(sum(last.values()), len(shared))],
        "mcnemar_p": float(f"{test.p_value:.3g}"),
        "env_steps_per_s": driven,
        "wall_s": round(wall_s, 1),
    }
    folder.write_json("result.json", result)
    return result
