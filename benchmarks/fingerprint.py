"""What a measurement ran on, the table it is shown as, and the JSON file it is kept in."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

PACKAGES = ("torch", "transformers", "peft", "numpy", "ray", "mujoco", "robosuite", "hf-libero")


def software_fingerprint() -> dict[str, Any]:
    """Versions, processor and threads of this process, ready for JSON. Packages are named as on PyPI;
    what is not installed is left out."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": _cpu_model(),
        "cpus": os.cpu_count(),
        "gpu": device,
        "torch_threads": torch.get_num_threads(),
        "packages": {name: found for name in PACKAGES if (found := _version(name)) is not None},
    }


def write_json(path: Path, result: Mapping[str, Any]) -> None:
    """Write one measurement, making its folder; ends with a newline, keys in the order given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def report(
    title: str, rows: Sequence[Mapping[str, Any]], *, settings: Mapping[str, Any], output: Path | None
) -> None:
    """Print rows of one shape as a table and, where asked, keep them with their settings and what they ran on."""
    table = Table(title=title)
    for name in rows[0]:
        table.add_column(name.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console().print(table)
    if output is not None:
        write_json(output, {"settings": settings, "rows": rows, "fingerprint": software_fingerprint()})


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_model() -> str:
    """The processor's name, from /proc on Linux and from Python elsewhere."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
