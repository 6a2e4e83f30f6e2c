"""Durable checkpoints: a folder that is either there whole and verified, or not there.

A checkpoint is `tensors.safetensors`, `metadata.json` and `manifest.json`; nothing in it can run code. It is
staged beside its target, every file is flushed to the disk, the manifest (sizes and SHA-256 of the others) is
written last, and one rename makes it appear. safetensors itself detects truncation but no flipped bit, so
loading checks the digests. One process writes into a folder at a time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from policies.weights.snapshots import to_array, to_tensor

logger = logging.getLogger(__name__)

TENSORS, METADATA, MANIFEST = "tensors.safetensors", "metadata.json", "manifest.json"
_STAGING = ".staging-"
_BLOCK = 1 << 20


class CheckpointError(ValueError):
    """A checkpoint is missing, incomplete or altered; the message names the file."""


def save_checkpoint(
    folder: str | Path, name: str, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, Any]
) -> Path:
    """Write `folder/name` durably and return it.

    Args:
        folder: created if need be.
        name: of the checkpoint; no separators, and no leading dot.
        tensors: name -> array; uint16 is bfloat16 (`trajectories.bfloat16`), and written as such.
        metadata: JSON values.

    Raises:
        CheckpointError: the name does not do, or an intact checkpoint of that name exists (a damaged one is
            moved aside to `.damaged-*`).
        OSError: the disk is full or the folder cannot be written; what was there before is untouched.
    """
    folder = Path(folder)
    target = folder / name
    if not name or name.startswith(".") or Path(name).name != name:
        raise CheckpointError(f"checkpoint name {name!r} must be one path component without a leading dot")
    folder.mkdir(parents=True, exist_ok=True)
    _clear_target(target)
    staging = folder / f"{_STAGING}{name}-{uuid.uuid4().hex[:8]}"
    staging.mkdir()
    try:
        save_file({key: to_tensor(np.asarray(array)) for key, array in tensors.items()}, staging / TENSORS)
        (staging / METADATA).write_text(json.dumps(dict(metadata), indent=1, sort_keys=True))
        seal(staging, sequence=1 + _highest_sequence(folder))
        staging.rename(target)
    except (OSError, SafetensorError) as error:  # safetensors has an error of its own for a disk that is full
        shutil.rmtree(staging, ignore_errors=True)
        raise OSError(
            f"cannot write checkpoint {name} in {folder}: {error}; what was saved before is safe: make room or give "
            "write permission, and resume the run"
        ) from error
    _flush(folder)
    return target


def seal(staging: Path, *, sequence: int) -> None:
    """Flush the tensors and metadata that lie in a folder, and write the manifest that makes it a checkpoint."""
    files = {file: _flush_and_digest(staging / file) for file in (TENSORS, METADATA)}
    body = {"sequence": sequence, "files": files}
    (staging / MANIFEST).write_text(json.dumps({"body": body, "sha256": _digest_of(body)}, indent=1))
    _flush(staging / MANIFEST)
    _flush(staging)


def load_checkpoint(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Verified tensors and metadata. Raises CheckpointError naming the file that is missing or altered."""
    path = Path(path)
    verify(path)
    tensors = {name: to_array(tensor) for name, tensor in load_file(path / TENSORS).items()}
    return tensors, json.loads((path / METADATA).read_text())


def newest_valid(folder: str | Path) -> Path | None:
    """The last saved checkpoint under `folder` that verifies; None when there is none.

    Those that do not verify are named in a warning, with the reason.
    """
    candidates: list[tuple[int, Path]] = []
    for path in sorted(Path(folder).glob("[!.]*/")):
        try:
            candidates.append((_manifest(path)["sequence"], path))
        except CheckpointError as error:
            logger.warning("skipped checkpoint %s: %s", path.name, error)
    for _, path in sorted(candidates, reverse=True):
        try:
            verify(path)
        except CheckpointError as error:
            logger.warning("skipped checkpoint %s: %s", path.name, error)
        else:
            return path
    return None


