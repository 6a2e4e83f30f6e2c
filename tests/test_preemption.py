"""A node is told that it is about to go, as a cloud tells a spot machine, and goes: no episode is lost with it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import psutil
import pytest

from tests.driven import count, drive
from tests.elastic import RAY, elastic_cluster
from trajectories.journal import read_journal

WORKER_NODE = """
import ray
ray.init(log_to_driver=False)
print(next(n["NodeID"] for n in ray.nodes() if n["Alive"] and n["Resources"].get("CPU") == 2))
"""
KINDS = ("node_draining", "node_joined", "node_lost", "actor_restarted")
GOES_AFTER_S = 150
"""Seconds from the notice to the end of the node, unless it is left before."""


class Preemption(threading.Thread):
    """Gives a node with a rollout actor notice while it is at work, and ends it once it has been left."""

    def __init__(self, run: Path, environ: Mapping[str, str]) -> None:
        super().__init__(daemon=True)
        self._run, self._environ = run, environ
        self.node = ""

    def run(self) -> None:
        while count(self._run, "rollout") < 3:
            time.sleep(0.2)
        asked = [sys.executable, "-c", WORKER_NODE]
        found = subprocess.run(asked, env=self._environ, capture_output=True, text=True, check=True)
        self.node = found.stdout.split()[-1]
        notice = [
            *(str(RAY), "drain-node", "--node-id", self.node, "--address", self._environ["RAY_ADDRESS"]),
            *("--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "the spot market"),
            *("--deadline-remaining-seconds", str(GOES_AFTER_S)),
        ]
        subprocess.run(notice, env=self._environ, check=True, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + GOES_AFTER_S
        while not moved(self._run) and time.monotonic() < deadline:
            time.sleep(0.2)
        end(self.node)


def moved(run: Path) -> list[str]:
    """Why actors were restarted so far."""
    return [e["reason"] for e in read_journal(run / "events.jsonl") if e["event"] == "actor_restarted"]


def end(node: str) -> None:
    """Kill the node's own process, which the provider of the cluster told its id. Where there is none, the autoscaler
    was first: a node that has been left is idle."""
    for process in psutil.process_iter():
        try:
            words = process.cmdline()
            told = process.environ().get("RAY_OVERRIDE_NODE_ID_FOR_TESTING")
            if words and os.path.basename(words[0]) == "raylet" and told == node:
                process.kill()
        except psutil.Error:
            continue


@pytest.mark.ray
@pytest.mark.libero
def test_a_node_that_is_given_notice_is_left_before_it_goes(trained_run: Path, tmp_path: Path) -> None:
    settings = [
        *(f"start={trained_run}", f"root={tmp_path}", "name=spot", "tasks.train_init_states=[4..9]"),
        *("tasks.held_out_init_states=[40]", "guard.canary_episodes=0", "preference.steps=5"),
        *("rollouts.rounds=1", "rollouts.init_states_per_round=4", "rollouts.samples_per_state=5"),
        *("rollouts.actors=2", "rollouts.envs_per_actor=1", "rollouts.cpus_per_actor=2"),
    ]
    run = tmp_path / "spot"
    worker = {"CPU": 2, "object_store_memory": 100 << 20}
    with elastic_cluster(head={"CPU": 1}, worker=worker, least=2, most=3) as environ:
        preemption = Preemption(run, environ)
        preemption.start()
        done = drive(settings, environ)
    assert done.returncode == 0, done.stderr[-3000:]
    events = read_journal(run / "events.jsonl")
    assert moved(run) == [f"its node {preemption.node[:8]} is about to go"]
    kinds = [e["event"] for e in events if e["event"] in KINDS]
    assert sorted(kinds) == sorted(KINDS)  # each once
    kinds.remove("node_joined")  # the autoscaler's own time: before the actor is moved, or after
    assert kinds == ["node_draining", "actor_restarted", "node_lost"]
    assert not [e for e in events if e["event"] in ("requeued", "quarantined")]
    driven = [e for e in read_journal(run / "episodes.jsonl") if e["phase"] == "rollout"]
    assert len({(e["init_state"], e["seed"]) for e in driven}) == len(driven) == 20
    assert not any(e["outcome"] == "fault" for e in driven)
