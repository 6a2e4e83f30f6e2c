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


def hashes(run: Path) -> dict[int, str]:
    return {m["version"]: m["hash"] for m in read_journal(run / "metrics.jsonl") if m["stage"] == "published"}
