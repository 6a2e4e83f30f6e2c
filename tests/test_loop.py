"""The loop from demonstrations to report, on real Ray, LIBERO and MuJoCo, with things going wrong in it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
import yaml

from actors.checks import check_hash, check_start
from actors.pipeline import train
from actors.placement import connect
from actors.rollout import RolloutActor
from actors.run_folder import FATES, RunFolder
from actors.verbs import evaluate_run
from configs.loader import RecipeError, load_recipe
from configs.schema import Recipe
from configs.world import EnvironmentPart
from envs.assets import resolve_assets
from envs.fingerprint import FingerprintError
from learners.checkpoint import CheckpointError
from preferences.lock import FolderLockedError
from trajectories.codec import load_trajectory
from trajectories.journal import read_journal
from trajectories.records import ActionSample, Cell, Observation

ROOT = Path(__file__).parents[1]
TINY = ROOT / "tests" / "recipes" / "one_task.yaml"
pytestmark = [pytest.mark.ray, pytest.mark.libero]


def episodes(run: Path, phase: str) -> list[dict[str, Any]]:
    return [e for e in read_journal(run / "episodes.jsonl") if e["phase"] == phase]


def cell_of(episode: dict[str, Any]) -> tuple[int, int, int]:
    return episode["task_id"], episode["init_state"], episode["seed"]


LITTLE: dict[str, dict[str, Any]] = {"guard": {"canary_episodes": 4}, "preference": {"steps": 5}}
"""For runs in which something else than learning is looked at."""


def changed(recipe: Recipe, **parts: dict[str, Any]) -> Recipe:
    """The recipe with some settings of some parts replaced."""
    update = {name: getattr(recipe, name).model_copy(update=values) for name, values in parts.items()}
    return recipe.model_copy(update=update)


def test_a_run_leaves_everything_behind(trained_run: Path) -> None:
    result = json.loads((trained_run / "result.json").read_text())
    assert list(result) == [
        "suite",
        "task_ids",
        "assets",
        "held_out_episodes",
        "success_before",
        "success_after",
        "wilson_before",
        "wilson_after",
        "mcnemar_p",
        "env_steps_per_s",
        "wall_s",
    ]
    assert result["held_out_episodes"] == 8
    assert result["wilson_before"][0] <= result["success_before"] <= result["wilson_before"][1]
    held_out = episodes(trained_run, "evaluation")
    assert {e["init_state"] for e in held_out} == set(range(40, 48))
    start = [e for e in held_out if e["policy_version"] == 0]
    assert sum(e["success"] for e in start) / len(start) == result["success_before"]
    report = (trained_run / "report.md").read_text()
    assert "not comparable" in report
    fingerprint = json.loads((trained_run / "fingerprint.json").read_text())
    assert list(fingerprint["first_frames"]) == ["libero_object/0"]


def test_every_rollout_is_stored_once_with_the_weights_that_drove_it(trained_run: Path) -> None:
    driven = episodes(trained_run, "rollout") + episodes(trained_run, "canary")
    files = {path.stem for path in (trained_run / "trajectories").glob("*.trajectory")}
    assert files == {e["trajectory_id"] for e in driven}
    assert len(files) == len(driven) >= 16
    published = {
        m["version"]: m["hash"]
        for m in read_journal(trained_run / "metrics.jsonl")
        if m["stage"] == "published"
    }
    assert {(e["policy_version"], e["policy_hash"]) for e in driven} <= set(published.items())
    one = load_trajectory(trained_run / "trajectories" / f"{driven[0]['trajectory_id']}.trajectory")
    assert sum(d.executed for d in one.decisions) == one.env_steps == driven[0]["env_steps"]


@pytest.mark.parametrize(
    ("guard", "expected"),
    [({}, "tripped"), ({"chosen_drop": 1e9, "canary_significance": 0.2}, "rolled_back")],
)
def test_a_destructive_update_never_reaches_the_fleet(
    tiny: Recipe, trained_run: Path, tmp_path: Path, guard: dict[str, float], expected: str
) -> None:
    """Learning rate and beta far too high: the tripwire stops it; with the tripwire out of reach, the canary does.

    What the start's own run has driven with it, evaluation and first round, is taken up and not driven again."""
    reckless = yaml.safe_load((ROOT / "configs" / "destructive.yaml").read_text())["preference"]
    recipe = changed(tiny, preference=reckless, guard=guard).model_copy(
        update={"name": expected, "root": str(tmp_path)}
    )
    result = train(recipe)
    run = tmp_path / expected
    kinds = [e["event"] for e in read_journal(run / "events.jsonl")]
    assert [kind for kind in kinds if kind != "serving"] == [expected]
    assert {e["policy_version"] for e in episodes(run, "evaluation")} == {0}
    assert result["success_after"] == result["success_before"]
    taken = {e["trajectory_id"] for e in episodes(trained_run, "rollout")}
    assert {e["trajectory_id"] for e in episodes(run, "rollout")} == taken
    assert taken <= {path.stem for path in (run / "trajectories").glob("*.trajectory")}
    told = {"tripped": "stopped by the tripwire", "rolled_back": "rolled back"}[expected]
    assert told in (run / "report.md").read_text()


