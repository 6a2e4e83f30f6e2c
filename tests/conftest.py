"""Fixtures shared by the tests that need a running cluster."""

from __future__ import annotations

import os

# One thread per process: the tests share two cores with the simulators they start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_AUTH_MODE", "token")

from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from actors.pipeline import train
from configs.loader import load_recipe
from configs.schema import Recipe

TINY = Path(__file__).parent / "recipes" / "one_task.yaml"


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A whole run of the one-task recipe: demonstrations, supervised start, one round, evaluation, report.

    Other tests take up its start, so that the policy is trained once.
    """
    root = tmp_path_factory.mktemp("runs")
    train(load_recipe(TINY, [f"root={root}"]))
    yield root / "one-task"
    ray.shutdown()


@pytest.fixture
def tiny(trained_run: Path) -> Recipe:
    """The one-task recipe, starting from the trained run."""
    return load_recipe(TINY, [f"start={trained_run}"])
