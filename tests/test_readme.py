"""The README's picture of the house is the house."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HIDDEN = {"README.md", "CONTRIBUTING.md", "LICENSE", "pyproject.toml"}
"""At the root, and not worth a line in the file tree."""
PASSING = {"MUJOCO_LOG.TXT", "runs", "build", "__pycache__"}
"""Folders that come and go."""


def tree() -> list[str]:
    """Paths named in the README's file tree, indented ones below the last folder at the margin."""
    text = (ROOT / "README.md").read_text()
    block = re.search(r"## The house\n\n```\n(.*?)```", text, re.DOTALL)
    assert block is not None
    paths: list[str] = []
    for line in block[1].splitlines():
        name = line.split()[0]
        if line.startswith(" "):
            name = (
                next(path for path in reversed(paths) if path.endswith("/") and path.count("/") == 1) + name
            )
        paths.append(name)
    return paths


def test_everything_in_the_file_tree_exists() -> None:
    missing = [path for path in tree() if not (ROOT / path).exists()]
    assert missing == []


def test_everything_at_the_root_is_in_the_file_tree() -> None:
    there = {
        f"{path.name}/" if path.is_dir() else path.name
        for path in ROOT.iterdir()
        if not path.name.startswith(".")
        and path.name not in PASSING | HIDDEN
        and not path.name.endswith(".egg-info")
    }
    assert there - set(tree()) == set()


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_every_named_file_exists(page: str) -> None:
    text = (ROOT / page).read_text()
    named = set(re.findall(r"(?<![\w/])(?!runs/)[\w.-]+/[\w/.-]+\.(?:py|yaml|md|jsonl)\b", text))
    assert len(named) >= 3
    assert [path for path in sorted(named) if not (ROOT / path).is_file()] == []


def test_every_target_of_make_that_is_named_exists() -> None:
    text = (ROOT / "README.md").read_text() + (ROOT / "CONTRIBUTING.md").read_text()
    named = set(re.findall(r"(?:`|^)make ([a-z]+)", text, re.MULTILINE))
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert named >= {"run", "test", "check", "help"}
    assert named - targets == set()