def test_killed_actors_cost_no_trajectory(tiny: Recipe, tmp_path: Path) -> None:
    # Other states than the start's own run has driven, which would not be driven again.
    tasks = {"train_init_states": tuple(range(4, 10)), "held_out_init_states": (40, 41)}
    recipe = changed(tiny, tasks=tasks, **LITTLE).model_copy(update={"name": "killed", "root": str(tmp_path)})
    run = tmp_path / "killed"
    killed: list[str] = []

    def kill_both() -> None:
        """Once some rollouts are in, end one process of each kind, by pid; only this test's own cluster is looked at,
        since another may be at work on this machine."""
        while not run.exists() or len(episodes(run, "rollout")) < 3:
            time.sleep(0.2)
        for title in ("ray::Rollouts", "ray::PolicyServer"):
            own = psutil.Process().children(recursive=True)
            process = next(p for p in own if _titled(p, title))
            os.kill(process.pid, signal.SIGKILL)
            killed.append(title)
            time.sleep(1.0)

    killer = threading.Thread(target=kill_both, daemon=True)
    killer.start()
    train(recipe)
    assert killed == ["ray::Rollouts", "ray::PolicyServer"]
    rollouts = episodes(run, "rollout")
    assert Counter(map(cell_of, rollouts)) == {
        (0, state, 1000 + sample): 1 for state in range(4, 8) for sample in range(4)
    }
    stored = {path.stem for path in (run / "trajectories").glob("*.trajectory")}
    assert stored == {e["trajectory_id"] for e in rollouts + episodes(run, "canary")}
    events = read_journal(run / "events.jsonl")
    assert "requeued" in {e["event"] for e in events}
    assert [e.get("kind") for e in events if e["event"] == "actor_restarted"] == ["rollout", "policy"]
    assert not any(e["outcome"] == "fault" for e in rollouts)


def _titled(process: psutil.Process, title: str) -> bool:
    try:
        return any(word.startswith(title) for word in process.cmdline())
    except psutil.Error:  # it ended meanwhile
        return False


def test_the_overlapped_schedule_collects_while_it_learns(tiny: Recipe, tmp_path: Path) -> None:
    rollouts, tasks = {"rounds": 2, "init_states_per_round": 2}, {"held_out_init_states": (40, 41)}
    recipe = changed(tiny, rollouts=rollouts, tasks=tasks, **LITTLE).model_copy(
        update={"name": "overlapped", "root": str(tmp_path), "schedule": "overlapped"}
    )
    train(recipe)
    run = tmp_path / "overlapped"
    driven = episodes(run, "rollout")
    assert Counter(e["round"] for e in driven) == {0: 8, 1: 8}
    assert {e["policy_version"] for e in driven} == {0}  # round 1 did not wait for what round 0 taught
    decided = [e["version"] for e in read_journal(run / "events.jsonl") if e["event"] in FATES]
    assert decided == sorted(decided)
    assert json.loads((run / "result.json").read_text())["held_out_episodes"] == 2


def test_a_finished_run_is_moved_aside_and_one_that_goes_on_is_left_alone(tmp_path: Path) -> None:
    recipe = load_recipe(TINY, [f"root={tmp_path}"])
    (tmp_path / "one-task~kept").mkdir()
    first = RunFolder.create(recipe)
    with pytest.raises(FolderLockedError, match="one-task is in use by process"):
        RunFolder.create(recipe)
    with pytest.raises(FolderLockedError):
        RunFolder.open(first.path)
    first.write_json("result.json", {"success_after": 0.5})
    first.release()
    RunFolder.create(recipe.model_copy(update={"seed": 7})).release()
    assert json.loads((tmp_path / "one-task~1" / "result.json").read_text()) == {"success_after": 0.5}
    assert load_recipe(tmp_path / "one-task~1" / "recipe.yaml") == recipe
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one-task", "one-task~1", "one-task~kept"]


