"""One owner at a time for a folder, among the processes of a machine (and of those that share a file system)."""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path


class FolderLockedError(OSError):
    """Another process has the folder open."""


class FolderLock:
    """A lock file that its owner holds open.

    The kernel lets go of the lock when its owner ends, however it ends, so a lock file left behind by a dead process
    is simply taken over; no guess is made about process ids.
    """

    def __init__(self, path: Path) -> None:
        """Take the lock.

        Raises:
            FolderLockedError: it is held; names the process.
            OSError: the lock file cannot be written.
        """
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.read(self._file, 200).decode(errors="replace").strip()
            os.close(self._file)
            raise FolderLockedError(
                f"{path.parent} is in use by {owner or 'another process'}; one process owns it at a time: end that "
                "one, or choose another name or folder"
            ) from error
        os.ftruncate(self._file, 0)
        os.write(self._file, f"process {os.getpid()} on {socket.gethostname()}\n".encode())

    def release(self) -> None:
        """Let go; harmless when already released."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
