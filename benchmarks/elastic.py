"""Does throughput follow the nodes? A fleet on a cluster that Ray's autoscaler grows from one rollout node to four.

    python -m benchmarks.elastic [--episode-s 2] [--most 4] [--output FILE]

What is real: Ray, its autoscaler (with Ray's own fake nodes, on this machine), the fleet that asks for actors and lets
them go. What is not: the simulators. A rollout actor takes a node of its own and waits as long as an episode takes, so
that the processors of one machine, which four simulators would have to share, are no limit. Cells come one by one, then
many at once, then one by one again; every second is put down with the nodes that were up and the episodes that ended.
"""

from __future__ import annotations

import actors  # noqa: F401  (before ray: it settles how ray authenticates)

# isort: split
import os
import threading
import time
from collections.abc import Iterator, Sequence
from itertools import groupby, pairwise
from pathlib import Path
from typing import Annotated, Any

import ray
import typer

from actors.fleet import Fleet
from actors.nodes import NodeWatch
from actors.placement import connect
from benchmarks.fingerprint import report
from tests.elastic import elastic_cluster
from trajectories.records import Cell

NODE_CPUS = 2
RELEASE_AFTER_S = 3.0
ALONE, TOGETHER = 20, 200
"""Cells that come one by one, before and after; and those that come at once in between."""


@ray.remote(num_cpus=NODE_CPUS)
class WaitingRollout:
    """A rollout actor's shell: an episode is a wait."""

    def __init__(self, episode_s: float) -> None:
        self._episode_s = episode_s

    def rollout(self, cell: Cell) -> tuple[dict[str, Any], None]:
        time.sleep(self._episode_s)
        return {"cell": cell.key}, None


class Clock(threading.Thread):
    """Once a second: (seconds, demand, nodes up beside the head, episodes ended so far)."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.demand, self.episodes = "", 0
        self.ticks: list[tuple[float, str, int, int]] = []
        self.over = threading.Event()
        self._began = time.monotonic()

    def run(self) -> None:
        while not self.over.wait(1.0):
            nodes = sum(
                node["Alive"] and node["Resources"].get("CPU", 0) == NODE_CPUS for node in ray.nodes()
            )
            self.ticks.append((time.monotonic() - self._began, self.demand, nodes, self.episodes))


def cells(count: int) -> list[Cell]:
    return [Cell(suite="libero_object", task_id=0, init_state=0, seed=seed) for seed in range(count)]


def drive(fleet: Fleet, clock: Clock) -> None:
    """The three demands, one after the other."""

    def run(some: Sequence[Cell]) -> None:
        for _ in fleet.run(some, lambda actor, c: actor.rollout.options(num_returns=2).remote(c)):
            clock.episodes += 1

    for demand, count in (("one by one", ALONE), ("many at once", TOGETHER), ("one by one again", ALONE)):
        clock.demand = demand
        for some in [cells(count)] if demand == "many at once" else [[cell] for cell in cells(count)]:
            run(some)


def spans(ticks: Sequence[tuple[float, str, int, int]]) -> Iterator[dict[str, Any]]:
    """Of each stretch of time with one demand and one number of nodes: its seconds and episodes per second."""
    steps = list(pairwise(ticks))
    for (demand, nodes), group in groupby(steps, key=lambda step: step[0][1:3]):
        held = list(group)
        (began, _, _, before), (ended, _, _, after) = held[0][0], held[-1][1]
        yield {
            "demand": demand,
            "rollout_nodes": nodes,
            "from_s": round(began, 1),
            "for_s": round(ended - began, 1),
            "episodes_per_s": round((after - before) / (ended - began), 2),
        }


def measure(episode_s: float, most: int) -> list[dict[str, Any]]:
    """Drive the fleet on the cluster that this process has joined."""
    made: list[Any] = []

    def make(_: str | None) -> Any:
        made.append(WaitingRollout.remote(episode_s))  # type: ignore[attr-defined]
        return made[-1]

    events: list[dict[str, Any]] = []
    fleet = Fleet(
        [make(None)],
        slots=1,
        timeout_s=600.0,
        on_event=events.append,
        make=make,
        most=most,
        nodes=NodeWatch(events.append),
        release_after_s=RELEASE_AFTER_S,
    )
    ray.get(made[0].__ray_ready__.remote())
    clock = Clock()
    clock.start()
    drive(fleet, clock)
    clock.over.set()
    clock.join()
    return list(spans(clock.ticks))


def main(
    episode_s: Annotated[float, typer.Option(help="seconds of an episode")] = 2.0,
    most: Annotated[int, typer.Option(help="rollout nodes, at most")] = 4,
    output: Annotated[Path | None, typer.Option(help="JSON file to write")] = None,
) -> None:
    worker = {"CPU": NODE_CPUS, "object_store_memory": 100 << 20}
    with elastic_cluster(head={"CPU": 1}, worker=worker, least=1, most=most) as environ:
        os.environ.update(environ)
        connect()
        rows = measure(episode_s, most)
        ray.shutdown()
    settings = {"episode_s": episode_s, "most": most, "release_after_s": RELEASE_AFTER_S}
    report(
        f"rollout nodes and throughput, episodes of {episode_s:g} s", rows, settings=settings, output=output
    )


if __name__ == "__main__":
    typer.run(main)
