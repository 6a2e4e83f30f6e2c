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
from pathlib import Path
from typing import Any

import ray

from actors.cells import training_cells
from actors.checks import check_policy, check_start
from actors.demonstrations import demonstrate
from actors.placement import Crew, check_fits, connect
from actors.run_folder import RunFolder, report_early_end
from actors.stages import (
    Outcomes,
    Version,
    begin_update,
    drive,
    end_update,
    follow,
    publish,
    take_fingerprint,
    take_recorded,
    trial,
)
from actors.trackers import check_tracking
from configs.loader import load_recipe
from configs.schema import Recipe
from dashboard.report import write_report
from envs.assets import ResolvedAssets, resolve_assets
from envs.experts import require_experts
from envs.fingerprint import differences, read_fingerprint
from envs.protocol import held_out_cells, mcnemar, wilson
from trajectories.codec import load_trajectory, save_trajectory
from trajectories.records import Cell, Trajectory


def train(recipe: Recipe) -> dict[str, Any]:
    """Run a recipe from start to report.

    Returns the result that is also written to `result.json`. Before any actor starts, raises PlacementError when the
    cluster is too small, PublishedError for published weights that do not fit, RecipeError, CheckpointError or
    FingerprintError for a start that is missing, damaged or of another world, NoExpertError for a task that nothing can
    demonstrate, and FileNotFoundError for missing assets.
    """
    started = time.monotonic()
    check_tracking(recipe.tracking)
    size = check_policy(recipe)
    assets = resolve_assets(recipe.environment.assets)
    if recipe.start is not None:
        check_start(Path(recipe.start), recipe, assets)
    elif recipe.demonstrated:
        require_experts(recipe.tasks.suite, recipe.tasks.task_ids)
    connect(weight_bytes=size)
    check_fits(rollouts=recipe.rollouts, serving=recipe.serving, learner=recipe.learner)
    folder = RunFolder.create(recipe)
    crew = Crew()
    try:
        start = prepare(recipe, folder, crew, assets)
        before = evaluate(recipe, folder, crew, start)
        match recipe.schedule:
            case "synchronous":
                good = synchronous(recipe, folder, crew, start)
            case "overlapped":
                good = overlapped(recipe, folder, crew, start)
        after = evaluate(recipe, folder, crew, good) if good is not start else before
        result = summarize(recipe, folder, assets, before, after, wall_s=time.monotonic() - started)
        write_report(folder.path)
        return result
    except BaseException:
        report_early_end(folder.path)
        raise
    finally:
        crew.dismiss()
        folder.release()


def synchronous(recipe: Recipe, folder: RunFolder, crew: Crew, start: Version) -> Version:
    """Collect, learn, trial, one after the other. Returns the last version in force."""
    good = start
    for index in range(recipe.rollouts.rounds):
        driven = collect(recipe, folder, crew, good, index)
        update = begin_update(crew, folder, good.version, index)
        good = settle(recipe, folder, crew, good, update, driven, index)
    return good


def overlapped(recipe: Recipe, folder: RunFolder, crew: Crew, start: Version) -> Version:
    """Collect the next round while the learner works on the last one. Returns the last version in force."""
    good = start
    driven = collect(recipe, folder, crew, good, 0) if recipe.rollouts.rounds else Outcomes(version=0)
    for index in range(recipe.rollouts.rounds):
        update = begin_update(crew, folder, good.version, index)
        last = index + 1 == recipe.rollouts.rounds
        ahead = driven if last else collect(recipe, folder, crew, good, index + 1)
        good = settle(recipe, folder, crew, good, update, driven, index)
        driven = ahead
    return good


