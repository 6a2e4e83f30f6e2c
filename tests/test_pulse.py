"""The pulse of a sweep beats whether episodes end or not, and names the actors that answered, whichever did not."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import ray

from actors import pulse
from actors.crew import Crew
from actors.placement import connect
from actors.pulse import Pulse, answers
from actors.run_folder import RunFolder
from trajectories.journal import read_journal

pytestmark = pytest.mark.ray


@ray.remote(num_cpus=0)
class Serves:
    """A policy actor as the pulse sees one; of version 0, one that is busy."""

    def __init__(self, version: int) -> None:
        self._version = version

    def serving(self) -> dict[str, Any]:
        if self._version == 0:
            time.sleep(1000)
        return {"version": self._version}


def test_an_actor_that_does_not_answer_leaves_the_others_their_places() -> None:
    connect()
    actors = [Serves.remote(version) for version in (0, 5, 6)]
    asked = [actor.serving.remote() for actor in actors]
    ray.wait(asked, num_returns=2)
    assert answers(asked) == {1: {"version": 5}, 2: {"version": 6}}
    for actor in actors:
        ray.kill(actor)


def test_a_beat_is_due_when_nothing_ends_and_not_before_its_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect()
    crew = Crew()
    beats = Pulse(crew, RunFolder(tmp_path), 0)
    monkeypatch.setattr(pulse, "BEAT_S", 3600.0)
    beats.due()
    assert not list(read_journal(tmp_path / "metrics.jsonl"))
    beats.count(30)
    monkeypatch.setattr(pulse, "BEAT_S", 0.0)
    beats.due()
    monkeypatch.setattr(pulse, "WINDOW_S", 1e-9)
    beats.due()
    lines = list(read_journal(tmp_path / "metrics.jsonl"))
    assert [line["stage"] for line in lines] == ["fleet", "fleet"]
    assert lines[0]["env_steps_per_s"] > 0
    assert (lines[1]["env_steps_per_s"], lines[1]["episodes_per_s"]) == (0.0, 0.0)
    crew.dismiss()
