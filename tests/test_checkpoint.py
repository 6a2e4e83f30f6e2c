"""Checkpoints: whole or absent, and every byte checked."""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from learners.checkpoint import (
    CheckpointError,
    CheckpointReader,
    load_checkpoint,
    newest_valid,
    save_checkpoint,
    verify,
)

ROOT = Path(__file__).parents[1]
TENSORS = {
    "w": np.arange(12, dtype=np.float32).reshape(3, 4),
    "half": np.array([1.5, -2.0], np.float16),
    "step": np.array(7, np.int64),
    "transposed": np.arange(6, dtype=np.float32).reshape(2, 3).T,
}
FILES = ("tensors.safetensors", "metadata.json", "manifest.json")


def flip(path: Path, byte: int) -> None:
    data = bytearray(path.read_bytes())
    data[byte] ^= 1
    path.write_bytes(data)


def test_round_trip(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "new" / "folder", "v0001", TENSORS, {"version": 1, "hash": "abc"})
    tensors, metadata = load_checkpoint(path)
    assert metadata == {"version": 1, "hash": "abc"}
    assert set(tensors) == set(TENSORS)
    for name, array in TENSORS.items():
        assert tensors[name].dtype == array.dtype
        assert np.array_equal(tensors[name], array)
    assert sorted(p.name for p in path.iterdir()) == sorted(FILES)
    assert [p.name for p in path.parent.iterdir()] == ["v0001"]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("where", [0, 0.5, 1])
def test_one_flipped_bit_is_found_and_the_file_named(tmp_path: Path, file: str, where: float) -> None:
    path = save_checkpoint(tmp_path, "v1", TENSORS, {"note": "a"})
    size = (path / file).stat().st_size
    flip(path / file, round(where * (size - 1)))
    with pytest.raises(CheckpointError, match=file):
        load_checkpoint(path)


@pytest.mark.parametrize("file", FILES)
def test_a_missing_or_short_file_is_named(tmp_path: Path, file: str) -> None:
    path = save_checkpoint(tmp_path, "v1", TENSORS, {})
    data = (path / file).read_bytes()
    (path / file).write_bytes(data[:-3])
    with pytest.raises(CheckpointError, match=file):
        verify(path)
    (path / file).unlink()
    with pytest.raises(CheckpointError, match=rf"{file}.* is missing"):
        verify(path)


def test_the_newest_that_verifies_is_found_and_the_skipped_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert newest_valid(tmp_path) is None
    # Order of saving, not of names.
    for name in ("start", "v0002", "v0001"):
        save_checkpoint(tmp_path, name, TENSORS, {})
    assert newest_valid(tmp_path) == tmp_path / "v0001"
    flip(tmp_path / "v0001" / "tensors.safetensors", -5)
    (tmp_path / "v0002" / "manifest.json").unlink()
    with caplog.at_level(logging.WARNING):
        assert newest_valid(tmp_path) == tmp_path / "start"
    assert "skipped checkpoint v0001" in caplog.text
    assert "tensors.safetensors was altered" in caplog.text
    assert "skipped checkpoint v0002" in caplog.text


@pytest.mark.parametrize("moment", [*FILES, "rename"])
def test_a_writer_killed_at_any_file_leaves_the_older_checkpoint_newest(tmp_path: Path, moment: str) -> None:
    """A process kills itself with SIGKILL when it is about to write the named file, or to rename."""
    save_checkpoint(tmp_path, "v0001", {"w": np.ones(3, np.float32)}, {})
    program = f"""
import os, signal, sys
import numpy as np
from learners.checkpoint import save_checkpoint

def watch(event, args):
    if event == "os.rename" if {moment!r} == "rename" else (
        event == "open" and str(args[0]).endswith({moment!r}) and "staging" in str(args[0])
    ):
        os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(watch)
save_checkpoint({str(tmp_path)!r}, "v0002", {{"w": np.zeros(3, np.float32)}}, {{}})
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    assert newest_valid(tmp_path) == tmp_path / "v0001"
    assert not (tmp_path / "v0002").exists()
    save_checkpoint(tmp_path, "v0002", {"w": np.zeros(3, np.float32)}, {})
    assert newest_valid(tmp_path) == tmp_path / "v0002"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["v0001", "v0002"]


def test_an_intact_checkpoint_is_never_replaced_and_a_damaged_one_is_kept_aside(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, "v1", TENSORS, {"n": 1})
    with pytest.raises(CheckpointError, match="exists and is intact"):
        save_checkpoint(tmp_path, "v1", TENSORS, {"n": 2})
    flip(path / "metadata.json", 3)
    save_checkpoint(tmp_path, "v1", TENSORS, {"n": 2})
    assert load_checkpoint(path)[1] == {"n": 2}
    assert len(list(tmp_path.glob(".damaged-v1-*/manifest.json"))) == 1
    assert newest_valid(tmp_path) == path


@pytest.mark.parametrize("name", ["", ".hidden", "a/b", ".."])
def test_names_that_are_not_one_component_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match="one path component"):
        save_checkpoint(tmp_path, name, TENSORS, {})


def test_a_reader_takes_single_tensors(tmp_path: Path) -> None:
    reader = CheckpointReader(save_checkpoint(tmp_path, "v1", TENSORS, {}))
    assert reader.sizes() == {"w": 48, "half": 4, "step": 8, "transposed": 24}
    assert np.array_equal(reader.tensor("transposed"), TENSORS["transposed"])
    with pytest.raises(CheckpointError, match="no tensor 'b'"):
        reader.tensor("b")
    flip(tmp_path / "v1" / "tensors.safetensors", -5)
    with pytest.raises(CheckpointError, match=r"tensors\.safetensors was altered"):
        CheckpointReader(tmp_path / "v1")


def test_a_manifest_that_lists_other_contents_is_refused(tmp_path: Path) -> None:
    """Editing a file together with its digest still leaves the manifest's own digest."""
    path = save_checkpoint(tmp_path, "v1", TENSORS, {})
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["body"]["sequence"] = 99
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"manifest\.json was altered"):
        verify(path)
