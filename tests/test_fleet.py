"""The fleet: cells go to rollout actors that die, hang, come and go, and every one of them comes back once."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import ray

from actors.fleet import Fleet
from actors.members import Members
from actors.placement import connect
from trajectories.records import Cell

pytestmark = pytest.mark.ray


def cell(state: int) -> Cell:
    return Cell(suite="libero_object", task_id=0, init_state=state, seed=0)


@pytest.fixture(scope="module", autouse=True)
def cluster() -> None:
    connect()


@ray.remote
class Worker:
    """A rollout actor's shell around nothing: episodes that die or hang on demand."""

    def work(self, cell: Cell, marks: str) -> tuple[dict[str, Any], str]:
        first_time = not (Path(marks) / cell.key.replace("/", "_")).exists()
        (Path(marks) / cell.key.replace("/", "_")).touch()
        if cell.init_state == 1 and first_time:
            os.kill(os.getpid(), signal.SIGKILL)
        if cell.init_state == 2 and first_time:
            time.sleep(1000)
        if cell.init_state == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return {"cell": cell.key}, cell.key


def test_fleet_replaces_the_dead_and_the_hung_and_loses_no_cell(tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    workers = [Worker.options(num_cpus=0.1, max_restarts=-1).remote() for _ in range(2)]  # type: ignore[attr-defined]
    fleet = Fleet(workers, slots=1, timeout_s=15.0, on_event=events.append)
    cells = [cell(s) for s in range(8)]
    done = [
        record["cell"]
        for record, _ in fleet.run(
            cells, lambda actor, c: actor.work.options(num_returns=2).remote(c, str(tmp_path))
        )
    ]
    assert sorted(done) == sorted(c.key for c in cells if c.init_state != 3)
    assert [e["cell"] for e in events if e["event"] == "quarantined"] == [cell(3).key]
    restarts = [e["reason"] for e in events if e["event"] == "actor_restarted"]
    assert restarts.count("an episode took longer than 15 s") == 1
    assert len(restarts) == 5  # state 1 once, state 2 once, state 3 three times


def test_the_oldest_actor_stays_though_it_was_idle_first() -> None:
    def make(_: str | None) -> Any:
        return Worker.options(num_cpus=0.1).remote()  # type: ignore[attr-defined]

    members = Members([make(None)], slots=1, on_event=print, make=make, most=3, release_after_s=0.0)
    members.scale(cells=5)
    while len(members.ready()) < 3:
        members.greet()
    members.release(busy={1, 2})
    assert [member.index for member in members] == [0, 1, 2]
    members.release(busy={2})
    assert [member.index for member in members] == [0, 2]
    members.release(busy=set())
    assert [member.index for member in members] == [0]
    ray.kill(next(iter(members)).actor)


def test_an_actor_that_has_not_come_yet_is_wanted_as_long_as_there_is_work_for_it() -> None:
    def make(_: str | None) -> Any:
        made = [*members] if members is not None else []
        return Worker.options(num_cpus=1000 if made else 0.1).remote()  # type: ignore[attr-defined]

    members: Members | None = None
    members = Members([make(None)], slots=1, on_event=print, make=make, most=2, release_after_s=0.0)
    while not members.ready():
        members.greet()
    members.scale(cells=5)
    waiting = [member.actor for member in members]
    members.release(busy={0})
    assert [member.actor for member in members] == waiting
    members.scale(cells=0)
    members.release(busy=set())
    assert [member.actor for member in members] == waiting[:1]
    ray.kill(waiting[0])


def test_a_cell_whose_trajectory_is_lost_before_it_is_kept_is_run_again() -> None:
    """As when the node that holds it goes between the record's arrival and the store's."""
    events: list[dict[str, Any]] = []
    worker = Payload.options(num_cpus=0.1).remote()  # type: ignore[attr-defined]
    fleet = Fleet([worker], slots=1, timeout_s=60.0, on_event=events.append)
    kept: list[bytes] = []

    def keep(record: dict[str, Any], trajectory: ray.ObjectRef) -> None:
        if record["cell"] == cell(1).key and not events:
            owner = Payload.options(num_cpus=0.1).remote()  # type: ignore[attr-defined]
            (lost,) = ray.get(owner.put.remote())
            ray.kill(owner)  # and with it, in a moment, what it owned
            for _ in range(100):
                ray.get(lost)
                time.sleep(0.1)
        kept.append(ray.get(trajectory))

    done = [
        record["cell"]
        for record, _ in fleet.run(
            [cell(0), cell(1), cell(2)],
            lambda actor, c: actor.work.options(num_returns=2).remote(c),
            keep=keep,
        )
    ]
    assert sorted(done) == [cell(s).key for s in range(3)]
    assert len(kept) == 3
    (event,) = events
    assert (event["event"], event["cell"]) == ("requeued", cell(1).key)
    assert event["reason"].startswith("its trajectory was lost")
    ray.kill(worker)


@ray.remote
class Payload:
    def work(self, cell: Cell) -> tuple[dict[str, Any], bytes]:
        return {"cell": cell.key}, bytes(1 << 20)

    def put(self) -> list[ray.ObjectRef]:
        return [ray.put(bytes(1 << 20))]


@ray.remote
class SharedWorker:
    """A rollout actor's shell in which several episodes are under way when one of them ends the process."""

    async def work(self, cell: Cell) -> tuple[dict[str, Any], str]:
        if cell.init_state == 9:
            return {"cell": cell.key}, cell.key
        await asyncio.sleep(0.5)
        if cell.init_state == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        await asyncio.sleep(0.5)
        return {"cell": cell.key}, cell.key


def test_a_cell_that_kills_its_actor_is_not_charged_to_its_neighbours() -> None:
    events: list[dict[str, Any]] = []
    worker = SharedWorker.options(num_cpus=0.1, max_restarts=-1, max_concurrency=4).remote()  # type: ignore[attr-defined]
    fleet = Fleet([worker], slots=4, timeout_s=60.0, on_event=events.append)
    cells = [cell(s) for s in range(6)]
    done = [
        record["cell"]
        for record, _ in fleet.run(cells, lambda actor, c: actor.work.options(num_returns=2).remote(c))
    ]
    assert sorted(done) == sorted(c.key for c in cells if c.init_state != 3)
    assert {e["cell"] for e in events if e.get("attempt")} == {cell(3).key}
    assert [e["cell"] for e in events if e["event"] == "quarantined"] == [cell(3).key]
    neighbours = {e["cell"] for e in events if e["event"] == "requeued"} - {cell(3).key}
    assert neighbours == {cell(s).key for s in (0, 1, 2)}
    assert sum(e["event"] == "actor_restarted" for e in events) == 4


def test_a_death_that_is_heard_of_after_the_restart_counts_once() -> None:
    events: list[dict[str, Any]] = []

    def take_note(event: dict[str, Any]) -> None:
        events.append(event)
        time.sleep(0.2)  # long enough for the actor that is already back to answer

    worker = SharedWorker.options(num_cpus=0.1, max_restarts=-1, max_concurrency=4).remote()  # type: ignore[attr-defined]
    fleet = Fleet([worker], slots=4, timeout_s=60.0, on_event=take_note)
    for record, _ in fleet.run(
        [cell(s) for s in (9, 0, 1, 3)],
        lambda actor, c: actor.work.options(num_returns=2).remote(c),
    ):
        if record["cell"] == cell(9).key:
            time.sleep(2.0)  # meanwhile state 3 ends the process,
            ray.get(worker.__ray_ready__.options(max_task_retries=-1).remote())  # and another takes its place
    deaths_alone = 3
    assert sum(e["event"] == "actor_restarted" for e in events) == 1 + deaths_alone


@ray.remote
class Introducing:
    """A rollout actor's shell that says where it is."""

    def introduce(self) -> dict[str, Any]:
        node = ray.get_runtime_context().get_node_id()
        return {"node": node, "process": os.getpid(), "last_words": ""}


class Leaving:
    """Of a node watch: every node is about to go."""

    def look(self) -> set[str]:
        return {node["NodeID"] for node in ray.nodes()}


def test_an_actor_that_was_moved_is_back_only_as_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[dict[str, Any]] = []
    worker = Introducing.options(num_cpus=0.1, max_restarts=-1, max_task_retries=-1).remote()  # type: ignore[attr-defined]
    members = Members([worker], slots=1, on_event=events.append, nodes=Leaving())  # type: ignore[arg-type]
    member = next(iter(members))
    while member.away is not None:
        members.greet()
    kill, killed = ray.kill, threading.Event()
    monkeypatch.setattr(
        ray, "kill", lambda *args, **kwargs: killed.set()
    )  # told, and not heard of for a second
    old = member.process
    deadline = time.monotonic() + 1
    while time.monotonic() < deadline:
        members.watch(busy=set())
        members.greet()
    assert killed.is_set()
    assert member.away is not None
    assert [e["reason"] for e in events] == [f"its node {member.node[:8]} is about to go"]
    kill(worker, no_restart=False)
    while member.away is not None:
        members.greet()
    assert member.process != old
    kill(worker)
