"""The whole loop for every paradigm but token after token, as small as it gets: one demonstration, a few steps of each
kind, episodes of one simulator, on real Ray, LIBERO and MuJoCo.

So little is learned that no episode succeeds. The update is therefore on the demonstration, which needs no success.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.pipeline import train
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
    assert list(dict.fromkeys(stages)) == [
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
