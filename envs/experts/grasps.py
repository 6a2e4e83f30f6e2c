"""Where to close the fingers: candidate grasps from above, ranked by what the open hand would hit on its way down.

Distances in metres, angles in radians, world frame.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from envs.experts.scene import GRIPPER_SPAN, Obstacles, Scene, gaps

PALM_DEPTH = 0.025
"""How far above the grip site an object may reach before it meets the palm (3 cm, less a margin)."""
TIP_DEPTH = 0.011
"""How far the fingertips reach below the grip site, with a margin."""
RIM_INSET = 0.006
"""Middle of a bowl's wall, in from its outermost edge."""
RIM_DEPTH = 0.015
"""How far below the rim the pads close on a bowl's wall."""

_PARTS = np.array(
    [
        # along the fingers' line, across it, half along, half across, underside above the grip site
        [0.053, 0.0, 0.014, 0.014, -0.0095],
        [-0.053, 0.0, 0.014, 0.014, -0.0095],
        [0.0, 0.005, 0.104, 0.032, 0.0300],
    ]
)
"""The open fingers and the hand above them, as upright boxes."""
_MARGIN = 0.01
_TURNS = np.array([0.0, -0.25, 0.25, -0.5, 0.5])
_SHIFTS = np.array([0.0, -0.01, 0.01, -0.02, 0.02])


@dataclass(frozen=True, kw_only=True, slots=True)
class Grasp:
    """Where to close the fingers."""

    position: np.ndarray
    """float64 [3], of the grip site."""
    yaw: float
    """Of the line the fingers move on, from the world's y axis."""
    width: float
    """What is between the fingers then."""


def box_grasp(scene: Scene, item: str) -> Grasp:
    """Across a horizontal side of a box that fits between the fingers, preferably the narrow one, turned or moved
    along the box where a neighbour is in the way."""
    block = scene.block(item)
    upright = int(np.argmax(np.abs(block.axes[2])))
    sides = [i for i in range(3) if i != upright]
    narrow = min(sides, key=lambda i: block.half[i])
    height = max(block.bottom + TIP_DEPTH, block.top - PALM_DEPTH)
    rows = []
    for side in sides:
        line = block.axes[:2, side]
        width = scene.width(item, along=line, low=height - 0.005, high=height + 0.012)
        if side != narrow and width > 0.9 * GRIPPER_SPAN:
            continue
        along = block.axes[:2, sum(sides) - side]
        room = max(0.0, block.half[sum(sides) - side] - 0.012)
        yaw = _wrap(math.atan2(-line[0], line[1]))
        rows += [
            (
                *(block.center[:2] + along * shift),
                yaw + turn,
                width,
                5 * abs(shift) + abs(turn) + abs(yaw + turn),
            )
            for shift in _SHIFTS[np.abs(_SHIFTS) <= room]
            for turn in _TURNS
        ]
    return _best(np.array(rows), height, scene.obstacles(ignoring=item))


def rim_grasp(scene: Scene, item: str) -> Grasp:
    """Across the rim of a bowl standing upright, one finger inside: its outermost wall."""
    block = scene.block(item)
    radius = float(min(block.half[:2])) - RIM_INSET
    rows = []
    for angle in np.linspace(-math.pi, math.pi, 24, endpoint=False):
        outward = np.array([-math.sin(angle), math.cos(angle)])
        yaw = _wrap(angle)
        rows.append((*(block.center[:2] + radius * outward), yaw, 0.003, abs(yaw)))
    return _best(np.array(rows), block.top - RIM_DEPTH, scene.obstacles(ignoring=item))


def _best(rows: np.ndarray, height: float, obstacles: Obstacles) -> Grasp:
    """Cheapest of `rows` [N, 5] (x, y, yaw, width, effort); a centimetre of contact outweighs any effort."""
    cost = 0.01 * rows[:, 4] + 10.0 * _penetration(rows[:, :3], height, obstacles)
    x, y, yaw, width, _ = rows[int(np.argmin(cost))]
    return Grasp(position=np.array([x, y, height]), yaw=float(yaw), width=float(width))


def _penetration(poses: np.ndarray, height: float, obstacles: Obstacles) -> np.ndarray:
    """How deep [N] the hand at `poses` [N, 3] (x, y, yaw) would reach into the obstacles and their margins."""
    line = np.stack([-np.sin(poses[:, 2]), np.cos(poses[:, 2])], axis=1)[:, None, None]
    across = np.stack([np.cos(poses[:, 2]), np.sin(poses[:, 2])], axis=1)[:, None, None]
    parts = _PARTS[None, :, None]
    center = poses[:, None, None, :2] + line * parts[..., 0:1] + across * parts[..., 1:2]
    gap = gaps((center, line, parts[..., 2:4]), (obstacles.center, obstacles.line, obstacles.half))
    tall = obstacles.top > height + parts[..., 4]
    return np.where(tall, np.maximum(0.0, _MARGIN - gap), 0.0).sum(axis=(1, 2))


def _wrap(yaw: float) -> float:
    """The same line's angle in (-pi/2, pi/2]."""
    return math.pi / 2 - (math.pi / 2 - yaw) % math.pi
