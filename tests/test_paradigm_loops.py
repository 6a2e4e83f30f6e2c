"""The whole loop for every paradigm but token after token, as small as it gets: one demonstration, a few steps of each
kind, episodes of one simulator, on real Ray, LIBERO and MuJoCo.

So little is learned that no episode succeeds. The update is therefore on the demonstration, which needs no success.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from actors.crew import Crew
from actors.learning import Origin, begin_update, end_update, publish, take_up
from actors.parameter_server import ParameterServer
from actors.pipeline import train
from actors.run_folder import RunFolder
from configs.loader import load_recipe
from learners.checkpoint import load_checkpoint
from policies.weights.adapter_files import adapter_from_tensors
from policies.weights.merging import merge
from trajectories.codec import load_trajectory
from trajectories.hashing import weights_hash
from trajectories.journal import read_journal

TINY = Path(__file__).parent / "recipes" / "one_task.yaml"
pytestmark = [pytest.mark.ray, pytest.mark.libero]

FLOW = ["policy.paradigm=flow", "policy.flow.steps=2", "policy.flow.score_draws=1"]
PARADIGMS = {
    "parallel": ["policy.decoding=parallel"],
    "pi0": [*FLOW, "policy.flow.version=pi0"],
    "pi0.5": [*FLOW, "policy.flow.version=pi0.5"],
    "diffusion": [
        "policy.paradigm=diffusion",
        "policy.diffusion.iterations=2",
        "policy.diffusion.score_draws=1",
    ],
}
LITTLE = [
    "tasks.task_ids=[9]",  # solved in the fewest steps
    "tasks.demo_init_states=[0]",
    "tasks.train_init_states=[0]",
    "tasks.held_out_init_states=[40]",
    "environment.image_size=32",
    "environment.max_steps=88",
    "demonstrations.per_task=1",
    "demonstrations.noise=0",
    *(
        f"policy.{part}.{size}"
        for part in ("vision", "decoder")
        for size in ("width=16", "layers=1", "heads=2")
    ),
    "supervised.steps=4",
    "supervised.batch_size=4",
    "preference.reference=start",
    "preference.preference_weight=0",
    "preference.anchor_weight=0",
    "preference.success_weight=0",
    "preference.demo_weight=1",
    "preference.steps=2",
    "preference.batch_size=4",
    "guard.canary_episodes=2",
    "rollouts.init_states_per_round=1",
    "rollouts.samples_per_state=2",
    "rollouts.actors=1",
    "rollouts.envs_per_actor=1",
    "learner.threads=1",
    "learner.parameter_shards=1",
]


@pytest.fixture(scope="module", params=PARADIGMS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    train(load_recipe(TINY, [f"root={root}", "name=loop", *LITTLE, *PARADIGMS[request.param]]))
    return root / "loop"


def metrics(run: Path, stage: str) -> list[dict[str, Any]]:
    return [line for line in read_journal(run / "metrics.jsonl") if line["stage"] == stage]


def test_the_loop_goes_through_every_stage_without_a_fault(run: Path) -> None:
    stages = [line["stage"] for line in read_journal(run / "metrics.jsonl")]
    assert [stage for stage in dict.fromkeys(stages) if stage != "fleet"] == [
        "demonstration",
        "supervised",
        "published",
        "evaluation",
        "rollout",
        "pairs",
        "update",
        "learned",
        "canary",
    ]
    episodes = read_journal(run / "episodes.jsonl")
    assert [(e["phase"], e["policy_version"]) for e in episodes] == [
        ("demonstration", -1),
        ("evaluation", 0),
        ("rollout", 0),
        ("rollout", 0),
        ("canary", 1),
        ("canary", 1),
        ("evaluation", 1),
    ]
    assert not any(e["outcome"] == "fault" for e in episodes)
    kinds = [e["event"] for e in read_journal(run / "events.jsonl")]
    assert [kind for kind in kinds if kind != "serving"] == ["promoted"]
    assert json.loads((run / "result.json").read_text())["held_out_episodes"] == 1
    assert "promoted" in (run / "report.md").read_text()


def test_an_update_is_made_and_what_it_gave_drives(run: Path) -> None:
    (learned,) = metrics(run, "learned")
    assert learned["steps"] == 2
    published = {line["version"]: line["hash"] for line in metrics(run, "published")}
    assert list(published) == [0, 1]
    assert published[0] != published[1]
    driven = [e for e in read_journal(run / "episodes.jsonl") if e["policy_version"] >= 0]
    assert {(e["policy_version"], e["policy_hash"]) for e in driven} == set(published.items())
    tensors, metadata = load_checkpoint(run / "checkpoints" / "v0001")
    base, _ = load_checkpoint(run / "checkpoints" / "start")
    assert weights_hash(merge(base, None)) == published[0]
    assert weights_hash(merge(base, adapter_from_tensors(tensors, metadata))) == published[1]


def test_decisions_are_stored_as_they_were_sampled_with_log_probabilities_where_they_are_exact(
    run: Path,
) -> None:
    files = sorted((run / "trajectories").glob("*.trajectory"))
    kept = [
        e["trajectory_id"]
        for e in read_journal(run / "episodes.jsonl")
        if e["phase"] in ("rollout", "canary")
    ]
    assert sorted(path.stem for path in files) == sorted(kept)
    paradigm = load_recipe(run / "recipe.yaml").policy.paradigm
    for path in files:
        for decision in load_trajectory(path).decisions:
            assert decision.sample.model_chunk.shape == (56,)
            assert decision.sample.model_chunk.dtype == (np.float32 if paradigm == "flow" else np.int64)
            assert decision.sample.logps.size == (56 if paradigm == "autoregressive" else 0)
            assert decision.sample.actions.shape == (8, 7)


def test_a_pair_goes_from_the_store_through_the_learner_to_new_weights(run: Path, tmp_path: Path) -> None:
    """So little is learned that both rollouts failed: one of them is taken for a success, everything else is as in a
    run with pairs."""
    changes = ["preference.preference_weight=1", "preference.anchor_weight=0.2", "preference.steps=6"]
    recipe = load_recipe(
        TINY, [*LITTLE, *PARADIGMS[paradigm_of(run)], *changes, f"root={tmp_path}", "name=paired"]
    )
    start, folder, crew = run / "checkpoints" / "start", RunFolder.create(recipe), Crew()
    stored = [load_trajectory(path) for path in sorted((run / "trajectories").iterdir())]
    first, second = [t for t in stored if t.policy_version == 0]
    assert (first.cell.init_state, first.policy_version) == (second.cell.init_state, second.policy_version)
    try:
        crew.start_store(str(folder.path), preference=recipe.preference, seed=0)
        crew.start_learner(recipe)
        crew.server = ParameterServer(
            start_checkpoint=str(start), saved=str(folder.checkpoints), num_shards=2
        )
        good = publish(crew, folder, None)
        assert good.content_hash == first.policy_hash
        origin = Origin(checkpoint=start, demonstrations=(), content_hash=good.content_hash)
        take_up(crew, folder, origin, good)
        ray.get([crew.store.add.remote(t) for t in (replace(first, outcome="success"), second)])
        update = begin_update(crew, folder, version=0, round_index=0)
        candidate = end_update(crew, folder, origin, update, good=good, steps=6)
    finally:
        crew.dismiss()
        folder.release()
    (mined,), (learned,) = metrics(folder.path, "pairs"), metrics(folder.path, "learned")
    assert mined["pairs"] == 1
    assert candidate is not None
    assert candidate.content_hash != good.content_hash
    assert learned["preference_loss"] < np.log(2)  # in the mean of six steps, the first of which is undecided
    assert learned["chosen_reward"] > learned["rejected_reward"]


def paradigm_of(run: Path) -> str:
    part = load_recipe(run / "recipe.yaml").policy
    if part.paradigm == "flow":
        return part.flow.version
    return "parallel" if part.paradigm == "autoregressive" else part.paradigm
