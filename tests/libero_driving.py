"""What the tests of the LIBERO environment share: building one, driving it, and comparing what it holds."""

from __future__ import annotations

from typing import Any

import mujoco
import numpy as np

from configs.world import EnvironmentPart
from envs.assets import resolve_assets
from envs.libero import LiberoEnv

SIDE = 48
SETTLE = 10
OBJECT_TASK = ("libero_object", 0)
GOAL_TASK = ("libero_goal", 7)


def make(suite: str, task_id: int, **environment: Any) -> LiberoEnv:
    settings = {"image_size": SIDE, "settle_steps": SETTLE} | environment
    return LiberoEnv(
        suite=suite, task_id=task_id, environment=EnvironmentPart(**settings), assets=resolve_assets(None)
    )


def full_state(env: LiberoEnv) -> np.ndarray:
    """Everything that decides the simulator's future: positions, velocities, controls, solver warm start."""
    model, data = env.sim.model._model, env.sim.data._data
    kind = mujoco.mjtState.mjSTATE_INTEGRATION
    state = np.empty(mujoco.mj_stateSize(model, kind))
    mujoco.mj_getState(model, data, state, kind)
    return state


def same(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> bool:
    return first.keys() == second.keys() and all((first[key] == second[key]).all() for key in first)


def random_actions(seed: int, count: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (count, 7))


def grasp_actions(env: LiberoEnv, thing: str) -> np.ndarray:
    """Drive the gripper over `thing`, down, closed and up by proportional control; returns what was executed."""
    body = env.domain.obj_body_id[thing]
    site = env.domain.robots[0].eef_site_id
    executed = []
    for height, grip, steps in ((0.12, -1, 25), (0.0, -1, 25), (0.0, 1, 10), (0.25, 1, 20)):
        target = env.sim.data.body_xpos[body] + [0, 0, height]
        for _ in range(steps):
            action = np.zeros(7)
            action[:3] = np.clip((target - env.sim.data.site_xpos[site]) / 0.05, -1, 1)
            action[6] = grip
            env.advance(action[None])
            executed.append(action)
    return np.array(executed)
