"""One owner at a time for a folder, among the processes of a machine (and of those that share a file system)."""

from __future__ import annotations

import fcntl
import logging
import os
import socket
import time
from pathlib import Path

log = logging.getLogger(__name__)

_ASK_AGAIN_S = 0.2


class FolderLockedError(OSError):
    """Another process has the folder open."""


class FolderLock:
    """A lock file that its owner holds open.

    The kernel lets go of the lock when its owner ends, however it ends, so a lock file left behind by a dead process
    is simply taken over; no guess is made about process ids.
    """

    def __init__(self, path: Path, *, wait_s: float = 0.0) -> None:
        """Take the lock; for `wait_s` seconds its owner may still be ending.

        Raises:
            FolderLockedError: it is held; names the process.
            OSError: the lock file cannot be written.
        """
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        deadline = time.monotonic() + wait_s
        waited = False
        while not self._taken():
            owner = os.pread(self._file, 200, 0).decode(errors="replace").strip() or "another process"
            if time.monotonic() >= deadline:
                os.close(self._file)
                raise FolderLockedError(
                    f"{path.parent} is in use by {owner}; one process owns it at a time: end that one, or choose "
                    "another name or folder"
                )
            if not waited:
                log.warning("waiting up to %.0f s until %s lets go of %s", wait_s, owner, path)
                waited = True
            time.sleep(_ASK_AGAIN_S)
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    def _taken(self) -> bool:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def release(self) -> None:
        """Let go; harmless when already released."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
