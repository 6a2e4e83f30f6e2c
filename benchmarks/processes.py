"""How much memory a process takes."""

from __future__ import annotations

import re
from pathlib import Path

import psutil


def own_mib(pid: int) -> float:
    """What a process has to itself, now: pages of the object store, which all map, are nobody's own."""
    return round(psutil.Process(pid).memory_full_info().uss / 2**20, 1)


def peak_bytes() -> int:
    """The greatest memory of this process so far; unlike `ru_maxrss` it begins with this program, not with the one that
    started it."""
    found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])
