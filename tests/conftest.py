"""Fixtures that several files share: a trained run on a cluster, and checkpoints as published ones are laid out."""

from __future__ import annotations

import os

# One thread per process: the tests share two cores with the simulators they start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_AUTH_MODE", "token")

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray

from actors.pipeline import train
from configs.loader import load_recipe
from configs.policy import PolicyPart
from configs.schema import Recipe
from policies.openvla.checkpoint import OpenVLAFolder, open_openvla
from policies.openvla.network import OpenVLA
from tests import openvla_tiny, published_tiny
from tests.driven import CHANGES, TINY


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A whole run of the one-task recipe: demonstrations, supervised start, one round, evaluation, report.

    Other tests take up its start, so that the policy is trained once. PAIRLOOM_TRAINED_RUN may name such a run from
    before, for work on one test.
    """
    if "PAIRLOOM_TRAINED_RUN" in os.environ:
        yield Path(os.environ["PAIRLOOM_TRAINED_RUN"])
        ray.shutdown()
        return
    root = tmp_path_factory.mktemp("runs")
    train(load_recipe(TINY, [f"root={root}"]))
    yield root / "one-task"
    ray.shutdown()


@pytest.fixture(scope="session")
def clean_run(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two rounds in which nothing is killed: what runs with kills have to end like."""
    root = tmp_path_factory.mktemp("clean")
    train(load_recipe(TINY, [*CHANGES, f"start={trained_run}", f"root={root}", "name=clean"]))
    return root / "clean"


@pytest.fixture
def tiny(trained_run: Path) -> Recipe:
    """The one-task recipe, starting from the trained run."""
    return load_recipe(TINY, [f"start={trained_run}"])


@pytest.fixture(scope="session")
def openvla_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny OpenVLA checkpoint; to be read, not changed."""
    return openvla_tiny.write_checkpoint(tmp_path_factory.mktemp("openvla"))


@pytest.fixture(scope="session")
def openvla_checkpoint(openvla_folder: Path) -> OpenVLAFolder:
    """The same, looked through."""
    return open_openvla(openvla_folder)


@pytest.fixture(scope="session")
def openvla_network(openvla_checkpoint: OpenVLAFolder) -> OpenVLA:
    """Its network; to be read, not changed."""
    return openvla_checkpoint.network()


@pytest.fixture(scope="session")
def known(tmp_path_factory: pytest.TempPathFactory) -> dict[str, PolicyPart]:
    """A recipe's part for each kind of published folder; to be read, not changed."""
    return published_tiny.parts(tmp_path_factory.mktemp("published"))


@pytest.fixture
def own(known: dict[str, PolicyPart], tmp_path: Path) -> Callable[[str], PolicyPart]:
    """The part of one kind with a folder of its own, `tmp_path / "folder"`, which may be spoilt."""

    def copied(kind: str) -> PolicyPart:
        part = known[kind]
        shutil.copytree(str(part.checkpoint), tmp_path / "folder")
        return part.model_copy(update={"checkpoint": str(tmp_path / "folder")})

    return copied
