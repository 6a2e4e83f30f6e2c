"""Actors of every kind and a node are killed while a run goes on: it ends with what the clean run ends with."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.driven import CHANGES, assert_ended_alike, count, drive, hashes
from tests.elastic import elastic_cluster
from trajectories.journal import read_journal

HELD = """
import json, ray
ray.init(log_to_driver=False)
print(json.dumps([ray.available_resources(), ray.cluster_resources()]))
"""


def stages(run: Path) -> Counter[str]:
    return Counter(m["stage"] for m in read_journal(run / "metrics.jsonl"))


def titled(folder: str, title: str) -> psutil.Process:
    """A process of the cluster in this folder: a raylet, or a worker of one by its title."""
    for raylet in psutil.process_iter():
        try:
            words = raylet.cmdline()
            if not (words and words[0].endswith("/raylet") and any(folder in word for word in words)):
                continue
            if title == "raylet" and not any("--head" in word for word in words):
                return raylet
            for worker in raylet.children(recursive=True):
                if any(word.startswith(title) for word in worker.cmdline()):
                    return worker
        except psutil.Error:  # it ended meanwhile
            continue
    raise LookupError(f"no {title} in the cluster of {folder}")


class Chaos(threading.Thread):
    """Kills one process after another, each at a random moment after what it waits for has happened. The seed is new
    each time, unless PAIRLOOM_CHAOS_SEED names it."""

    def __init__(self, folder: str, plan: list[tuple[str, Callable[[], bool]]]) -> None:
        super().__init__(daemon=True)
        self._folder, self._plan = folder, plan
        self.seed = int(os.environ.get("PAIRLOOM_CHAOS_SEED", time.time_ns()))
        self._random = random.Random(self.seed)
        self.killed: list[str] = []

    def run(self) -> None:
        for title, due in self._plan:
            while not due():
                time.sleep(0.1)
            time.sleep(self._random.uniform(0.0, 1.0))
            os.kill(titled(self._folder, title).pid, signal.SIGKILL)
            self.killed.append(title)
            time.sleep(1.0)


@pytest.mark.ray
@pytest.mark.libero
def test_kills_of_every_kind_cost_nothing(trained_run: Path, clean_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "chaos"
    plan: list[tuple[str, Callable[[], bool]]] = [
        ("ray::Rollouts", lambda: count(run, "rollout") >= 2),
        ("ray::PolicyServer", lambda: count(run, "rollout") >= 4),
        ("ray::Learner", lambda: stages(run)["update"] >= 1),
        ("ray::ShardServer", lambda: count(run, "canary") >= 1),
        ("ray::PolicyServer", lambda: count(run, "canary") >= 2),
        # The second round.
        ("raylet", lambda: count(run, "rollout") >= 9),  # a node, with the rollout actor on it
        ("ray::Store", lambda: count(run, "rollout") >= 12),
        ("ray::Learner", lambda: count(run, "rollout") >= 13),  # which has nothing to do, and nobody asks it
    ]
    worker: dict[str, Any] = {"CPU": 2, "object_store_memory": 100 << 20}
    with elastic_cluster(head={"CPU": 1}, worker=worker, least=2, most=2) as environ:
        folder = environ["RAY_TMPDIR"]
        chaos = Chaos(folder, plan)
        chaos.start()
        settings = [*CHANGES, f"start={trained_run}", f"root={tmp_path}", "name=chaos"]
        settings += ["rollouts.actors=2", "rollouts.envs_per_actor=2", "rollouts.cpus_per_actor=2"]
        done = drive(settings, environ)
        assert done.returncode == 0, f"seed {chaos.seed}: {done.stderr[-3000:]}"
        assert chaos.killed == [title for title, _ in plan]
        deadline = time.monotonic() + 60
        while True:  # until what the driver held is given back, and the new node is there
            asked = subprocess.run(
                [sys.executable, "-c", HELD], env=environ, capture_output=True, text=True, check=True
            )
            free, all_there_is = json.loads(asked.stdout.splitlines()[-1])
            if free.get("CPU") == all_there_is["CPU"] == 5.0 or time.monotonic() > deadline:
                break
        assert free["CPU"] == all_there_is["CPU"] == 5.0
        assert free["object_store_memory"] > 0.9 * all_there_is["object_store_memory"]

    assert_ended_alike(run, clean_run)
    events = read_journal(run / "events.jsonl")
    restarted = Counter(e["kind"] for e in events if e["event"] == "actor_restarted")
    assert restarted["rollout"] >= 2
    assert restarted["policy"] >= 1
    assert restarted["learner"] == 2
    assert {"node_lost", "node_joined"} <= {e["event"] for e in events}
    served = [(e["version"], e["hash"]) for e in events if e["event"] == "serving"]
    assert set(served) <= set(hashes(run).items())
    assert served.count((0, hashes(run)[0])) >= 2  # again, by the one that took the killed one's place
