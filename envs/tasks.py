"""LIBERO's tasks and their official initial states, read without importing the `libero` package."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import runpy
import zipfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from envs.libero_setup import libero_folder

SUITE_SIZES = {
    "libero_spatial": 10,
    "libero_object": 10,
    "libero_goal": 10,
    "libero_10": 10,
    "libero_90": 90,
}
"""Tasks per suite."""

MAX_STEPS = {
    "libero_spatial": 220,
    "libero_object": 280,
    "libero_goal": 300,
    "libero_10": 520,
    "libero_90": 400,
}
"""Published step limits (OpenVLA's LIBERO evaluation, settling not counted)."""

INIT_STATES_PER_TASK = 50

_HASHES = Path(__file__).with_name("init_state_hashes.json")


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One LIBERO task."""

    suite: str
    task_id: int
    """Index in the suite's official order (LIBERO's task order 0)."""
    name: str
    """File stem of the task's BDDL and initial states."""
    instruction: str
    """The words published policies are given: LIBERO's `task.language`, made from the file name. The BDDL file's
    own sentence differs in 29 of the 130 tasks."""
    bddl_file: Path
    max_steps: int
    """The suite's published step limit."""


def load_task(suite: str, task_id: int) -> Task:
    """Look a task up.

    Raises:
        ValueError: unknown suite, or task_id out of range.
        ModuleNotFoundError: LIBERO is not installed.
    """
    if suite not in SUITE_SIZES:
        raise ValueError(f"unknown suite {suite!r}; expected one of {', '.join(SUITE_SIZES)}")
    if not 0 <= task_id < SUITE_SIZES[suite]:
        raise ValueError(
            f"task_id={task_id} is out of range for {suite}; expected 0..{SUITE_SIZES[suite] - 1}"
        )
    folder = libero_folder()
    name = _task_names(folder)[suite][task_id]
    return Task(
        suite=suite,
        task_id=task_id,
        name=name,
        instruction=_instruction(name),
        bddl_file=folder / "bddl_files" / suite / f"{name}.bddl",
        max_steps=MAX_STEPS[suite],
    )


def init_states(task: Task, *, folder: Path | None = None) -> np.ndarray:
    """The task's official initial states, float64 [50, 1 + nq + nv]: time, positions, velocities.

    The file is a pickle, so it is only opened when its SHA-256 is the one pinned with this project, and even then
    nothing but numpy arrays can be built from it. `folder` is for tests: where `<suite>/<name>.pruned_init` lies.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: the file is not the pinned one.
    """
    path = (folder or libero_folder() / "init_files") / task.suite / f"{task.name}.pruned_init"
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    expected = _pinned_hashes()[f"{task.suite}/{path.name}"]
    if found != expected:
        raise ValueError(
            f"{path} has SHA-256 {found}, expected {expected}: it is not the official initial states and was not "
            "opened; reinstall hf-libero==0.1.4"
        )
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        member = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
        states = _ArrayUnpickler(io.BytesIO(archive.read(member))).load()
    return np.asarray(states, dtype=np.float64)


class _ArrayUnpickler(pickle.Unpickler):
    """Builds numpy arrays and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        module = module.replace("numpy.core", "numpy._core")
        if (module, name) in {
            ("numpy._core.multiarray", "_reconstruct"),
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("_codecs", "encode"),
        }:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"initial states may hold numpy arrays only, found {module}.{name}")


@cache
def _pinned_hashes() -> dict[str, str]:
    hashes: dict[str, str] = json.loads(_HASHES.read_text())
    return hashes


@cache
def _task_names(folder: Path) -> dict[str, list[str]]:
    """Task names by suite, from LIBERO's own table (importing it would pull torch and ask for a data folder)."""
    scope = runpy.run_path(str(folder / "benchmark" / "libero_suite_task_map.py"))
    names: dict[str, list[str]] = scope["libero_task_map"]
    return names


def _instruction(name: str) -> str:
    """LIBERO's task.language: the file name in words, without the scene prefix that libero_10 and libero_90 carry."""
    if name[0].isupper():
        name = name.split("SCENE", 1)[1].split("_", 1)[1]
    return name.replace("_", " ")
