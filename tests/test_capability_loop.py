"""A capability vector on real Ray, LIBERO and MuJoCo: two fine-tunings, extracted, merged, and trained apart from, in a
supervised start and in an online round; as small as it gets."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from actors.checks import check_policy, check_served
from actors.pipeline import train
from configs.loader import RecipeError, load_recipe
from launch import app
from learners.capability import CapabilityError, extract, read_manifest
from learners.checkpoint import load_checkpoint
from learners.lineage import states_seen
from learners.merging import merged_once
from tests.test_paradigm_loops import LITTLE, TINY, metrics
from trajectories.codec import load_trajectory

pytestmark = [pytest.mark.ray, pytest.mark.libero]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs `base`, and from it `sft` and `aux`."""
    root = tmp_path_factory.mktemp("runs")
    alone = [*LITTLE, f"root={root}", "rollouts.rounds=0"]
    train(load_recipe(TINY, [*alone, "name=base"]))
    begun = [*alone, f"supervised.init={start(root, 'base')}"]
    train(load_recipe(TINY, [*begun, "name=sft"]))
    train(load_recipe(TINY, [*begun, "name=aux", "supervised.auxiliary=spatial"]))
    return root


def start(root: Path, name: str) -> Path:
    return root / name / "checkpoints" / "start"


@pytest.fixture(scope="module")
def vector(root: Path) -> Path:
    extract(start(root, "base"), sft=start(root, "sft"), aux=start(root, "aux"), out=root / "gamma")
    return root / "gamma"


def test_fine_tuning_begins_with_the_weights_that_it_is_given(root: Path) -> None:
    weights = {name: load_checkpoint(start(root, name))[0] for name in ("base", "sft", "aux")}
    assert set(weights["base"]) == set(weights["aux"])
    for name in ("sft", "aux"):
        moved = [np.abs(weights[name][n] - weights["base"][n]).max() for n in weights["base"]]
        # Four steps of at most the learning rate each.
        assert 0 < max(moved) < 1e-2
    (line,) = metrics(root / "aux", "supervised")
    assert line["auxiliary_loss"] > 0
    assert "auxiliary_loss" not in metrics(root / "sft", "supervised")[0]


def test_depth_is_drawn_for_the_objective_that_asks_for_it_and_changes_nothing_else(root: Path) -> None:
    plain, deep = (
        [load_trajectory(path) for path in sorted((root / name / "demonstrations").iterdir())]
        for name in ("sft", "aux")
    )
    assert [t.trajectory_id for t in plain] == [t.trajectory_id for t in deep]
    for one, other in zip(plain, deep, strict=True):
        for a, b in zip(one.decisions, other.decisions, strict=True):
            assert a.observation.depth is None
            assert b.observation.depth is not None
            assert np.array_equal(a.observation.agentview, b.observation.agentview)


def test_a_start_and_a_round_are_held_apart_from_the_vector(root: Path, vector: Path) -> None:
    meta = merged_once(start(root, "base"), vector, alpha=1.1, root=root)
    assert merged_once(start(root, "base"), vector, alpha=1.1, root=root) == meta
    train(
        load_recipe(
            TINY,
            [
                *LITTLE,
                f"root={root}",
                "name=meta",
                "rollouts.rounds=1",
                f"supervised.init={meta}",
                f"capability.vector={vector}",
                "capability.penalty=cosine",
            ],
        )
    )
    (supervised,) = metrics(root / "meta", "supervised")
    (update,) = metrics(root / "meta", "update")
    for line in (supervised, update):
        assert 0 < line["orthogonal_penalty"] < 1
    (learned,) = metrics(root / "meta", "learned")
    for line in (supervised, learned):
        assert 0 < abs(line["vector_cosine"]) <= abs(line["vector_cosine_most"]) < 1
    report = (root / "meta" / "report.md").read_text()
    total = read_manifest(vector).total()
    assert f"| **all** | {total.gamma_norm:.4g} | {total.ratio:.3f} | {total.cosine:.3f} |" in report
    assert f"After an update, what had changed lay at a cosine of {learned['vector_cosine']:+.4f}" in report
    assert "Capability vector" not in (root / "aux" / "report.md").read_text()


