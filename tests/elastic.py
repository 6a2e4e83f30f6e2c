"""A cluster on this machine that Ray's own autoscaler grows and shrinks, with its fake nodes; ended by process id.

The provider looks for its head on port 6379. This is what `ray.cluster_utils.AutoscalingCluster` starts, which cannot
be used as it is: it begins and ends with `ray stop`, which takes down every other Ray of the machine, and reads a file
that Ray's wheel does not hold.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

RAY = Path(sys.executable).with_name("ray")
OBJECT_STORE = 200 * 1024 * 1024


@contextmanager
def elastic_cluster(
    *, head: dict[str, Any], worker: dict[str, Any], least: int, most: int
) -> Iterator[dict[str, str]]:
    """Start one; yields the environment for a driver on it, with the cluster's folder as RAY_TMPDIR. Every process has
    that folder in its command line, or is a child of one that has."""
    folder = tempfile.mkdtemp(prefix="pl-", dir="/tmp")
    config = Path(folder) / "cluster.json"
    config.write_text(json.dumps(_config(head, worker, least=least, most=most)))
    environ = os.environ | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
    }
    command = [
        str(RAY),
        "start",
        "--head",
        "--port=6379",
        f"--temp-dir={folder}",
        f"--num-cpus={head['CPU']}",
    ]
    command += [f"--object-store-memory={OBJECT_STORE}", f"--autoscaling-config={config}"]
    command += ["--include-dashboard=false"]
    try:
        subprocess.run(command, env=environ, check=True, stdout=subprocess.DEVNULL)
        address = (Path(folder) / "ray_current_cluster").read_text().strip()
        yield environ | {"RAY_ADDRESS": address, "RAY_TMPDIR": folder}
    finally:
        end_processes(folder)


def _config(head: dict[str, Any], worker: dict[str, Any], *, least: int, most: int) -> dict[str, Any]:
    return {
        "cluster_name": "elastic",
        "max_workers": most,
        "upscaling_speed": 100.0,
        "idle_timeout_minutes": 0.1,
        "provider": {
            # As "fake_multinode", whose defaults are in that file.
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "launch_multiple": True,
            "head_node_id": FAKE_HEAD_NODE_ID,
        },
        "available_node_types": {
            "ray.head.default": {"resources": head, "node_config": {}, "max_workers": 0},
            "rollout": {"resources": worker, "node_config": {}, "min_workers": least, "max_workers": most},
        },
        "head_node_type": "ray.head.default",
        **{f"{kind}setup_commands": [] for kind in ("", "head_", "worker_")},
        **{f"{kind}_start_ray_commands": [] for kind in ("head", "worker")},
        **{"auth": {}, "file_mounts": {}, "cluster_synced_files": [], "initialization_commands": []},
    }


def end_processes(folder: str) -> None:
    """End every process with this folder in its command line, and their children."""
    mine: list[psutil.Process] = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and any(folder in word for word in process.cmdline()):
                mine += [process, *process.children(recursive=True)]
        except psutil.Error:
            continue
    for process in mine:
        try:
            process.kill()
        except psutil.Error:
            continue
    deadline = time.monotonic() + 20
    while any(process.is_running() for process in mine) and time.monotonic() < deadline:
        time.sleep(0.1)
