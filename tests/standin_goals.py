"""Put the scene of a task into its goal state, by hand."""

from __future__ import annotations

import mujoco
import numpy as np

from envs.libero import LiberoEnv

JOINT_GOALS = {"open": -0.15, "close": 0.005, "turnon": 1.0}  # metres of a drawer, radians of a knob
CLEARANCE = 0.002  # metres
SOLID_GROUP = np.array([1, 0, 0, 0, 0, 0], dtype=np.uint8)


def below_origin(env: LiberoEnv, name: str) -> float:
    """How far an object's lowest solid point lies below its origin as it stands now, metres."""
    model, data = env.sim.model._model, env.sim.data._data
    body = env.domain.obj_body_id[name]
    lowest = [
        data.geom_xpos[i][2] - (np.abs(data.geom_xmat[i].reshape(3, 3)) @ model.geom_size[i])[2]
        for i in range(model.ngeom)
        if model.geom_bodyid[i] == body and model.geom_group[i] == 0
    ]
    return float(data.xpos[body][2] - min(lowest))


def surface_below(env: LiberoEnv, start: np.ndarray) -> float:
    """Height of the first solid thing under a point, metres."""
    hit = np.zeros(1, dtype=np.int32)
    down = np.array([0.0, 0.0, -1.0])
    model, data = env.sim.model._model, env.sim.data._data
    distance = mujoco.mj_ray(model, data, start, down, SOLID_GROUP, 1, -1, hit)
    return float(start[2] - max(distance, 0.0))


def put(env: LiberoEnv, name: str, place: np.ndarray, turn: np.ndarray | None = None) -> None:
    """Move a free object, keeping its orientation unless one is given."""
    address = env.sim.model.get_joint_qpos_addr(env.domain.objects_dict[name].joints[-1])[0]
    env.sim.data.qpos[address : address + 3] = place
    if turn is not None:
        env.sim.data.qpos[address + 3 : address + 7] = turn
    env.sim.data.qvel[:] = 0
    env.sim.forward()


def put_onto(env: LiberoEnv, name: str, target: str, beside: float) -> None:
    """Set an object down on another one or on a region, `beside` metres along x from its middle."""
    if target in env.domain.object_sites_dict:
        middle = env.sim.data.get_site_xpos(target).copy()
    else:
        middle = env.sim.data.body_xpos[env.domain.obj_body_id[target]].copy()
    middle[0] += beside
    top = surface_below(env, middle + np.array([0.0, 0.0, 0.25]))
    put(env, name, np.array([*middle[:2], top + below_origin(env, name) + CLEARANCE]))


def put_into(env: LiberoEnv, name: str, site: str, beside: float) -> None:
    """Stand an object on the bottom of a region, `beside` metres along x from its middle."""
    middle = env.sim.data.get_site_xpos(site).copy()
    bottom = surface_below(env, middle)
    put(
        env,
        name,
        np.array([middle[0] + beside, middle[1], bottom + below_origin(env, name) + CLEARANCE]),
    )


def lay_on_rack(env: LiberoEnv, name: str, site: str) -> None:
    """Lay the bottle along the rack's upper shelf, its side on the slope and against the lip.

    The region's frame is the shelf's: x along the lip, z uphill, y into the shelf.
    """
    frame = env.sim.data.get_site_xmat(site)
    along, into, uphill = frame.T
    turn = np.zeros(4)
    mujoco.mju_mat2Quat(turn, np.column_stack((into, np.cross(along, into), along)).ravel())
    middle = env.sim.data.get_site_xpos(site)
    put(env, name, middle - 0.08 * along + 0.032 * uphill - 0.018 * into, turn)


def hold_in_caddy(env: LiberoEnv, name: str, site: str) -> None:
    """Hold the book upright in the compartment, 30 mm above its floor, square to the caddy.

    LIBERO's region starts above where a book's origin is when it stands on the floor.
    """
    frame = env.sim.data.get_site_xmat(site)
    turn = np.zeros(4)
    mujoco.mju_mat2Quat(turn, (frame @ np.diag([-1.0, 1.0, -1.0])).ravel())
    middle = env.sim.data.get_site_xpos(site)
    bottom = surface_below(env, middle.copy())
    put(env, name, np.array([middle[0], middle[1], bottom + 0.03]), turn)


def fulfil(env: LiberoEnv, goals: list[list[str]]) -> None:
    """Arrange the scene so that every goal holds."""
    targets = [goal[2] for goal in goals if len(goal) == 3]
    for i, goal in enumerate(goals):
        match goal:
            case ["on", name, "wine_rack_1_top_region" as site]:
                lay_on_rack(env, name, site)
            case ["in", "black_book_1" as name, site]:
                hold_in_caddy(env, name, site)
            case ["on" | "in" as relation, name, target]:
                shared = targets.count(target) > 1
                beside = 0.034 * (1 if i % 2 else -1) if shared else 0.0
                (put_onto if relation == "on" else put_into)(env, name, target, beside)
            case [("open" | "close" | "turnon") as verb, name]:
                value = 0.0 if name.startswith("microwave") else JOINT_GOALS[verb]
                env.domain.object_states_dict[name].set_joint(value)
                env.sim.forward()