def test_the_command_fine_tunes_apart_from_a_vector_element_by_element(root: Path, vector: Path) -> None:
    base = str(start(root, "base"))
    asked = ["capability", "train", str(TINY), *LITTLE, f"root={root}", "name=apart", "rollouts.rounds=0"]
    asked += ["tasks.demo_init_states=[1]", "tasks.train_init_states=[1]"]
    done = CliRunner().invoke(app, [*asked, "--init", base, "--vector", str(vector)])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout.splitlines()[-1])["held_out_episodes"] == 1
    (supervised,) = metrics(root / "apart", "supervised")
    assert supervised["orthogonal_penalty"] > 0
    assert states_seen(start(root, "apart")) == [0, 1]  # of what it began with, and its own
    without = load_recipe(root / "apart" / "recipe.yaml", [f"capability.vector={root / 'gone'}"])
    assert check_served(without) == 0  # driving what was learned needs no vector, training does
    with pytest.raises(CapabilityError, match="gone"):
        check_policy(without)
    refused = CliRunner().invoke(app, [*asked, "--init", str(start(root, "sft")), "--vector", str(vector)])
    assert refused.exit_code == 2
    assert "was extracted from the base" in refused.stderr


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_an_adapter_is_fine_tuned_apart_from_the_vector_and_merged_into_the_start(
    root: Path, vector: Path, method: str
) -> None:
    base, name = start(root, "base"), f"apart-{method}"
    settings = [*LITTLE, f"root={root}", f"name={name}", "rollouts.rounds=0", f"supervised.init={base}"]
    settings += ["supervised.trains=adapter", f"adapter.method={method}", "supervised.lr=0.01"]
    train(load_recipe(TINY, [*settings, f"capability.vector={vector}", "capability.penalty=cosine"]))
    (supervised,) = metrics(root / name, "supervised")
    assert 0 < supervised["orthogonal_penalty"] < 1
    assert 0 < abs(supervised["vector_cosine_most"]) < 1
    before = load_checkpoint(base)[0]
    after, metadata = load_checkpoint(start(root, name))
    assert 0 < metadata["merge_drift"] < 1e-5
    changed = {n for n in before if not np.array_equal(before[n], after[n])}
    assert changed == {n for n in before if ".layers." in n and "language" in n and "_proj" in n}


def test_what_is_not_of_this_policy_is_refused_before_any_actor_starts(root: Path, vector: Path) -> None:
    alone = [*LITTLE, f"root={root}", "name=other", "rollouts.rounds=0", "policy.decoder.width=32"]
    for setting in (f"supervised.init={start(root, 'base')}", f"capability.vector={vector}"):
        with pytest.raises(RecipeError, match=f"{setting.split('=')[0]}: .* is of shape .* in this recipe's"):
            train(load_recipe(TINY, [*alone, setting]))
    same = [
        *LITTLE,
        f"root={root}",
        "name=other",
        "rollouts.rounds=0",
        f"supervised.init={start(root, 'base')}",
    ]
    with pytest.raises(RecipeError, match=r"supervised.init: .* lies in .*base, which this run is to be"):
        train(load_recipe(TINY, [*same, "name=base"]))
    with pytest.raises(RecipeError, match=r"supervised.init: .* holds another policy: decoder is"):
        train(load_recipe(TINY, [*same, "policy.decoder.heads=1"]))
    others = ["tasks.demo_init_states=[1]", "tasks.train_init_states=[1]"]
    with pytest.raises(RecipeError, match=r"supervised.init: .* was trained on the initial states \[0\]"):
        train(load_recipe(TINY, [*same, "tasks.held_out_init_states=[0]", *others]))
    assert read_manifest(vector).init_states == [0]
    apart = [*LITTLE, f"root={root}", "name=other", "rollouts.rounds=0", f"capability.vector={vector}"]
    with pytest.raises(RecipeError, match=r"capability.vector: .* was trained on the initial states \[0\]"):
        train(load_recipe(TINY, [*apart, "tasks.held_out_init_states=[0]", *others]))
    elsewhere = [*LITTLE, f"root={root}", "name=other", "rollouts.rounds=0", f"capability.vector={vector}"]
    with pytest.raises(
        RecipeError, match=r"capability.vector: .* was extracted from another base than random weights"
    ):
        train(load_recipe(TINY, elsewhere))
    refilled = root / "refilled"
    shutil.copytree(start(root, "sft"), refilled)
    with pytest.raises(
        RecipeError, match=rf"was extracted from another base than {refilled}, which this run begins"
    ):
        train(load_recipe(TINY, [*elsewhere, f"supervised.init={refilled}"]))
    with pytest.raises(CapabilityError, match="no capability vector"):
        train(load_recipe(TINY, [*alone, f"capability.vector={start(root, 'base')}"]))
    assert not (root / "other").exists()
