"""The report of a run, from a run folder laid out as the pipeline leaves it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import imageio.v2 as imageio
import numpy as np
import pytest
from PIL import Image

from dashboard.rates import Rate
from dashboard.report import write_report
from dashboard.run_folder import read_run
from dashboard.videos import FRAMES_PER_SECOND, HOLD_FRAMES
from trajectories.codec import episode_record, save_trajectory
from trajectories.journal import Journal
from trajectories.records import ActionSample, Cell, Decision, Observation, Trajectory

TASKS = (0, 2)
INSTRUCTIONS = {0: "pick up the alphabet soup and place it in the basket", 2: "pick up the salad dressing"}
RECIPE = """
name: toy
preference:
  beta: 0.02
tasks:
  suite: libero_object
  task_ids: [0, 2]
  demo_init_states: 0..3
  train_init_states: 0..29
  held_out_init_states: 40..49
"""
RESULT = {
    "suite": "libero_object",
    "task_ids": [0, 2],
    "assets": "stand-in",
    "held_out_episodes": 20,
    "success_before": 0.4,
    "success_after": 0.8,
    "wilson_before": [0.219, 0.613],
    "wilson_after": [0.584, 0.919],
    "mcnemar_p": 0.0078,
    "env_steps_per_s": 153.4,
    "wall_s": 754.2,
}


def trajectory(
    task: int, state: int, seed: int, *, success: bool, version: int, decisions: int
) -> Trajectory:
    """An episode whose camera sees a block slide over a table."""
    steps = []
    for index in range(decisions):
        image = np.full((32, 32, 3), (214, 198, 170), np.uint8)
        image[20:, :] = (150, 120, 90)
        image[14:20, index : index + 6] = (200, 40, 40) if success else (60, 60, 60)
        steps.append(
            Decision(
                observation=Observation(
                    agentview=image,
                    wrist=image,
                    proprio=np.zeros(8, np.float32),
                    instruction=INSTRUCTIONS[task],
                ),
                sample=ActionSample(
                    actions=np.zeros((8, 7), np.float32),
                    model_chunk=np.zeros(56, np.int64),
                    logps=np.zeros(56, np.float32),
                ),
                executed=8,
            )
        )
    return Trajectory(
        cell=Cell(suite="libero_object", task_id=task, init_state=state, seed=seed),
        decisions=tuple(steps),
        outcome="success" if success else "timeout",
        env_steps=8 * decisions,
        policy_version=version,
        policy_hash=f"hash{version}",
    )


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    with Journal(path) as journal:
        journal.extend(lines)


def evaluation_lines(version: int, successes: int) -> list[dict[str, Any]]:
    """10 held-out episodes of each task, of which the first `successes` succeed."""
    episodes = [
        trajectory(task, 40 + k, 0, success=k < successes, version=version, decisions=1)
        for task in TASKS
        for k in range(10)
    ]
    return [{"phase": "evaluation", "round": -1, **episode_record(e)} for e in episodes]


def faulty(line: dict[str, Any], fault: str) -> dict[str, Any]:
    return line | {"outcome": "fault", "success": False, "fault": fault}


def write_run(folder: Path, *, events: list[dict[str, Any]], pairs: int = 7, fault: str = "") -> Path:
    """A two-round run: version 0 evaluated at 40 %, version 1 at 80 %; task 0 has a stored success and failure."""
    folder.mkdir()
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "fingerprint.json").write_text(json.dumps({"mujoco": "3.3.2", "frames": {"0": "abc123"}}))
    (folder / "result.json").write_text(json.dumps(RESULT) + "\n")
    rollouts = [
        trajectory(0, 3, 1000, success=True, version=0, decisions=9),
        trajectory(0, 3, 1001, success=pairs == 0, version=0, decisions=14),
        trajectory(2, 5, 1000, success=False, version=0, decisions=4),
    ]
    (folder / "trajectories").mkdir()
    for episode in rollouts:
        save_trajectory(folder / "trajectories" / f"{episode.trajectory_id}.trajectory", episode)
    lines = [{"phase": "rollout", "round": 0, **episode_record(e)} for e in rollouts]
    before, after = evaluation_lines(0, 4), evaluation_lines(1, 8)
    if fault:
        spoilt = trajectory(2, 5, 1001, success=False, version=0, decisions=1)
        lines.append({"phase": "rollout", "round": 0, **faulty(episode_record(spoilt), fault)})
        # Task 2 from state 40: version 0 succeeded there.
        after[10] = faulty(after[10], fault)
    write_lines(folder / "episodes.jsonl", lines + before + after)
    counts = {
        "pairs": pairs,
        "states": 10,
        "states_all_success": 2,
        "states_all_failure": 3,
        "states_unpairable_other": 0,
    }
    metrics = [
        {
            "stage": "rollout",
            "round": 0,
            "version": 0,
            "episodes": 40,
            "successes": 17,
            "env_steps_per_s": 150.5,
        },
        {"stage": "pairs", "round": 0, "version": 0, **counts},
    ]
    for step in range(1, 11):
        reward = {
            "margin": 0.02 * step,
            "margin_std": 0.013 * step,
            "chosen_reward": 0.012 * step,
            "rejected_reward": -0.008 * step,
        }
        metrics.append(
            {
                "stage": "update",
                "round": 0,
                "version": 0,
                "step": step,
                "chosen_logratio": 0.01 * step,
                "success_logratio": 0.02 * step,
                "rejected_logratio": -0.02 * step,
                **reward,
            }
        )
    stopped = "tripped" if any(event["event"] == "tripped" for event in events) else ""
    learned = metrics[-1] | {"stage": "learned", "steps": 10, "stopped": stopped, "accuracy": 0.75}
    metrics.append(learned)
    write_lines(folder / "metrics.jsonl", metrics)
    write_lines(folder / "events.jsonl", events)
    return folder


PROMOTED = {
    "event": "promoted",
    "round": 0,
    "version": 1,
    "cells": 40,
    "before": 17,
    "after": 26,
    "p_worse": 0.98,
}


def assert_drawn(path: Path) -> None:
    """The PNG opens, and is neither empty nor of one colour."""
    pixels = np.asarray(Image.open(path).convert("RGB"))
    assert min(pixels.shape[:2]) > 150
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20


def blue_pixels(path: Path) -> int:
    """How many pixels have exactly the colour that the plots draw their main series in."""
    pixels = np.asarray(Image.open(path).convert("RGB"))
    return int((pixels == (0x00, 0x72, 0xB2)).all(axis=-1).sum())


def test_report_states_the_result_and_the_promotion(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "toy", events=[PROMOTED])
    report = write_report(folder)
    assert report == folder / "report.md"
    text = report.read_text()
    assert "**Held-out success 40.0 % -> 80.0 %** (a significant improvement)" in text
    assert "21.9 to 61.3 % before, 58.4 to 91.9 % after" in text
    assert "p = 0.0078" in text
    assert "12 min 34 s in all; 153 simulator steps per second" in text
    assert "not comparable with published tables" in text
    assert "7 pairs from 10 groups of rollouts, of which 2 gave only successes and 3 only failures" in text
    assert (
        "10 steps to a margin of 0.20, the preferred side's log-ratio at +0.100 nats per token (tripwire at -0.1)."
        in text
    )
    assert "| 0 | 7 | 10 | 0.20 | 0.13 | 0.75 | 0.100 | 0.200 | -0.200 |" in text
    assert "; DoRA of rank 32, sigmoid DPO on decisive chunks with beta 0.02, synchronous schedule" in text
    assert "Version 1 was **promoted**: 26 successes on 40 canary cells against 17" in text
    assert "**The fleet ends on version 1.**" in text
    # k=4 of 10: the interval is Wilson's, (0.168, 0.687) by his formula.
    assert (
        "| libero_object 2: pick up the salad dressing | 4/10 = 40.0 % (16.8 to 68.7 %) | 8/10 = 80.0 % "
        "(49.0 to 94.3 %) | 4 | 0 |" in text
    )
    assert "None: no episode was quarantined" in text
    assert "| mujoco | `3.3.2` |" in text
    assert "| frames.0 | `abc123` |" in text


def test_plots_and_video_are_written_and_not_blank(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "toy", events=[PROMOTED])
    text = write_report(folder).read_text()
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "recipe.yaml").write_text(RECIPE)
    write_report(tmp_path / "empty")
    for name in ("success", "pairs", "margins"):
        # What is blue in a plot without data is the line of the tripwire.
        plot = Path("plots") / f"{name}.png"
        assert blue_pixels(folder / plot) > blue_pixels(tmp_path / "empty" / plot) + 300
        assert f"(plots/{name}.png)" in text
    name = "libero_object-task0-state3"
    assert_drawn(folder / "videos" / f"{name}.png")
    assert f"[video](videos/{name}.mp4)" in text
    with imageio.get_reader(folder / "videos" / f"{name}.mp4") as video:
        frames = [np.asarray(frame) for frame in video]
        assert video.get_meta_data()["fps"] == FRAMES_PER_SECOND
    assert len(frames) == 14 + HOLD_FRAMES
    assert frames[0].shape == (416, 688, 3)
    left, right = frames[-1][80:400, 16:336], frames[-1][80:400, 352:672]
    assert np.abs(left.astype(int) - frames[8][80:400, 16:336]).mean() < 2, (
        "the shorter side holds its last frame"
    )
    assert np.abs(right.astype(int) - frames[8][80:400, 352:672]).mean() > 2, "the longer side goes on"


def test_a_rollback_is_told(tmp_path: Path) -> None:
    verdict = PROMOTED | {"event": "rolled_back", "after": 2, "p_worse": 0.00001}
    text = write_report(write_run(tmp_path / "toy", events=[verdict])).read_text()
    assert (
        "Version 1 was **rolled back** by the canary: 2 successes on 40 canary cells against 17 of the version in "
        "force (one-sided McNemar test of being worse: p < 0.0001)."
    ) in text
    assert "0 new versions promoted, 1 rolled back by the canary. **The fleet ends on version 0.**" in text


def test_faults_of_a_candidate_are_told_with_its_trial(tmp_path: Path) -> None:
    verdict = PROMOTED | {"event": "rolled_back", "after": 2, "p_worse": 0.00001}
    folder = write_run(tmp_path / "toy", events=[verdict])
    spoilt = episode_record(trajectory(0, 3, 1000, success=False, version=1, decisions=1))
    write_lines(folder / "episodes.jsonl", [{"phase": "canary", "round": 0, **faulty(spoilt, "no answer")}])
    text = write_report(folder).read_text()
    assert "2 successes on 40 canary cells, 1 fault among the failures, against 17 of the version" in text


def test_a_start_that_was_taken_up_is_named(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "toy", events=[])
    (folder / "recipe.yaml").write_text(RECIPE + "start: runs/other\n")
    assert "* Supervised start taken from `runs/other`: version 0." in write_report(folder).read_text()


def test_a_tripped_update_is_told(tmp_path: Path) -> None:
    event = {
        "event": "tripped",
        "round": 0,
        "version": 0,
        "reason": "chosen log-prob fell 0.61 nats per token",
    }
    text = write_report(write_run(tmp_path / "toy", events=[event])).read_text()
    assert "**stopped by the tripwire**: chosen log-prob fell 0.61 nats per token" in text
    assert "1 stopped by the tripwire. **The fleet ends on version 0.**" in text
    assert "steps to a margin" not in text
    assert "(no new version was promoted, so the start is still in force)" in text


def test_no_pairs_and_no_contrast(tmp_path: Path) -> None:
    text = write_report(write_run(tmp_path / "toy", events=[], pairs=0)).read_text()
    assert "No pairs were mined" in text
    assert "No initial state has both among the stored trajectories." in text
    assert not (tmp_path / "toy" / "videos").exists()


def test_faults_and_restarts_are_counted(tmp_path: Path) -> None:
    events = [
        {"event": "quarantined", "cell": "4fe1", "reason": "InvalidActionError: nan"},
        {
            "event": "requeued",
            "cell": "libero_object/0/3/1000",
            "actor": 1,
            "reason": "ActorDiedError",
            "attempt": 1,
        },
        {
            "event": "requeued",
            "cell": "libero_object/0/3/1000",
            "actor": 1,
            "reason": "ActorDiedError",
            "attempt": 2,
        },
        {"event": "quarantined", "cell": "libero_object/0/3/1000", "actor": 1, "reason": "x", "attempt": 3},
        {"event": "actor_restarted", "actor": 1, "reason": "an episode took longer than 600 s"},
        {"event": "actor_restarted", "kind": "policy", "actor": 0, "reason": "its process died"},
        {"event": "actor_restarted", "kind": "policy", "actor": 0, "reason": "its process died"},
    ]
    folder = write_run(tmp_path / "toy", events=[PROMOTED, *events], fault="InvalidActionError: nan")
    text = write_report(folder).read_text()
    assert "* 1 episode quarantined (rollout of version 0): InvalidActionError: nan" in text
    assert "* 1 episode quarantined (evaluation of version 1): InvalidActionError: nan" in text
    assert "* 2 episodes run again from the start, because the rollout actor died or hung" in text
    assert "* 1 episode given up: the rollout actor died each time" in text
    assert "* 1 restart of rollout actors: an episode took longer than 600 s" in text
    assert "* 2 restarts of policy actors: its process died" in text


def test_a_fault_is_neither_success_nor_failure_and_takes_its_cell_out_of_the_comparison(
    tmp_path: Path,
) -> None:
    folder = write_run(tmp_path / "toy", events=[PROMOTED], fault="InvalidActionError: nan")
    (folder / "result.json").write_text(json.dumps(RESULT | {"held_out_episodes": 19}) + "\n")
    text = write_report(folder).read_text()
    assert (
        "19 held-out episodes, the same cells before and after (1 of 20 cells left out: 1 episode ended in a fault)."
    ) in text
    assert "| 3/9 = 33.3 % (12.1 to 64.6 %) | 7/9 = 77.8 % (45.3 to 93.7 %) | 4 | 0 |" in text
    assert "| **all** | 7/19 = 36.8 % (19.1 to 59.0 %) | 15/19 = 78.9 % (56.7 to 91.5 %) | 8 | 0 |" in text
    assert "3 rollouts of version 0, 33.3 % successful; 1 more ended in a fault." in text


def test_an_unfinished_run_gets_a_report_of_what_there_is(tmp_path: Path) -> None:
    folder = tmp_path / "toy"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(RECIPE)
    text = write_report(folder).read_text()
    assert (
        "**This run did not finish:** it left no result. libero_object, tasks 0, 2; DoRA of rank 32" in text
    )
    assert "No held-out episodes." in text


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no recipe\.yaml"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("result.json", "[1]", r"result\.json must hold one JSON object, got list"),
        ("episodes.jsonl", '{"phase": "rollout", "round": 0}\n', r"episodes\.jsonl, record 1 lacks 'suite'"),
        ("metrics.jsonl", 'oops\n{"stage": "pairs"}\n', r"metrics\.jsonl: a line is damaged"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, content: str, complaint: str) -> None:
    folder = write_run(tmp_path / "toy", events=[])
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=complaint):
        read_run(folder)


def test_an_episode_written_twice_counts_once(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "toy", events=[])
    path = folder / "episodes.jsonl"
    path.write_text(path.read_text() * 2)
    assert len(read_run(folder).episodes) == 3 + 40


def test_wilson_interval() -> None:
    # Wilson's formula by hand for 0 of 10: upper bound z^2 / (n + z^2) = 3.8415 / 13.8415.
    low, high = Rate(successes=0, episodes=10).interval
    assert low == pytest.approx(0.0, abs=1e-12)
    assert high == pytest.approx(0.27754, abs=1e-5)
