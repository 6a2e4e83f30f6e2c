"""The pulse of a sweep names the actors that answered, whichever did not."""

from __future__ import annotations

from typing import Any

import pytest
import ray

from actors.placement import connect
from actors.pulse import answers

pytestmark = pytest.mark.ray


@ray.remote(num_cpus=0)
class Serves:
    """A policy actor as the pulse sees one."""

    def __init__(self, version: int) -> None:
        self._version = version

    def serving(self) -> dict[str, Any]:
        return {"version": self._version}


def test_an_actor_that_does_not_answer_leaves_the_others_their_places() -> None:
    connect()
    actors = [Serves.remote(version) for version in (4, 5, 6)]
    asked = [actor.serving.remote() for actor in actors]
    ray.wait(asked, num_returns=3)
    ray.kill(actors[0])
    dead = actors[0].serving.remote()
    ray.wait([dead])
    assert answers([dead, *asked[1:]]) == {1: {"version": 5}, 2: {"version": 6}}
    for actor in actors[1:]:
        ray.kill(actor)
