"""A run on a cluster that Ray's autoscaler grows and shrinks: nodes come when there are episodes for them, and go while
there are none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.driven import drive
from tests.elastic import elastic_cluster
from trajectories.journal import read_journal


@pytest.mark.ray
@pytest.mark.libero
def test_rollout_nodes_come_and_go_with_the_work(trained_run: Path, tmp_path: Path) -> None:
    """One node with room for one rollout actor, up to four while episodes wait, one again while the learner works."""
    settings = [
        *(f"start={trained_run}", f"root={tmp_path}", "name=elastic", "tasks.train_init_states=[4..9]"),
        *("tasks.held_out_init_states=[40]", "guard.canary_episodes=4", "preference.steps=150"),
        *("rollouts.rounds=1", "rollouts.init_states_per_round=4", "rollouts.samples_per_state=5"),
        *("rollouts.actors=4", "rollouts.least_actors=1", "rollouts.envs_per_actor=1"),
        *("rollouts.cpus_per_actor=2", "rollouts.release_after_s=3"),
    ]
    # Half a processor each for the learner and the policy actor; rollout actors find room on other nodes alone.
    worker = {"CPU": 2, "object_store_memory": 100 << 20}
    with elastic_cluster(head={"CPU": 1}, worker=worker, least=1, most=4) as environ:
        done = drive(settings, environ)
    assert done.returncode == 0, done.stderr[-2000:]
    run = tmp_path / "elastic"
    assert json.loads(done.stdout.splitlines()[-1])["held_out_episodes"] == 1
    beats = [m for m in read_journal(run / "metrics.jsonl") if m["stage"] == "fleet"]
    ready = [beat["rollout_actors"]["ready"] for beat in beats]
    assert max(ready) == 4, ready
    assert {len(beat["nodes"]) for beat in beats} >= {5}
    assert all({"starting", "failed", "infeasible"} == set(beat["autoscaler"]) for beat in beats)
    moves = [
        e["event"] for e in read_journal(run / "events.jsonl") if e["event"] in ("node_joined", "node_lost")
    ]
    assert moves[:3] == ["node_joined"] * 3
    assert moves[3:6] == ["node_lost"] * 3  # while the learner worked
    assert "node_joined" in moves[6:]  # for the canary
    driven = [e for e in read_journal(run / "episodes.jsonl") if e["phase"] == "rollout"]
    assert len({(e["round"], e["init_state"], e["seed"]) for e in driven}) == len(driven) == 20
    assert not [e for e in read_journal(run / "events.jsonl") if e["event"] == "actor_restarted"]
