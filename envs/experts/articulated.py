"""Pull a drawer open by its handle, and turn a knob."""

from __future__ import annotations

import math

import numpy as np
from scipy.spatial.transform import Rotation

from envs.experts.grasps import Grasp
from envs.experts.pick_place import reach
from envs.experts.scene import GRIPPER_SPAN, Block, Part, Scene, Simulated
from envs.experts.servo import CLOSE, OPEN, move, nearest_yaw, palm_down

STANDOFF = 0.09
"""How far in front of a handle the hand lines up, metres."""
DIP = 0.2
"""How far the palm points below the level when it takes a handle, radians: the hand is then clear of the table."""
TRAVEL = 0.16
"""A drawer's way, metres."""
PUSH = 0.055
"""How far ahead of a turning knob its hand is sent, metres: the knob is stiff."""


class OpenDrawer:
    """Pulls the drawer that slides on `joint`. LIBERO's drawers open as their joint's position falls."""

    def __init__(self, joint: str) -> None:
        self._joint = joint

    def reset(self, env: Simulated) -> None:
        """Look the scene up; call after every reset of `env`."""
        self._scene = Scene(env)

    def act(self, env: Simulated) -> np.ndarray:
        """The next action, float32 [7]."""
        part, gripper = self._scene.part(self._joint), self._scene.gripper()
        outwards = -part.axis
        bar = handle(part)
        rotation = facing(outwards)
        offset = bar.center - gripper.position
        if self._scene.holds_part(self._joint) and np.linalg.norm(offset) < 0.03:
            pull = outwards * max(0.02, 0.3 * (TRAVEL + part.position) + 0.03)
            return move(gripper, pull, rotation=rotation, grip=CLOSE)
        turn = float(np.linalg.norm(Rotation.from_matrix(rotation @ gripper.rotation.T).as_rotvec()))
        beside = offset - (offset @ outwards) * outwards
        misaligned = float(np.linalg.norm(beside)) + 0.08 * turn
        if misaligned < 0.02 and abs(offset @ outwards) < 0.012:
            return move(gripper, offset, rotation=rotation, grip=CLOSE)
        offset = offset + outwards * min(STANDOFF, 4.0 * max(0.0, misaligned - 0.012))
        return move(gripper, offset, rotation=rotation, grip=OPEN)


class TurnKnob:
    """Turns the knob on `joint` towards larger angles, by the end of its bar."""

    def __init__(self, joint: str) -> None:
        self._joint = joint

    def reset(self, env: Simulated) -> None:
        """Look the scene up; call after every reset of `env`."""
        self._scene = Scene(env)

    def act(self, env: Simulated) -> np.ndarray:
        """The next action, float32 [7]."""
        part, gripper = self._scene.part(self._joint), self._scene.gripper()
        grasp = _knob_grasp(part)
        near = np.linalg.norm(grasp.position - gripper.position) < 0.03
        if near and 0.8 * grasp.width < gripper.opening < 0.8 * GRIPPER_SPAN:
            onwards = np.cross(part.axis, grasp.position - part.anchor)
            push = grasp.position - gripper.position + PUSH * onwards / np.linalg.norm(onwards)
            yaw = nearest_yaw(gripper, grasp.yaw)
            return move(gripper, push, rotation=palm_down(gripper, yaw, grasp.position), grip=CLOSE)
        return reach(self._scene, gripper, grasp, ignoring="")


def handle(part: Part) -> Block:
    """A drawer's handle: the box that stands out furthest."""
    return max(
        part.geoms,
        key=lambda geom: float(geom.center @ -part.axis + np.abs(geom.axes.T @ part.axis) @ geom.half),
    )


def facing(outwards: np.ndarray) -> np.ndarray:
    """Rotation [3, 3] of a palm against the level direction `outwards`, a little downwards, fingers one above the
    other."""
    palm = -math.cos(DIP) * outwards - math.sin(DIP) * np.array([0.0, 0.0, 1.0])
    line = math.sin(DIP) * outwards - math.cos(DIP) * np.array([0.0, 0.0, 1.0])
    return np.stack([line, np.cross(palm, line), palm], axis=1)


def _knob_grasp(part: Part) -> Grasp:
    """Across the knob's bar (its tallest box), near the end that is further from the pivot: the longer lever."""
    bar = max(part.geoms, key=lambda geom: geom.top)
    level = sorted(range(3), key=lambda i: abs(bar.axes[2, i]))[:2]
    across, along = sorted(level, key=lambda i: bar.half[i])
    side = math.copysign(1.0, float((bar.center - part.anchor) @ bar.axes[:, along]))
    point = bar.center + side * (bar.half[along] - 0.012) * bar.axes[:, along]
    line = bar.axes[:2, across]
    return Grasp(
        position=np.array([*point[:2], bar.top - 0.018]),
        yaw=math.atan2(-line[0], line[1]),
        width=2 * float(bar.half[across]),
    )
