"""A disk that is really full (a small tmpfs): an error that says so, and nothing that was written before is lost."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest

from learners.checkpoint import load_checkpoint, newest_valid, save_checkpoint
from preferences.store import PreferenceStore, StoreError
from tests.test_preference_store import make_trajectory
from trajectories.journal import Journal, read_journal


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill_up(folder: Path, *, leave: int) -> Path:
    """Leave about so many bytes free; returns the file to delete for more."""
    filler = folder / "filler"
    free = int(subprocess.check_output(["df", "--output=avail", "-B1", str(folder)]).split()[-1])
    filler.write_bytes(b"x" * max(free - leave, 0))
    return filler


def add_all(store: PreferenceStore, states: Iterable[int]) -> None:
    for state in states:
        store.add(make_trajectory(state, 0))


def append_all(journal: Journal, numbers: Iterable[int]) -> None:
    for number in numbers:
        journal.append({"line": number, "text": "x" * 100})


def test_a_store_on_a_full_disk_keeps_what_it_has_and_goes_on_when_there_is_room(small_disk: Path) -> None:
    with PreferenceStore(small_disk) as store:
        store.register_version(0, "hash-0")
        kept = [make_trajectory(state, 0) for state in range(3)]
        for trajectory in kept:
            assert store.add(trajectory)
        filler = fill_up(small_disk, leave=0)
        room = "No space left on device; what was stored before is safe: make room"
        with pytest.raises(StoreError, match=room):
            add_all(store, range(3, 50))
        filler.unlink()
        assert store.add(make_trajectory(49, 0))
    with PreferenceStore(small_disk) as store:
        assert all(store.add(trajectory) is False for trajectory in kept)


def test_a_checkpoint_that_does_not_fit_leaves_the_one_before(small_disk: Path) -> None:
    tensors = {"w": np.arange(1000, dtype=np.float32)}
    first = save_checkpoint(small_disk, "first", tensors, {"step": 1})
    with pytest.raises(
        OSError, match=r"cannot write checkpoint second .*No space left.*; what was saved before is safe"
    ):
        save_checkpoint(small_disk, "second", {"w": np.zeros(1 << 20, np.float32)}, {"step": 2})
    assert newest_valid(small_disk) == first
    np.testing.assert_array_equal(load_checkpoint(first)[0]["w"], tensors["w"])
    assert [path.name for path in small_disk.iterdir()] == ["first"]


def test_a_journal_on_a_full_disk_holds_whole_lines_only(small_disk: Path) -> None:
    with Journal(small_disk / "lines.jsonl") as journal:
        journal.append({"line": 0})
        filler = fill_up(small_disk, leave=0)
        with pytest.raises(OSError, match="No space left"):
            journal.extend({"line": number, "text": "x" * 100} for number in range(1, 20_000))
        with pytest.raises(OSError, match="No space left"):
            append_all(journal, range(1, 20_000))
        filler.unlink()
        held = read_journal(small_disk / "lines.jsonl")
        assert [line["line"] for line in held] == list(range(len(held)))
        journal.append({"line": len(held)})
    assert len(read_journal(small_disk / "lines.jsonl")) == len(held) + 1
