"""What is looked at before any actor starts: the recipe's policy, and the run that it starts from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from configs.describe import settings_of
from configs.loader import RecipeError, load_recipe
from configs.policy import PolicyPart
from configs.schema import Recipe
from envs.assets import ResolvedAssets
from envs.fingerprint import read_fingerprint, require_same_world
from learners.capability import Vector, read_manifest
from learners.checkpoint import CheckpointError, verify
from learners.lineage import recipe_of, states_seen
from learners.merging import descends
from policies.make import make_policy
from policies.published import check_published, published_shapes, weight_names
from policies.weights.shards import ShardFolder
from trajectories.journal import read_journal


def check_served(recipe: Recipe) -> int:
    """Bytes of one copy of published weights, once they are found to fit; 0 for a policy made here.

    Raises PublishedError naming what is wrong with `policy.checkpoint`. This is all that driving a run's policy needs.
    """
    if recipe.policy.checkpoint is None:
        return 0
    return check_published(recipe.policy, image_size=recipe.environment.image_size)


def check_policy(recipe: Recipe) -> int:
    """What `check_served` does, before training.

    Raises, besides, RecipeError unless a policy can be built of the recipe's sizes, for which no memory is taken, and
    unless the weights and the capability vector that training is to begin with are of that policy, and CheckpointError
    or CapabilityError for damaged ones.
    """
    size = check_served(recipe)
    vector = recipe.capability.vector if recipe.capability.weight else None
    if vector is not None:
        gammas = Vector(vector, names=weight_names(recipe.policy))
        _require_unseen("capability.vector", vector, read_manifest(vector).init_states, recipe)
    if recipe.policy.checkpoint is not None:
        _require_unseen(
            "policy.checkpoint", recipe.policy.checkpoint, states_seen(recipe.policy.checkpoint), recipe
        )
        if vector is not None:
            _check_base(recipe, vector)
            _check_known(f"capability.vector: {vector}", gammas, published_shapes(recipe.policy))
        return size
    try:
        with torch.device("meta"):
            policy = make_policy(
                recipe.policy, image_size=recipe.environment.image_size, seed=0, device=torch.device("meta")
            )
    except ValueError as error:
        raise RecipeError(f"policy: {error}") from error
    shapes = {name: tuple(tensor.shape) for name, tensor in policy.module.state_dict().items()}
    if recipe.start is None and recipe.supervised.init is not None:
        _check_init(recipe, recipe.supervised.init, shapes)
    if vector is not None:
        _check_weights("capability.vector", vector, shapes)
        _check_base(recipe, vector)
    return 0


def _check_base(recipe: Recipe, vector: str) -> None:
    """Raise RecipeError unless what training begins with, or began with in the run whose start it is, is the vector's
    base, or was merged from it."""
    seen: list[str] = []
    begins = _begins_with(recipe)
    while begins is not None:
        if descends(begins, vector):
            return
        seen.append(str(begins))
        source = recipe_of(begins)
        begins = _begins_with(load_recipe(source)) if source is not None else None
    raise RecipeError(
        f"capability.vector: {vector} was extracted from another base than {' and '.join(seen) or 'random weights'}, "
        "which this run begins with; name a vector of these weights, or as supervised.init the base that it came from"
    )


def _begins_with(recipe: Recipe) -> Path | None:
    if recipe.start is not None:
        return Path(recipe.start) / "checkpoints" / "start"
    begins = recipe.supervised.init or recipe.policy.checkpoint
    return None if begins is None else Path(begins)


def _check_init(recipe: Recipe, init: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise RecipeError or CheckpointError unless training can begin with these weights."""
    own = (Path(recipe.root) / recipe.name).resolve()
    if Path(init).resolve().is_relative_to(own):
        raise RecipeError(
            f"supervised.init: {init} lies in {own}, which this run is to be written to; give the run another name"
        )
    verify(init)
    _check_weights("supervised.init", init, shapes)
    _require_unseen("supervised.init", init, states_seen(init), recipe)
    source = recipe_of(init)
    if source is not None:
        theirs = load_recipe(source)
        _require_same_policy("supervised.init", source.parent, theirs, recipe)


