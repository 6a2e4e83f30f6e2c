"""What is looked at before any actor starts: the recipe's policy, and the run that it starts from."""

from __future__ import annotations

from pathlib import Path

import torch

from configs.loader import RecipeError, load_recipe
from configs.policy import PolicyPart
from configs.schema import Recipe
from envs.assets import ResolvedAssets
from envs.fingerprint import read_fingerprint, require_same_world
from learners.checkpoint import verify
from policies.make import make_policy
from policies.published import check_published


def check_policy(recipe: Recipe) -> int:
    """Bytes of one copy of published weights, once they are found to fit; 0 for a policy made here.

    Raises PublishedError naming what is wrong with `policy.checkpoint`, and RecipeError unless a policy can be built of
    the recipe's sizes, for which no memory is taken.
    """
    if recipe.policy.checkpoint is not None:
        return check_published(recipe.policy, image_size=recipe.environment.image_size)
    try:
        with torch.device("meta"):
            make_policy(
                recipe.policy, image_size=recipe.environment.image_size, seed=0, device=torch.device("meta")
            )
    except ValueError as error:
        raise RecipeError(f"policy: {error}") from error
    return 0


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
    seen = sorted(set(theirs.tasks.demo_init_states) & set(recipe.tasks.held_out_init_states))
    if seen:
        raise RecipeError(
            f"start: {source} was trained on the initial states {seen}, which are among this recipe's "
            "tasks.held_out_init_states; hold out others"
        )
    here, there = (
        r.policy.model_dump(exclude=PolicyPart.SAMPLING) | {"image_size": r.environment.image_size}
        for r in (recipe, theirs)
    )
    unlike = [
        f"{name} is {there[name]} there and {here[name]} here" for name in here if here[name] != there[name]
    ]
    if unlike:
        raise RecipeError(f"start: {source} holds another policy: {'; '.join(unlike)}; use its settings")
    ours = {"assets": {"kind": assets.kind, "digest": assets.digest}}
    require_same_world(
        read_fingerprint(source), ours, what=f"start: {source} is of another world than this run"
    )
    verify(source / "checkpoints" / "start")
