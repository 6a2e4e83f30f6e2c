"""Follows a journal that another process appends to: each call reads only the bytes that are new."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHUNK_BYTES = 1 << 22
"""Read at once, so that a journal of gigabytes is folded in without being held."""


class StartOver(Exception):  # noqa: N818 - a turn of events, not a mistake
    """The journal was replaced, or lost lines that had been read: what was made of it no longer holds."""


class Tail:
    """The finished lines of one JSON-lines file, each given once.

    A last line without its newline waits until the newline is there. A line that is no JSON object is left out and
    counted in `damaged`: a page that watches should say so, not end.
    """

    def __init__(self, path: Path) -> None:
        """`path`: the journal; it need not exist yet."""
        self.path = path
        self.damaged = 0
        self._offset = 0
        self._inode = 0

    def read(self) -> Iterator[dict[str, Any]]:
        """The records that were finished since the last call.

        Raises:
            StartOver: the file is another one than before, or shorter than what was read of it.
            OSError: it cannot be read.
        """
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            if self._offset:
                raise StartOver(str(self.path)) from None
            return
        with file:
            self._recognise(file.fileno())
            file.seek(self._offset)
            rest = b""
            while chunk := file.read(CHUNK_BYTES):
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    self._offset += len(line) + 1
                    record = _object(line)
                    if record is None:
                        self.damaged += 1
                    else:
                        yield record

    def _recognise(self, descriptor: int) -> None:
        now = os.fstat(descriptor)
        if self._inode and (now.st_ino != self._inode or now.st_size < self._offset):
            raise StartOver(str(self.path))
        self._inode = now.st_ino


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        # JSON has no NaN, Python's reader does; a browser would refuse the whole state for one.
        record = json.loads(line, parse_constant=lambda _: None)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None