def test_a_start_of_another_world_is_refused_and_of_another_stack_is_said(
    tiny: Recipe, trained_run: Path, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(trained_run, source)
    stack = json.loads((source / "fingerprint.json").read_text())

    def alter(**parts: Any) -> None:
        (source / "fingerprint.json").write_text(json.dumps(stack | parts))

    recipe = changed(tiny, rollouts={"rounds": 0}).model_copy(
        update={"name": "other", "root": str(tmp_path), "start": str(source)}
    )
    alter(assets={"kind": "explicit" if stack["assets"]["kind"] == "stand-in" else "stand-in", "digest": "0"})
    with pytest.raises(
        FingerprintError, match=r"start: .* is of another world than this run: the assets are"
    ):
        train(recipe)
    assert not (tmp_path / "other").exists()
    alter(python="3.10.0")
    train(recipe)
    events = read_journal(tmp_path / "other" / "events.jsonl")
    (event,) = [e for e in events if e["event"] != "serving"]
    assert event["event"] == "stack_differs"
    assert event["reason"].startswith("python: 3.10.0 before, ")


def test_a_finished_run_can_be_evaluated_again(trained_run: Path, tmp_path: Path) -> None:
    """The same weights on the same cells give the same outcomes: what was trained is what was saved."""
    copy = tmp_path / "copy"
    shutil.copytree(trained_run, copy)
    again = evaluate_run(copy, version=0, manifest="held-out")
    first = [e for e in episodes(trained_run, "evaluation") if e["policy_version"] == 0]
    second = episodes(copy, "evaluation-held-out")
    assert again["episodes"] == len(first) == len(second)
    assert again["hash"] == first[0]["policy_hash"]
    assert again["assets"] == json.loads((trained_run / "result.json").read_text())["assets"]
    assert again["warnings"] == []
    assert {cell_of(e): e["success"] for e in first} == {cell_of(e): e["success"] for e in second}
    assert again["differs_from_published"][-1] == "episodes end after 200 steps, not at the suite's limit"
    with pytest.raises(RecipeError, match="--tasks 1 goes with the held-out manifest"):
        evaluate_run(copy, version=0, manifest="published", tasks="1")
    with pytest.raises(RecipeError, match=r"--tasks 11: .* must lie in 0\.\.9"):
        evaluate_run(copy, version=0, manifest="held-out", tasks="11")
    with pytest.raises(RecipeError, match="holds no version 99"):
        evaluate_run(copy, version=99, manifest="held-out")
    with pytest.raises(CheckpointError, match="is not the one it began from"):
        check_hash(copy, copy, 0, "0" * 64)


def test_a_run_can_be_evaluated_on_tasks_that_it_did_not_train_on(trained_run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(trained_run, copy)
    trained_on = {e["task_id"] for e in episodes(copy, "evaluation")}
    other = next(task for task in range(10) if task not in trained_on)
    result = evaluate_run(copy, version=0, manifest="held-out", tasks=str(other))
    driven = episodes(copy, "evaluation-held-out")
    assert {e["task_id"] for e in driven} == {other}
    assert result["episodes"] == len(driven) > 0


@ray.remote(num_cpus=0.1)
class Poisoned:
    """A policy gone wrong: its second answer holds a NaN, or one action too few dimensions."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._answers = 0

    async def act(self, observation: Observation, **_: Any) -> tuple[ActionSample, str]:
        self._answers += 1
        actions = np.zeros((8, 7), np.float32)
        if self._answers == 2 and self._kind == "nan":
            actions[3, 6] = np.nan
        if self._answers == 2 and self._kind == "short":
            actions = actions[:, :6]
        chunk = np.zeros(56, np.int64)
        return ActionSample(actions=actions, model_chunk=chunk, logps=np.zeros(56, np.float32)), "hash"


@pytest.mark.parametrize(("kind", "reason"), [("nan", "nan in dimension 6"), ("short", "shape (8, 6)")])
def test_a_bad_action_quarantines_the_episode_and_nothing_else(kind: str, reason: str) -> None:
    connect()
    environment = EnvironmentPart(image_size=32, geometry="collision", max_steps=24)
    rollouts = RolloutActor.options(num_cpus=0.1).remote(
        environment=environment, assets=resolve_assets(None), num_envs=1
    )
    cell = Cell(suite="libero_object", task_id=0, init_state=0, seed=0)
    policies = [Poisoned.remote(kind)]
    outcomes = []
    for _ in range(2):
        record, _ = rollouts.rollout.options(num_returns=2).remote(
            cell, policies=policies, version=0, temperature=0.0
        )
        outcomes.append(ray.get(record))
    assert outcomes[0]["outcome"] == "fault"
    assert reason in outcomes[0]["fault"]
    assert outcomes[0]["env_steps"] == 8
    assert (outcomes[1]["outcome"], outcomes[1]["env_steps"]) == ("timeout", 24)
    ray.kill(rollouts)


@pytest.mark.parametrize(
    ("part", "change", "said"),
    [
        ("tasks", {"held_out_init_states": (3, 45)}, r"trained on the initial states \[3\]"),
        ("policy", {"chunk": 4}, "chunk is 8 there and 4 here"),
        ("environment", {"image_size": 128}, "image_size is 64 there and 128 here"),
    ],
)
def test_a_start_that_does_not_fit_the_recipe_is_refused(
    trained_run: Path, tiny: Recipe, part: str, change: dict[str, Any], said: str
) -> None:
    with pytest.raises(RecipeError, match=said):
        check_start(trained_run, changed(tiny, **{part: change}), resolve_assets(None))
