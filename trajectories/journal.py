"""An append-only file of JSON lines that survives the death of its writer at any byte.

A line is written with one system call. What a crash can leave is a torn last line: the reader passes over it
with a warning, the next writer cuts it off. A damaged line anywhere else is an error, because records would
be missing. Non-finite floats have no JSON form and are written as null.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

logger = logging.getLogger(__name__)


class JournalError(ValueError):
    """A line in the middle of a journal is not a JSON object, or a record cannot be written as one."""


class Journal:
    """Writer of one journal; one writer at a time.

    Example:
        with Journal(run / "metrics.jsonl") as metrics:
            metrics.append({"version": 1, "margin": 0.3})
    """

    def __init__(self, path: Path, *, fsync: bool = False) -> None:
        """Open for appending, creating the file if need be, and cut off a torn last line.

        Args:
            path: the file; its folder must exist.
            fsync: flush to the disk after each append, so that a power failure loses nothing either.

        Raises:
            JournalError: a line other than the last is damaged.
            OSError: the file cannot be opened.
        """
        self.path = Path(path)
        self._fsync = fsync
        kept, tail_ended = _intact_length(self.path)
        self._file = os.open(self.path, os.O_CREAT | os.O_RDWR | os.O_APPEND, 0o644)
        os.ftruncate(self._file, kept)
        if not tail_ended:
            self._write(b"\n")

    def append(self, record: Mapping[str, object]) -> None:
        """Write one record as one line.

        Raises:
            JournalError: the record holds something JSON has no form for, or this journal is closed.
            OSError: the disk is full; the journal is as it was before.
        """
        self.extend([record])

    def extend(self, records: Iterable[Mapping[str, object]]) -> None:
        """Write all records with one call and at most one flush; none of them if it raises as `append`."""
        if self._file < 0:
            raise JournalError(f"{self.path}: the journal is closed")
        try:
            lines = [json.dumps(_plain(record), allow_nan=False) + "\n" for record in records]
        except TypeError as error:
            raise JournalError(f"{self.path}: a record must be made of JSON values: {error}") from error
        if lines:
            self._write("".join(lines).encode())

    def close(self) -> None:
        """Close the file; harmless when already closed."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _write(self, data: bytes) -> None:
        before = os.fstat(self._file).st_size
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(self._file, view) :]
            if self._fsync:
                os.fsync(self._file)
        except OSError:
            # Half a line now would make a torn line in the middle later.
            os.ftruncate(self._file, before)
            raise


def read_journal(path: Path) -> list[dict[str, Any]]:
    """Every record of a journal, none where the file does not exist. A torn last line is logged and left out.

    Raises:
        JournalError: a line other than the last is damaged.
    """
    data = path.read_bytes() if path.exists() else b""
    records, kept = _finished_records(path, data)
    tail = data[kept:]
    if tail:
        last = _parse(tail)
        if last is None:
            logger.warning("%s: the last line is torn (%d bytes) and is ignored", path, len(tail))
        else:
            records.append(last)
    return records


def _finished_records(path: Path, data: bytes) -> tuple[list[dict[str, Any]], int]:
    """Records of the intact lines that end in a newline, and their length in bytes."""
    *lines, tail = data.split(b"\n")
    records: list[dict[str, Any]] = []
    kept = 0
    for number, line in enumerate(lines, start=1):
        record = _parse(line)
        if record is None:
            if number == len(lines) and not tail:
                break
            raise JournalError(
                f"{path}: a line is damaged and later ones follow: {line[:60]!r}; mend or remove that line"
            )
        records.append(record)
        kept += len(line) + 1
    return records, kept


def _intact_length(path: Path) -> tuple[int, bool]:
    """How many bytes to keep when opening for writing, and whether they end with a newline."""
    data = path.read_bytes() if path.exists() else b""
    _, kept = _finished_records(path, data)
    tail = data[kept:]
    if tail and _parse(tail) is not None:
        return len(data), False
    if tail:
        logger.warning("%s: cut off a torn last line (%d bytes)", path, len(tail))
    return kept, True


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _plain(value: Any) -> Any:
    """JSON's own types: numpy scalars unwrapped, non-finite floats as None."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
