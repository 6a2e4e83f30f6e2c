"""Pick an object up from above and put it in or on something.

Every choice is a function of the state the simulator is in now (where the gripper, the object and its goal are,
how far the fingers are open, what they touch): no clock and no memory. So the expert recovers from whatever
happens to it, and a policy that sees the scene has what it needs to imitate it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from envs.experts.grasps import Grasp
from envs.experts.places import Place
from envs.experts.scene import GRIPPER_SPAN, Block, Gripper, Scene, Simulated
from envs.experts.servo import CLOSE, OPEN, heading, move, nearest_yaw, palm_down, turn_left

HOVER = 0.08
"""Height above the grasp from which the open hand goes straight down, metres."""


class PickPlace:
    """Moves the object `item`: `grasp` and `place` say, from the scene as it is, where to take it and where to let it
    go."""

    def __init__(
        self, item: str, *, grasp: Callable[[Scene, str, Place], Grasp], place: Callable[[Scene, str], Place]
    ) -> None:
        self._item = item
        self._grasp = grasp
        self._place = place

    def reset(self, env: Simulated) -> None:
        """Look the scene up; call after every reset of `env`."""
        self._scene = Scene(env)

    def act(self, env: Simulated) -> np.ndarray:
        """The next action, float32 [7]."""
        scene = self._scene
        gripper, block, place = scene.gripper(), scene.block(self._item), self._place(scene, self._item)
        if scene.held(self._item):
            return _carry(scene, self._item, gripper, block, place)
        if math.dist(block.origin[:2], place.position) < place.tolerance + 0.005:
            rotation = palm_down(gripper, heading(gripper), gripper.position)
            return move(gripper, np.zeros(3), rotation=rotation, grip=OPEN)
        return reach(scene, gripper, self._grasp(scene, self._item, place), ignoring=self._item)


def reach(scene: Scene, gripper: Gripper, grasp: Grasp, *, ignoring: str) -> np.ndarray:
    """Towards the grasp: over it first, then down, then close; over all but `ignoring` that is in the way."""
    yaw = nearest_yaw(gripper, grasp.yaw)
    rotation = palm_down(gripper, yaw, grasp.position)
    offset = grasp.position - gripper.position
    misaligned = math.hypot(*offset[:2]) + 0.05 * abs(turn_left(gripper, yaw))
    missed = gripper.opening < 0.7 * grasp.width
    if misaligned < 0.012 and abs(offset[2]) < 0.012 and not missed:
        return move(gripper, offset, rotation=rotation, grip=CLOSE)
    open_enough = gripper.opening > min(grasp.width + 0.015, 0.95 * GRIPPER_SPAN)
    ceiling = scene.ceiling(gripper.position[:2], grasp.position[:2], ignoring=ignoring, width=0.07)
    hover = max(HOVER, ceiling + 0.025 - grasp.position[2])
    offset[2] += min(hover, 4.0 * max(0.0, misaligned - 0.006)) if open_enough else HOVER
    freedom = _freedom(offset[2])
    rotation = palm_down(gripper, nearest_yaw(gripper, yaw, share=freedom), grasp.position)
    return move(gripper, offset * [freedom, freedom, 1.0], rotation=rotation, grip=OPEN)


def _carry(scene: Scene, item: str, gripper: Gripper, block: Block, place: Place) -> np.ndarray:
    """With the object between the fingers: up, across, down, and let go."""
    offset = np.array([*(place.position - block.origin[:2]), 0.0])
    distance = math.hypot(*offset[:2])
    ceiling = scene.ceiling(
        block.center[:2], place.position, ignoring=item, width=float(block.reach[:2].max())
    )
    height = min(
        max(place.clear, ceiling + 0.02), place.release + 2.0 * max(0.0, distance - 0.5 * place.tolerance)
    )
    goal = np.array([*offset[:2], place.release - block.bottom])
    offset[2] = height - block.bottom
    down = block.bottom < place.release + 0.008 or scene.touching(item, place.support)
    arrived = distance < place.tolerance and down
    freedom = _freedom(offset[2])
    rotation = palm_down(gripper, heading(gripper), gripper.position + goal)
    return move(gripper, offset * [freedom, freedom, 1.0], rotation=rotation, grip=OPEN if arrived else CLOSE)


def _freedom(rise: float) -> float:
    """How far sideways motion and turning are allowed, 0 to 1, with `rise` metres still to go up: first up."""
    return float(np.clip((0.04 - rise) / 0.03, 0.0, 1.0))
