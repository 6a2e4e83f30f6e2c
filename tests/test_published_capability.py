"""Capability vectors of published weights, whose names on the disk are not always the network's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from actors.checks import check_policy
from configs.loader import RecipeError, load_recipe
from configs.preference import AdapterPart
from configs.schema import Recipe
from learners.capability import Vector, extract
from learners.merging import merge
from learners.orthogonality import AdapterPenalty
from policies.make import make_policy
from policies.published import weight_names
from policies.weights import adapters
from tests import openvla_tiny
from tests.published_tiny import write_lerobot_stats, write_pi0

CONFIGS = Path(__file__).parents[1] / "configs"
FOLDERS = [
    *((f"{kind} {layout}") for kind in ("pi0", "pi05") for layout in ("openpi", "LeRobot", "transformers")),
    "openvla",
]


def written(root: Path, what: str) -> Path:
    kind, _, layout = what.partition(" ")
    if kind == "openvla":
        return openvla_tiny.write_checkpoint(root / "base")
    base = write_pi0(root / "base", adaptive=kind == "pi05", layout=layout)
    if layout == "LeRobot":
        write_lerobot_stats(base, scaled="QUANTILES" if kind == "pi05" else "MEAN_STD")
    return base


def moved(base: Path, out: Path, by: float) -> Path:
    """A fine-tuning of these weights, so to say."""
    shutil.copytree(base, out)
    for file in out.glob("*.safetensors"):
        draw = torch.Generator().manual_seed(int(1000 * by))
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if "lm_head" not in name and "embed_tokens" not in name:  # which are tied
                tensors[name] = tensor + by * torch.randn(tensor.shape, generator=draw).to(tensor.dtype)
        save_file(tensors, file)
    return out


def recipe_of(what: str, base: Path, vector: Path, *changes: str) -> Recipe:
    kind = what.split()[0]
    recipe = CONFIGS / {"openvla": "openvla_libero.yaml", "pi0": "pi0_libero.yaml"}.get(
        kind, "pi05_libero.yaml"
    )
    own = ["policy.unnorm_key=libero_object_no_noops"] if kind == "openvla" else ["policy.chunk=3"]
    apart = [f"capability.vector={vector}", "capability.penalty=cosine", "policy.dtype=float32"]
    return load_recipe(recipe, [f"policy.checkpoint={base}", *own, *apart, *changes])


@pytest.mark.parametrize("what", FOLDERS)
def test_an_update_is_held_apart_from_a_vector_in_every_layout(what: str, tmp_path: Path) -> None:
    base = written(tmp_path, what)
    vector = tmp_path / "gamma"
    extract(base, sft=moved(base, tmp_path / "sft", 0.1), aux=moved(base, tmp_path / "aux", 0.2), out=vector)
    recipe = recipe_of(what, base, vector)
    assert check_policy(recipe) > 0
    policy = make_policy(recipe.policy, image_size=64, seed=0, device=torch.device("cpu"))
    adapters.attach(policy.module, AdapterPart(rank=2), seed=0, decoders=policy.adapted)
    gammas = Vector(vector, names=weight_names(recipe.policy))
    penalty = AdapterPenalty(policy.module, recipe.capability, gammas)
    tuned = [
        make_policy(
            recipe.policy.model_copy(update={"checkpoint": str(tmp_path / name)}),
            image_size=64,
            seed=0,
            device=torch.device("cpu"),
        ).module
        for name in ("sft", "aux")
    ]
    for layer, _ in adapters.adapted_layers(policy.module):
        sft, aux = (module.get_parameter(f"{layer}.weight").detach() for module in tuned)
        np.testing.assert_allclose(gammas[f"{layer}.weight"], (aux - sft).numpy(), atol=1e-6)
    with torch.no_grad():
        for name, parameter in adapters.parameters(policy.module).items():
            if name.endswith(".B"):
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    assert penalty.add_gradients()["orthogonal_penalty"] > 0
    assert np.isfinite(penalty.value().item())


def test_a_vector_of_another_network_s_weights_is_refused(tmp_path: Path) -> None:
    base = written(tmp_path / "one", "pi05 openpi")
    other = written(tmp_path / "two", "pi05 transformers")
    vector = tmp_path / "gamma"
    extract(other, sft=other, aux=moved(other, tmp_path / "aux", 0.2), out=vector)
    with pytest.raises(RecipeError, match=r"capability.vector: .* was extracted from another base than"):
        check_policy(recipe_of("pi05 openpi", base, vector))


def test_states_that_published_weights_or_a_vector_saw_are_not_held_out(tmp_path: Path) -> None:
    """A merge of a vector that a run's demonstrations went into, as weights of a later recipe."""
    base = written(tmp_path, "pi05 openpi")
    aux, vector, merged = moved(base, tmp_path / "aux", 0.2), tmp_path / "gamma", tmp_path / "merged"
    (aux / "merged.json").write_text(json.dumps({"init_states": [3, 40]}))
    extract(base, sft=base, aux=aux, out=vector)
    merge(base, vector, alpha=1, out=merged)
    held = "tasks.held_out_init_states=[40,41]"
    for changes, said in (
        ((held,), rf"capability.vector: {vector} was trained on the initial states \[40\]"),
        (
            (held, f"policy.checkpoint={merged}", "capability.vector=null"),
            rf"policy.checkpoint: {merged} was trained on the initial states \[40\]",
        ),
    ):
        with pytest.raises(RecipeError, match=said):
            check_policy(recipe_of("pi05 openpi", base, vector, *changes))
