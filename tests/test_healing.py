"""Simulators that hang and renderers that fail: the fleet goes on, and says what happened."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from actors.fleet import Fleet
from actors.members import FleetLostError
from actors.placement import connect
from actors.rollout import RolloutActor, Rollouts
from configs.operation import DeadlinePart
from configs.world import DemonstrationPart, EnvironmentPart
from envs.assets import resolve_assets
from trajectories.records import ActionSample, Cell, Observation

SMALL = EnvironmentPart(image_size=32, geometry="collision", max_steps=16)
pytestmark = [pytest.mark.ray, pytest.mark.libero]


def cell(state: int) -> Cell:
    return Cell(suite="libero_object", task_id=0, init_state=state, seed=0)


def first_frame(actor: Any, cell: Cell) -> list[ray.ObjectRef]:
    return actor.first_frame.options(num_returns=2).remote(cell)


def demonstration(actor: Any, cell: Cell) -> list[ray.ObjectRef]:
    """Resets, draws and steps."""
    part = DemonstrationPart()
    return actor.demonstration.options(num_returns=2).remote(cell, part=part, chunk=8, depth=False)


@pytest.fixture(scope="module", autouse=True)
def cluster() -> None:
    connect()


@ray.remote
class HangsOnce(Rollouts):
    """Its first step from initial state 1 never ends."""

    def __init__(self, marks: str) -> None:
        deadlines = DeadlinePart(step_s=2.0)
        super().__init__(environment=SMALL, assets=resolve_assets(None), num_envs=2, deadlines=deadlines)
        self._mark = Path(marks) / "hung"

    async def first_frame(self, cell: Cell) -> tuple[dict[str, Any], str]:
        if cell.init_state == 1 and not self._mark.exists():
            self._mark.touch()
            with self._deadlines("step"):
                time.sleep(1000)
        record, content = await super().first_frame(cell)
        return record | {"cell": cell.key}, content


def test_a_step_that_hangs_is_ended_at_its_deadline_and_its_cell_is_run_again(tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    actor = HangsOnce.options(num_cpus=0.1, max_restarts=-1, max_concurrency=3).remote(str(tmp_path))  # type: ignore[attr-defined]
    fleet = Fleet([actor], slots=2, timeout_s=600.0, on_event=events.append)
    started = time.monotonic()
    done = [record["cell"] for record, _ in fleet.run([cell(0), cell(1), cell(2)], first_frame)]
    assert sorted(done) == [cell(i).key for i in range(3)]
    assert time.monotonic() - started < 120
    (words,) = [e["reason"] for e in events if e["event"] == "last_words"]
    assert words.startswith("during step of at most 2 s: Timeout (0:00:02)!: File ")
    assert "test_healing.py" in words
    assert [e["event"] for e in events if e["event"] in ("actor_restarted", "quarantined")] == [
        "actor_restarted"
    ]
    ray.kill(actor)


@pytest.mark.parametrize("call", ["reset", "step", "render"])
def test_real_simulator_calls_have_their_deadlines(call: str) -> None:
    """None ends within ten microseconds: the cell is given up after three tries, with the reason on record."""
    events: list[dict[str, Any]] = []
    deadlines = DeadlinePart.model_validate({f"{call}_s": 1e-5})
    actor = RolloutActor.options(num_cpus=0.1, max_restarts=-1).remote(
        environment=SMALL, assets=resolve_assets(None), num_envs=1, deadlines=deadlines
    )
    fleet = Fleet([actor], slots=1, timeout_s=600.0, on_event=events.append)
    assert list(fleet.run([cell(0)], demonstration)) == []
    assert [e["cell"] for e in events if e["event"] == "quarantined"] == [cell(0).key]
    fleet.members.greet()
    words = [e["reason"] for e in events if e["event"] == "last_words"]
    assert words
    assert all(text.startswith(f"during {call} of at most 1e-05 s: Timeout") for text in words)
    ray.kill(actor)


def test_a_renderer_that_keeps_failing_is_replaced_by_osmesa_and_then_given_up() -> None:
    """EGL without a driver, as after a driver's crash; then OSMesa, where its library cannot be loaded either."""
    events: list[dict[str, Any]] = []

    def make(renderer: str | None) -> Any:
        broken = {"__EGL_VENDOR_LIBRARY_FILENAMES": "/nowhere.json"}
        return RolloutActor.options(num_cpus=0.1, max_restarts=-1, runtime_env={"env_vars": broken}).remote(
            environment=SMALL.model_copy(update={"renderer": renderer or "egl"}),
            assets=resolve_assets(None),
            num_envs=1,
        )

    fleet = Fleet([make(None)], slots=1, timeout_s=600.0, on_event=events.append, make=make)
    records = [record for record, _ in fleet.run([cell(0)], first_frame)]
    assert [record["renderer"] for record in records] == ["osmesa"]
    assert [e["event"] for e in events] == ["requeued"] * 3 + ["renderer_fell_back"]
    assert events[-1]["reason"].startswith("egl: ")
    (member,) = fleet.members
    for _ in range(2):
        fleet.members.strike(member, "osmesa: no picture")
    with pytest.raises(
        FleetLostError, match=r"no rollout actor is left that can draw: osmesa: no picture; set env"
    ):
        fleet.members.strike(member, "osmesa: no picture")
    assert events[-1] == {"event": "renderer_quarantined", "actor": 1, "reason": "osmesa: no picture"}


@ray.remote
class HangsUntilItIsEnded:
    """A policy actor that never answers, until another process takes its place: that one decides to do nothing."""

    def __init__(self, marks: str) -> None:
        mark = Path(marks) / "hung"
        self._hangs = not mark.exists()
        mark.touch()

    def act(self, observation: Observation, **_: Any) -> tuple[ActionSample, str]:
        if self._hangs:
            time.sleep(1000)
        still = np.zeros((8, 7), np.float32)
        return ActionSample(actions=still, model_chunk=np.zeros(56, np.int64), logps=np.zeros(56)), "hash"


def test_a_policy_actor_that_hangs_is_ended_and_the_episode_is_run_again(tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    policy = HangsUntilItIsEnded.options(num_cpus=0.1, max_restarts=-1).remote(str(tmp_path))  # type: ignore[attr-defined]
    actor = RolloutActor.options(num_cpus=0.1, max_restarts=-1, max_concurrency=2).remote(
        environment=SMALL, assets=resolve_assets(None), num_envs=1, deadlines=DeadlinePart(answer_s=5.0)
    )
    fleet = Fleet([actor], slots=1, timeout_s=600.0, on_event=events.append)

    def launch(actor: Any, cell: Cell) -> list[ray.ObjectRef]:
        return actor.rollout.options(num_returns=2).remote(
            cell, policies=[policy], version=0, temperature=1.0
        )

    (record,) = [record for record, _ in fleet.run([cell(0)], launch)]
    assert record["outcome"] == "timeout"
    assert [e["event"] for e in events] == ["requeued"]
    assert events[0]["reason"].startswith(
        "a policy actor hung for 5 s, and is ended; raise deadlines.answer_s"
    )
    for one in (policy, actor):
        ray.kill(one)