def _check_weights(setting: str, path: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise RecipeError unless these are weights, by name and shape, of the recipe's policy; their headers are read."""
    try:
        found = {name: stored.shape for name, stored in ShardFolder(path).tensors.items()}
    except ValueError as error:
        raise RecipeError(f"{setting}: {error}") from error
    odd = next((name for name in {**shapes, **found} if found.get(name) != shapes.get(name)), None)
    if odd is not None:
        there, here = (f"of shape {list(w[odd])}" if odd in w else "missing" for w in (found, shapes))
        raise RecipeError(
            f"{setting}: {odd} is {there} in {path} and {here} in this recipe's policy; name weights of the same policy"
        )


def _check_known(setting: str, vector: Vector, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise RecipeError where a vector of published weights has none that the policy has; what a file holds beside the
    network's own (a tied head) is no matter."""
    found = vector.shapes()
    if not any(shapes.get(name) == shape for name, shape in found.items()):
        raise RecipeError(
            f"{setting} has {next(iter(found))} and {len(found) - 1} more, none of which is a weight of this recipe's "
            "policy; name a vector of the same policy"
        )


def _require_unseen(setting: str, source: str | Path, theirs: Sequence[int], recipe: Recipe) -> None:
    """Raise RecipeError where weights were trained on states that this recipe holds out."""
    seen = sorted(set(theirs) & set(recipe.tasks.held_out_init_states))
    if seen:
        raise RecipeError(
            f"{setting}: {source} was trained on the initial states {seen}, which are among this recipe's "
            "tasks.held_out_init_states; hold out others"
        )


def _require_same_policy(setting: str, source: Path, theirs: Recipe, recipe: Recipe) -> None:
    """Raise RecipeError naming every setting in which a run's policy is another than this recipe's."""
    here, there = (
        r.policy.model_dump(exclude=PolicyPart.SAMPLING) | {"image_size": r.environment.image_size}
        for r in (recipe, theirs)
    )
    unlike = [
        f"{name} is {there[name]} there and {here[name]} here" for name in here if here[name] != there[name]
    ]
    if unlike:
        raise RecipeError(f"{setting}: {source} holds another policy: {'; '.join(unlike)}; use its settings")


def check_start(source: Path, recipe: Recipe, assets: ResolvedAssets) -> None:
    """Raise RecipeError, FingerprintError or CheckpointError, naming what is wrong, unless a run of this recipe on
    these assets can start from `source`."""
    if not (source / "recipe.yaml").is_file():
        raise RecipeError(
            f"start: {source} is not a run folder (it has no recipe.yaml); name the folder of a run"
        )
    if source.resolve() == (Path(recipe.root) / recipe.name).resolve():
        raise RecipeError(f"start: {source} is this run's own folder; give the run another name")
    theirs = load_recipe(source / "recipe.yaml")
    if recipe.preference.demo_weight and not any((source / "demonstrations").glob("*")):
        raise RecipeError(
            f"start: {source} has no demonstrations; set preference.demo_weight=0, or name another run"
        )
    # Its demonstrations are taken up with it, and learned from in every round, whatever its weights have seen.
    seen = {*theirs.tasks.demo_init_states, *states_seen(source / "checkpoints" / "start")}
    _require_unseen("start", source, sorted(seen), recipe)
    _require_same_policy("start", source, theirs, recipe)
    ours = {"assets": {"kind": assets.kind, "digest": assets.digest}}
    require_same_world(
        read_fingerprint(source), ours, what=f"start: {source} is of another world than this run"
    )
    verify(source / "checkpoints" / "start")


def check_hash(path: Path, start: Path, version: int, content_hash: str) -> None:
    """Raise CheckpointError unless these are the weights that the run published under this version: another run may
    have trained a start of the same name since."""
    lines = [m for m in read_journal(path / "metrics.jsonl") if m["stage"] == "published"]
    recorded = [m["hash"] for m in lines if m["version"] == version]
    if recorded and recorded[-1] != content_hash:
        raise CheckpointError(
            f"version {version} of {path} hashes to {content_hash[:12]}, the run published {recorded[-1][:12]}: "
            f"the start in {start} is not the one it began from; put that one back"
        )


CHANGEABLE = (
    "rollouts.rounds",
    "rollouts.actors",
    "rollouts.cpus_per_actor",
    "rollouts.least_actors",
    "rollouts.release_after_s",
    "serving.actors",
    "serving.cpus_per_actor",
    "dashboard.",
    "deadlines.",
    "tracking.",
)
"""What a run may be given more or less of when it is resumed: none of it changes what an episode or a step gives."""


def recipe_to_resume(run: Path, recipe: Path | None, overrides: Sequence[str]) -> Recipe:
    """The recipe that a run which did not end goes on with: its own, but for CHANGEABLE settings.

    Raises RecipeError when there is no such run, when it has ended, and when it is of another recipe than `recipe` with
    `overrides`, naming every setting in which they differ.
    """
    if not (run / "recipe.yaml").is_file():
        raise RecipeError(
            f"--resume: {run} is not a run folder (it has no recipe.yaml); name the folder of a run"
        )
    if (run / "result.json").is_file():
        raise RecipeError(
            f"--resume: {run} has ended (it has a result.json); evaluate it, or start another run from it with "
            f"start={run}"
        )
    own = load_recipe(run / "recipe.yaml")
    asked = load_recipe(recipe or run / "recipe.yaml", overrides)
    here, there = (settings_of(r) for r in (asked, own))
    unlike = [
        f"{name} is {there.get(name)} there and {here.get(name)} here"
        for name in {**there, **here}
        if here.get(name) != there.get(name) and not name.startswith(("name", "root", *CHANGEABLE))
    ]
    if unlike:
        raise RecipeError(
            f"--resume: {run} is of another recipe: {'; '.join(unlike)}; leave the recipe out to go on as it began"
        )
    return asked.model_copy(update={"name": own.name, "root": own.root})
