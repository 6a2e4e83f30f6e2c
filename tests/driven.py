"""A driver in a process of its own, and what a run has on record: shared by the tests that kill."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from trajectories.journal import read_journal

ROOT = Path(__file__).parents[1]
TINY = ROOT / "tests" / "recipes" / "one_task.yaml"
CHANGES = [
    # Other states than the start's own run has driven, which would not be driven again.
    "tasks.train_init_states=[4..9]",
    "tasks.held_out_init_states=[40,41]",
    "guard.canary_episodes=8",
    "guard.chosen_drop=1000",
    "preference.steps=40",
    "rollouts.rounds=2",
    "rollouts.init_states_per_round=2",
    # The answers to a batch depend in their last bits on who else is in it.
    "serving.max_batch=1",
]
"""What the runs that kills are survived in change of the one-task recipe; `clean_run` is one without kills."""


def drive(settings: Sequence[str], environ: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """`launch.py train` of the one-task recipe, to its end."""
    return subprocess.run(
        [sys.executable, "launch.py", "train", str(TINY), *settings],
        cwd=ROOT,
        env=environ,
        capture_output=True,
        text=True,
        timeout=540,
        check=False,
    )


def episodes(run: Path) -> Counter[tuple[str, int, str, bool]]:
    """How often each episode is on record: phase, round, cell and weights, outcome."""
    lines = read_journal(run / "episodes.jsonl")
    return Counter((e["phase"], e["round"], e["trajectory_id"], e["success"]) for e in lines)


def count(run: Path, phase: str) -> int:
    return sum(e["phase"] == phase for e in read_journal(run / "episodes.jsonl"))


def assert_ended_alike(run: Path, clean: Path) -> None:
    """Each episode once, and the same episodes, weights, trajectories and pairs as the clean run."""
    assert episodes(run) == episodes(clean)
    assert set(episodes(run).values()) == {1}
    assert hashes(run) == hashes(clean)
    stored = [{path.name for path in (one / "trajectories").glob("*")} for one in (run, clean)]
    assert stored[0] == stored[1]
    pairs = [{p["pair_id"] for p in read_journal(one / "pairs.jsonl")} for one in (run, clean)]
    assert pairs[0] == pairs[1] != set()


def hashes(run: Path) -> dict[int, str]:
    return {m["version"]: m["hash"] for m in read_journal(run / "metrics.jsonl") if m["stage"] == "published"}
