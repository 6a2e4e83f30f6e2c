"""Scripted experts: they read the simulator's state and act as a policy would, to demonstrate and to recover."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Protocol

import numpy as np

from envs.experts.articulated import OpenDrawer, TurnKnob
from envs.experts.grasps import box_grasp, rim_grasp
from envs.experts.pick_place import PickPlace
from envs.experts.places import in_basket, on_object, on_site
from envs.experts.scene import Simulated
from envs.libero import LiberoEnv

EXPERT_TASKS: dict[str, tuple[int, ...]] = {
    "libero_object": tuple(range(10)),
    "libero_spatial": tuple(range(10)),
    "libero_goal": (0, 1, 2, 4, 6, 7, 8, 9),
}
"""Tasks that have an expert, by suite."""


class NoExpertError(ValueError):
    """A task that no scripted expert is for."""


class Expert(Protocol):
    """Scripted, memoryless: the action is a function of the simulator's state alone."""

    def reset(self, env: Simulated) -> None:
        """Look the scene up. Call after every reset of `env`."""
        ...

    def act(self, env: Simulated) -> np.ndarray:
        """The next action, float32 [7], each in [-1, 1]."""
        ...


def require_experts(suite: str, task_ids: Iterable[int]) -> None:
    """Raise NoExpertError naming the first task without an expert, and the tasks with one."""
    for task_id in task_ids:
        if task_id not in EXPERT_TASKS.get(suite, ()):
            known = "; ".join(f"{suite} {', '.join(map(str, ids))}" for suite, ids in EXPERT_TASKS.items())
            raise NoExpertError(f"no scripted expert for {suite} task {task_id}; tasks with one: {known}")


def expert_for(env: LiberoEnv) -> Expert:
    """The expert of the environment's task. Raises NoExpertError when it has none."""
    require_experts(env.task.suite, [env.task.task_id])
    return _make(env)


def _make(env: LiberoEnv) -> Expert:
    (goal,) = env.domain.parsed_problem["goal_state"]
    if goal[0] == "open":
        (joint,) = env.domain.object_sites_dict[goal[1]].joints
        return OpenDrawer(joint)
    if goal[0] == "turnon":
        (joint,) = env.domain.get_object(goal[1]).joints
        return TurnKnob(joint)
    predicate, item, target = goal
    grasp = rim_grasp if "bowl" in item else box_grasp
    if predicate == "in":
        return PickPlace(
            item, grasp=grasp, place=partial(in_basket, basket=target.removesuffix("_contain_region"))
        )
    if target in env.domain.object_sites_dict:
        support = env.domain.object_sites_dict[target].parent_name
        return PickPlace(item, grasp=grasp, place=partial(on_site, site=target, support=support))
    return PickPlace(item, grasp=grasp, place=partial(on_object, support=target))
