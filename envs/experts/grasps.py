"""Where to close the fingers: candidate grasps from above, ranked by what the open hand would hit on its way down.

Distances in metres, angles in radians, world frame.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from envs.experts.places import Place
from envs.experts.scene import GRIPPER_SPAN, Obstacles, Scene, gaps

PALM_DEPTH = 0.025
"""How far above the grip site an object may reach before it meets the palm (3 cm, less a margin)."""
TIP_DEPTH = 0.011
"""How far the fingertips reach below the grip site, with a margin."""
RIM_INSET = 0.006
"""Middle of a bowl's wall, in from its outermost edge."""
RIM_DEPTH = 0.015
"""How far below the rim the pads close on a bowl's wall."""
WALL = 0.003
"""Thickness of a bowl's wall."""

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


def box_grasp(scene: Scene, item: str, place: Place) -> Grasp:
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
        for shift in _SHIFTS[np.abs(_SHIFTS) <= room]:
            x, y = block.center[:2] + along * shift
            for turn in _TURNS:
                effort = 0.05 * abs(shift) + 0.01 * (abs(turn) + abs(yaw + turn))
                rows.append((x, y, height, yaw + turn, width, effort))
    return _best(np.array(rows), scene, item, place)


def rim_grasp(scene: Scene, item: str, place: Place) -> Grasp:
    """Across the wall of a bowl, one finger inside, where the rim is highest if the bowl is tilted."""
    block = scene.block(item)
    radius = float(min(block.half[:2])) - RIM_INSET
    middle = block.center + block.axes[:, 2] * (block.half[2] - RIM_DEPTH)
    rows = []
    for angle in np.linspace(-math.pi, math.pi, 24, endpoint=False):
        outward = block.axes[:, :2] @ np.array([math.cos(angle), math.sin(angle)])
        yaw = _wrap(math.atan2(-outward[0], outward[1]))
        effort = 0.01 * abs(yaw) - radius * outward[2]
        rows.append((*(middle + radius * outward), yaw, WALL, effort))
    return _best(np.array(rows), scene, item, place)


def _best(rows: np.ndarray, scene: Scene, item: str, place: Place) -> Grasp:
    """Cheapest of `rows` [N, 6] (x, y, z, yaw, width, effort).

    A few millimetres of contact, there or over the place to which the object goes, outweigh any effort; near a grasp
    the hand stays with it.
    """
    block, obstacles = scene.block(item), scene.obstacles(ignoring=item)
    hands = rows[:, :4]
    later = hands + np.array([*(place.position - block.origin[:2]), place.clear - block.bottom, 0.0])
    way = np.linalg.norm(rows[:, :2] - scene.gripper().position[:2], axis=1)
    contact = _penetration(hands, obstacles) + _penetration(later, obstacles)
    x, y, z, yaw, width, _ = rows[int(np.argmin(rows[:, 5] + 0.3 * way + 10.0 * contact))]
    return Grasp(position=np.array([x, y, z]), yaw=float(yaw), width=float(width))


def _penetration(hands: np.ndarray, obstacles: Obstacles) -> np.ndarray:
    """How deep [N] the open hand at `hands` [N, 4] (x, y, z, yaw) would reach into the obstacles and their margins."""
    yaw = hands[:, 3]
    line = np.stack([-np.sin(yaw), np.cos(yaw)], axis=1)[:, None, None]
    across = np.stack([np.cos(yaw), np.sin(yaw)], axis=1)[:, None, None]
    parts = _PARTS[None, :, None]
    center = hands[:, None, None, :2] + line * parts[..., 0:1] + across * parts[..., 1:2]
    gap = gaps((center, line, parts[..., 2:4]), (obstacles.center, obstacles.line, obstacles.half))
    tall = obstacles.top > hands[:, 2, None, None] + parts[..., 4]
    return np.where(tall, np.maximum(0.0, _MARGIN - gap), 0.0).sum(axis=(1, 2))


def _wrap(yaw: float) -> float:
    """The same line's angle in (-pi/2, pi/2]."""
    return math.pi / 2 - (math.pi / 2 - yaw) % math.pi