def keep_newest(folder: str | Path, count: int) -> None:
    """Remove all but the last `count` checkpoints saved under `folder`; damaged ones are left where they are."""
    saved: list[tuple[int, Path]] = []
    for path in Path(folder).glob("[!.]*/"):
        with suppress(CheckpointError):
            saved.append((_manifest(path)["sequence"], path))
    for _, path in sorted(saved, reverse=True)[count:]:
        shutil.rmtree(path)


def read_metadata(path: str | Path) -> dict[str, Any]:
    """A checkpoint's metadata, its tensors unread and unverified. Raises CheckpointError when it is altered."""
    path = Path(path)
    recorded = _manifest(path)["files"][METADATA]
    if not (path / METADATA).is_file() or _digest(path / METADATA) != recorded:
        raise CheckpointError(f"{path / METADATA} is missing or altered; use an earlier checkpoint")
    return json.loads((path / METADATA).read_text())


def verify(path: str | Path) -> None:
    """Raise CheckpointError naming the first file that is missing, truncated or altered."""
    path = Path(path)
    for file, recorded in _manifest(path)["files"].items():
        if not (path / file).is_file():
            raise CheckpointError(f"{path / file} is missing; use an earlier checkpoint")
        found = _digest(path / file)
        if found != recorded:
            raise CheckpointError(
                f"{path / file} was altered or truncated: {found['bytes']} bytes of sha256 {found['sha256'][:12]}, "
                f"expected {recorded['bytes']} of {recorded['sha256'][:12]}; use an earlier checkpoint"
            )


def is_intact(path: str | Path) -> bool:
    """Whether there is a checkpoint that verifies; one that does not is named in a warning."""
    try:
        verify(path)
    except CheckpointError as error:
        if Path(path).exists():
            logger.warning("passed over a checkpoint: %s", error)
        return False
    return True


class CheckpointReader:
    """Reads single tensors of a checkpoint, so that a process can take its share of a model only."""

    def __init__(self, path: str | Path) -> None:
        """Raises CheckpointError naming the file that is missing or altered."""
        self.path = Path(path)
        verify(self.path)
        with (self.path / TENSORS).open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        self._sizes = {
            name: entry["data_offsets"][1] - entry["data_offsets"][0]
            for name, entry in header.items()
            if name != "__metadata__"
        }

    def sizes(self) -> dict[str, int]:
        """Tensor name -> bytes."""
        return dict(self._sizes)

    def tensor(self, name: str) -> np.ndarray:
        """One tensor, in memory of its own. Raises CheckpointError when there is none of that name."""
        try:
            with safe_open(self.path / TENSORS, framework="pt") as file:
                return to_array(file.get_tensor(name))
        except SafetensorError as error:
            raise CheckpointError(f"{self.path / TENSORS} has no tensor {name!r}: {error}") from error


def _clear_target(target: Path) -> None:
    """Make way for a new checkpoint, never over an intact one; remove what a killed writer left."""
    for leftover in target.parent.glob(f"{_STAGING}*"):
        shutil.rmtree(leftover)
    if not target.exists():
        return
    try:
        verify(target)
    except CheckpointError as error:
        aside = target.with_name(f".damaged-{target.name}-{uuid.uuid4().hex[:8]}")
        target.rename(aside)
        logger.warning("moved a damaged checkpoint aside to %s: %s", aside.name, error)
    else:
        raise CheckpointError(f"{target} exists and is intact; choose another name or remove it first")


def _manifest(path: Path) -> dict[str, Any]:
    manifest = path / MANIFEST
    try:
        content = json.loads(manifest.read_bytes())
        body, recorded = content["body"], content["sha256"]
    except FileNotFoundError as error:
        raise CheckpointError(f"{manifest} is missing: not a checkpoint, or not a whole one") from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{manifest} is not readable as a manifest; use an earlier checkpoint"
        ) from error
    if _digest_of(body) != recorded:
        raise CheckpointError(f"{manifest} was altered; use an earlier checkpoint")
    return body


def _highest_sequence(folder: Path) -> int:
    highest = 0
    for path in folder.glob("[!.]*/"):
        try:
            highest = max(highest, _manifest(path)["sequence"])
        except CheckpointError as error:
            logger.warning("passed over checkpoint %s: %s", path.name, error)
    return highest


def _digest_of(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _digest(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _flush_and_digest(path: Path) -> dict[str, Any]:
    _flush(path)
    return _digest(path)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
