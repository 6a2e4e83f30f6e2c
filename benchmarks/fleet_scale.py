"""A thousand rollout actors' worth of episodes, into the pair store and the live page: rate, and memory over time.

    python -m benchmarks.fleet_scale [--actors 1000] [--episode-s 25] [--rounds 10] [--output FILE]

What is real: Ray, the fleet that hands out cells, the store actor with its durable files, the run folder, the page with
somebody watching it. What is not: the simulators and the policy. A few processes stand for all the rollout actors: each
of their many slots waits as long as an episode takes, and gives back a trajectory of the quickstart's size. Every round
is driven with a version of its own, and its pairs are mined as a learner's would be, none of an earlier version.
"""

from __future__ import annotations

import actors  # noqa: F401  (before ray: it settles how ray authenticates)

# isort: split
import asyncio
import heapq
import random
import tempfile
import threading
import time
import urllib.request
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
import psutil
import ray
import typer

from actors.crew import Crew
from actors.fleet import Fleet
from actors.placement import connect
from actors.run_folder import RunFolder
from actors.stages import drive
from benchmarks.fingerprint import report
from benchmarks.processes import own_mib
from configs.loader import load_recipe
from configs.preference import PreferencePart
from dashboard.server import Dashboard
from trajectories.codec import episode_record
from trajectories.records import ActionSample, Cell, Decision, Observation, Trajectory

QUICKSTART = Path("configs/quickstart.yaml")
PROCESSES = 4
DECISIONS, SIDE, CHUNK = 20, 64, 8
STATES, TASKS = 30, 10
HASH = "0" * 64
MINED_BYTES = 1 << 30
"""What the trajectories of a round take in the object store on their way to a learner."""


@ray.remote(num_cpus=0.1)
class ManyRollouts:
    """Many rollout actors' slots in one process."""

    def __init__(self, episode_s: float) -> None:
        self._episode_s = episode_s
        rows = np.linspace(0, 255, SIDE, dtype=np.uint8)
        self._image = np.broadcast_to(rows[:, None, None], (SIDE, SIDE, 3)).copy()

    async def rollout(self, cell: Cell, *, version: int, **_: Any) -> tuple[dict[str, Any], Trajectory]:
        await asyncio.sleep(lasts(cell, self._episode_s))
        drawn = random.Random(cell.key)
        outcome = "success" if drawn.random() < 0.5 else "timeout"
        trajectory = Trajectory(
            cell=cell,
            decisions=tuple(self._decision(drawn) for _ in range(DECISIONS)),
            outcome=outcome,  # type: ignore[arg-type]
            env_steps=DECISIONS * CHUNK,
            policy_version=version,
            policy_hash=HASH,
        )
        return episode_record(trajectory), trajectory

    def _decision(self, drawn: random.Random) -> Decision:
        moved = np.roll(self._image, drawn.randrange(SIDE), axis=1)
        sample = ActionSample(
            actions=np.zeros((CHUNK, 7), np.float32),
            model_chunk=np.array([drawn.randrange(21) for _ in range(CHUNK * 7)], np.int64),
            logps=np.full(CHUNK * 7, -1.0, np.float32),
        )
        seen = Observation(
            agentview=moved, wrist=moved, proprio=np.zeros(8, np.float32), instruction="pick it up"
        )
        return Decision(observation=seen, sample=sample, executed=CHUNK)


def lasts(cell: Cell, episode_s: float) -> float:
    """Seconds that the episode of a cell takes."""
    return episode_s * random.Random(f"{cell.key} lasts").uniform(0.5, 1.5)


def least_wall_s(cells: list[Cell], *, slots: int, episode_s: float) -> float:
    """What a round takes when each cell goes to the first slot that is free, and nothing costs time but episodes."""
    free = [0.0] * slots
    for cell in cells:
        heapq.heapreplace(free, free[0] + lasts(cell, episode_s))
    return max(free)


