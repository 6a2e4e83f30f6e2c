"""Deadlines on calls into a simulator, which may never come back: the process ends, and leaves last words.

A call that hangs in native code cannot be interrupted from Python, and may hold the interpreter. So the clock is
faulthandler's, a thread of C code: when time is up it writes where the process is, and ends it. What it was doing, and
the same for a crash, is in a file that its successor reads.
"""

from __future__ import annotations

import faulthandler
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

_CALL_BYTES = 64
"""The file's first line, padded: the call under way. The rest is faulthandler's."""
_SHOWN_FRAMES = 3


class Deadlines:
    """Seconds that each kind of call may take; one thread of a process uses it.

    Example:
        within = Deadlines(path, {"reset": 300.0, "step": 60.0})
        with within("step"):
            simulator.step(action)
    """

    def __init__(self, path: Path, seconds: Mapping[str, float]) -> None:
        """`path`: where last words go. What an earlier process left there is in `last_words`, and is overwritten."""
        self.last_words = _read(path)
        self._seconds = dict(seconds)
        self._calls: list[str] = []
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        self._note("")
        os.lseek(self._file, 0, os.SEEK_END)
        faulthandler.enable(self._file)

    @contextmanager
    def __call__(self, call: str) -> Iterator[None]:
        """Give what is done within its seconds. A call inside another has a clock of its own, and the outer one's then
        starts anew."""
        self._calls.append(call)
        self._arm()
        try:
            yield
        finally:
            self._calls.pop()
            if self._calls:
                self._arm()
            else:
                faulthandler.cancel_dump_traceback_later()
                self._note("")

    def _arm(self) -> None:
        call = self._calls[-1]
        self._note(f"{call} of at most {self._seconds[call]:g} s")
        faulthandler.dump_traceback_later(self._seconds[call], exit=True, file=self._file)

    def _note(self, text: str) -> None:
        os.pwrite(self._file, text.encode()[: _CALL_BYTES - 1].ljust(_CALL_BYTES - 1) + b"\n", 0)


def _read(path: Path) -> str:
    """What a process that is no more was doing, in one line; empty when it left nothing."""
    if not path.exists():
        return ""
    call, _, dump = path.read_text(errors="replace").partition("\n")
    lines = [line.strip() for line in dump.splitlines()]
    frames = [line for line in lines if line.startswith("File ")][:_SHOWN_FRAMES]
    what = next((line for line in lines if line.startswith(("Timeout", "Fatal Python error"))), "")
    said = [f"during {call.strip()}" if call.strip() else "", what, " <- ".join(frames)]
    return ": ".join(part for part in said if part)