def prepare(recipe: Recipe, folder: RunFolder, crew: Crew, assets: ResolvedAssets) -> Version:
    """Start the actors, train (or take up) the start, and publish it as version 0."""
    crew.start_store(str(folder.path), preference=recipe.preference, seed=recipe.seed)
    crew.start_fleet(recipe.rollouts, environment=recipe.environment, assets=assets, on_event=folder.event)
    stack = take_fingerprint(crew, recipe.tasks, assets=assets, environment=recipe.environment)
    folder.write_json("fingerprint.json", stack)
    if recipe.start is not None:
        unlike = differences(read_fingerprint(Path(recipe.start)), stack)
        if unlike:
            folder.event({"event": "stack_differs", "start": recipe.start, "reason": "; ".join(unlike)})
    crew.start_learner(recipe)
    checkpoint = folder.checkpoints / "start"
    if recipe.start is None:
        demos: list[Trajectory] = []
        if recipe.demonstrated:
            demos = demonstrate(crew, folder, recipe)
        for demo in demos:
            save_trajectory(folder.demonstrations / demo.trajectory_id, demo)
        training = crew.learner.supervise.remote(demos, folder=str(folder.checkpoints))
        follow(crew, folder, training, label="supervised", total=recipe.supervised.steps)
    else:
        checkpoint = Path(recipe.start) / "checkpoints" / "start"
        saved = sorted((Path(recipe.start) / "demonstrations").iterdir())
        ray.get(crew.learner.load_start.remote(str(checkpoint), [load_trajectory(path) for path in saved]))
    crew.start_serving(
        recipe.serving,
        policy=recipe.policy,
        image_size=recipe.environment.image_size,
        start_checkpoint=str(checkpoint.resolve()),
        saved=str(folder.checkpoints),
        num_shards=recipe.learner.parameter_shards,
    )
    start = publish(crew, folder, None)
    ray.get(crew.learner.attach.remote(start.content_hash))
    return start


def collect(recipe: Recipe, folder: RunFolder, crew: Crew, good: Version, index: int) -> Outcomes:
    """One round of rollouts with the version in force; the start's first one may have been driven before."""
    cells = training_cells(recipe.tasks, recipe.rollouts, index)
    return recorded(
        recipe, folder, crew, good, cells, phase="rollout", round_index=index, keep=True
    ) or drive(
        crew,
        folder,
        cells,
        version=good.version,
        temperature=recipe.policy.temperature,
        phase="rollout",
        round_index=index,
        keep=True,
    )


def settle(
    recipe: Recipe,
    folder: RunFolder,
    crew: Crew,
    good: Version,
    update: ray.ObjectRef,
    driven: Outcomes,
    index: int,
) -> Version:
    """End an update and try what it learned; returns the version in force afterwards."""
    candidate = end_update(crew, folder, update, good=good, steps=recipe.preference.steps, round_index=index)
    if candidate is None:
        return good
    return trial(
        crew,
        folder,
        recipe.guard,
        good=good,
        candidate=candidate,
        driven=driven,
        temperature=recipe.policy.temperature,
        round_index=index,
    )


def recorded(
    recipe: Recipe,
    folder: RunFolder,
    crew: Crew,
    version: Version,
    cells: Sequence[Cell],
    *,
    phase: str,
    round_index: int,
    keep: bool,
) -> Outcomes | None:
    """These cells as the run whose start was taken up has driven them, when it did so with these very weights, in the
    same way and on the same stack: to drive them again would give the same. None otherwise."""
    if (
        recipe.start is None
        or version.adapter is not None
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
        crew,
        folder,
        Path(recipe.start),
        cells,
        version=version,
        phase=phase,
        round_index=round_index,
        keep=keep,
    )


def evaluate(recipe: Recipe, folder: RunFolder, crew: Crew, version: Version) -> Outcomes:
    """Drive the held-out manifest with a version. Nothing of it is stored for training."""
    part = recipe.evaluation
    cells = held_out_cells(recipe.tasks, part.sampling_seeds)
    return recorded(
        recipe, folder, crew, version, cells, phase="evaluation", round_index=-1, keep=False
    ) or drive(
        crew,
        folder,
        cells,
        version=version.version,
        temperature=recipe.policy.temperature if part.temperature is None else part.temperature,
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