class Watcher(threading.Thread):
    """Somebody with the page open: reads the stream of events to its end."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        parts = urlsplit(url)
        self._request = urllib.request.Request(
            f"{parts.scheme}://{parts.netloc}/api/events",
            headers={"Authorization": f"Bearer {parse_qs(parts.query)['token'][0]}"},
        )
        self.received = 0

    def run(self) -> None:
        with urllib.request.urlopen(self._request) as stream:
            while chunk := stream.read1(1 << 16):
                self.received += len(chunk)


def cells_of(round_index: int, count: int) -> list[Cell]:
    """Groups of four samples from one state, every round with seeds of its own."""
    return [
        Cell(
            suite="libero_object",
            task_id=number // 4 % TASKS,
            init_state=number // (4 * TASKS) % STATES,
            seed=round_index * 1_000_000 + number,
        )
        for number in range(count)
    ]


def store_pid() -> int:
    """The store's process, among this driver's own."""
    own = psutil.Process().children(recursive=True)
    return next(p.pid for p in own if any(word.startswith("ray::Store") for word in p.cmdline()))


def measure(
    folder: RunFolder, crew: Crew, watcher: Watcher, *, slots: int, episode_s: float, rounds: int
) -> list[dict[str, Any]]:
    """One row a round of as many cells as so many slots finish in a minute if they are never free."""
    rows = []
    for index in range(rounds):
        cells = cells_of(index, int(60 * slots / episode_s))
        ray.get(crew.store.register_version.remote(index, HASH))
        out = drive(
            crew,
            folder,
            cells,
            version=index,
            temperature=1.0,
            phase="rollout",
            round_index=index,
            keep=True,
        )
        started = time.monotonic()
        counts = ray.get(crew.store.mine.options(num_returns=3).remote(index)[2])
        rows.append(
            {
                "round": index,
                "episodes": len(out.success),
                "episodes_per_s": round(len(out.success) / out.wall_s, 1),
                "wall_s": round(out.wall_s, 1),
                "least_wall_s": round(least_wall_s(cells, slots=slots, episode_s=episode_s), 1),
                "pairs": counts.pairs,
                "mining_s": round(time.monotonic() - started, 1),
                "store_mib": own_mib(store_pid()),
                "driver_and_page_mib": own_mib(psutil.Process().pid),
                "page_sent_mib": round(watcher.received / 2**20, 1),
            }
        )
    return rows


def main(
    number: Annotated[int, typer.Option("--actors", help="rollout actors to stand for")] = 1000,
    episode_s: Annotated[float, typer.Option(help="seconds of an episode, in the mean")] = 25.0,
    rounds: Annotated[int, typer.Option(help="rounds, each of somewhat more than a minute")] = 10,
    output: Annotated[Path | None, typer.Option(help="JSON file to write")] = None,
) -> None:
    connect(weight_bytes=MINED_BYTES)
    with tempfile.TemporaryDirectory() as root:
        recipe = load_recipe(QUICKSTART, [f"root={root}", "name=scale"])
        folder = RunFolder.create(recipe)
        page = Dashboard(folder.path)
        page.start()
        watcher = Watcher(page.url)
        watcher.start()
        crew = Crew()
        crew.start_store(str(folder.path), preference=PreferencePart(max_staleness=0), seed=0)
        slots = number // PROCESSES
        made = [ManyRollouts.options(max_concurrency=slots + 1).remote(episode_s) for _ in range(PROCESSES)]  # type: ignore[attr-defined]
        crew.fleet = Fleet(made, slots=slots, timeout_s=600.0, on_event=folder.event)
        try:
            rows = measure(folder, crew, watcher, slots=slots * PROCESSES, episode_s=episode_s, rounds=rounds)
        finally:
            crew.dismiss()
            page.stop()
            folder.release()
    settings = {"actors": number, "episode_s": episode_s, "processes": PROCESSES}
    report(f"{number} rollout actors, episodes of {episode_s:g} s", rows, settings=settings, output=output)


if __name__ == "__main__":
    typer.run(main)
