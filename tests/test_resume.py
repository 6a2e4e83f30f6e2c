"""A run whose driver, learner or store is killed ends as if nothing had happened; what cannot be resumed is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from actors.checks import recipe_to_resume
from configs.loader import RecipeError, load_recipe
from configs.schema import Recipe
from tests.driven import CHANGES, ROOT, TINY, assert_ended_alike, count
from trajectories.journal import read_journal


def start_driver(*arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "launch.py", "train", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        env=os.environ | {"RAY_AUTH_MODE": "token"},
    )


def kill_when(driver: subprocess.Popen[bytes], due: Callable[[], bool]) -> None:
    """SIGKILL to the driver once something is on disk."""
    deadline = time.monotonic() + 240
    while not due():
        assert driver.poll() is None, f"the run ended with {driver.returncode} before it could be killed"
        assert time.monotonic() < deadline, "what the kill was to follow never came"
        time.sleep(0.05)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()


@pytest.mark.ray
@pytest.mark.libero
def test_a_run_whose_driver_is_killed_again_and_again_ends_like_one_that_was_not(
    trained_run: Path, clean_run: Path, tmp_path: Path
) -> None:
    changes = [*CHANGES, f"start={trained_run}", f"root={tmp_path}"]
    run = tmp_path / "killed"

    kill_when(start_driver(str(TINY), *changes, "name=killed"), lambda: count(run, "rollout") >= 3)
    kill_when(start_driver("--resume", str(run)), lambda: count(run, "canary") >= 3)
    last = start_driver("--resume", str(run))
    printed, _ = last.communicate(timeout=300)
    assert last.returncode == 0

    assert_ended_alike(run, clean_run)
    timeless = (
        {k: v for k, v in json.loads(text).items() if k not in ("env_steps_per_s", "wall_s")}
        for text in (printed.decode(), (clean_run / "result.json").read_text())
    )
    assert next(timeless) == next(timeless)
    resumed = [e for e in read_journal(run / "events.jsonl") if e["event"] == "resumed"]
    assert [e["next_round"] for e in resumed] == [0, 0]


@pytest.fixture
def unfinished(trained_run: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "one-task"
    shutil.copytree(trained_run, copy)
    (copy / "result.json").unlink()
    return copy


def test_only_a_run_of_the_same_recipe_that_did_not_end_is_resumed(
    trained_run: Path, unfinished: Path
) -> None:
    with pytest.raises(
        RecipeError, match=r"has ended \(it has a result.json\); evaluate it, or start another"
    ):
        recipe_to_resume(trained_run, None, [])
    with pytest.raises(RecipeError, match=r"is not a run folder \(it has no recipe.yaml\)"):
        recipe_to_resume(unfinished / "checkpoints", None, [])
    own: Recipe = load_recipe(unfinished / "recipe.yaml")
    assert recipe_to_resume(unfinished, None, []) == own
    more = recipe_to_resume(unfinished, None, ["rollouts.rounds=4", "rollouts.actors=3"])
    assert (more.rollouts.rounds, more.rollouts.actors) == (4, 3)
    with pytest.raises(
        RecipeError, match=r"another recipe: preference.beta is 0.1 there and 0.2 here; leave the"
    ):
        recipe_to_resume(unfinished, None, ["preference.beta=0.2"])
    with pytest.raises(
        RecipeError, match=r"another recipe: .*tasks.task_ids is \[0\] there and \[0, 8\] here"
    ):
        recipe_to_resume(unfinished, ROOT / "configs" / "quickstart.yaml", [])


def test_resume_is_refused_in_one_line(trained_run: Path) -> None:
    done: Any = subprocess.run(
        [sys.executable, "launch.py", "train", "--resume", str(trained_run)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"pairloom: --resume: {trained_run} has ended")
    assert len(done.stderr.splitlines()) == 1
