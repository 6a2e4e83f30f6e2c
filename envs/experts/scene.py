"""What the scripted experts read from the simulator: poses, sizes and contacts that no policy is shown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

GRIPPER_SPAN = 0.0775
"""Distance between the pads of the fully opened gripper, metres (measured after settling)."""
TIP = 0.0095
"""The fingertips end this far below the grip site of an upright hand, metres."""

Rectangle = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Middle, unit vector along the first side, and half lengths along and across it; each [..., 2], metres."""


class Simulated(Protocol):
    """An environment whose simulator may be read: robosuite's `sim` and LIBERO's problem instance `domain`."""

    @property
    def sim(self) -> Any: ...

    @property
    def domain(self) -> Any: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """The box around a body's collision geometry, as the body stands now. World frame, metres."""

    origin: np.ndarray
    """float64 [3], the body's origin: what LIBERO's goal predicates look at."""
    center: np.ndarray
    """float64 [3]."""
    axes: np.ndarray
    """float64 [3, 3], column i is the direction of the box's side i."""
    half: np.ndarray
    """float64 [3], half lengths of the sides."""

    @property
    def reach(self) -> np.ndarray:
        """float64 [3], half size of the upright box around this one."""
        return np.abs(self.axes) @ self.half

    @property
    def top(self) -> float:
        return float(self.center[2] + self.reach[2])

    @property
    def bottom(self) -> float:
        return float(self.center[2] - self.reach[2])


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A moving part of a fixture: a drawer, a knob. World frame."""

    position: float
    """Of its joint, metres or radians."""
    axis: np.ndarray
    """float64 [3], the direction it slides along, or turns about, as `position` grows."""
    anchor: np.ndarray
    """float64 [3], a point that a turning part turns about."""
    geoms: tuple[Block, ...]
    """The boxes it is made of; the origin of each is its centre."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gripper:
    """The hand. World frame, metres."""

    position: np.ndarray
    """float64 [3], the grip site between the finger pads; the fingertips end 1 cm below it."""
    rotation: np.ndarray
    """float64 [3, 3]; column 2 points out of the palm, column 0 along the line the fingers move on."""
    shoulder: np.ndarray
    """float64 [3], where the arm's second joint is."""
    opening: float
    """Distance between the finger pads, 0 to 0.08."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Obstacles:
    """N upright boxes that the hand had better not meet. World frame, metres."""

    center: np.ndarray
    """float64 [N, 2]."""
    line: np.ndarray
    """float64 [N, 2], unit vector along the first side."""
    half: np.ndarray
    """float64 [N, 2], half lengths along `line` and across it."""
    top: np.ndarray
    """float64 [N], height of the upper side."""


class Scene:
    """A view of one environment. Names are resolved once, so build it anew after a hard reset."""

    def __init__(self, env: Simulated) -> None:
        self._domain = env.domain
        self._sim = env.sim
        model = self._sim.model
        gripper = self._domain.robots[0].gripper
        prefix = gripper.naming_prefix
        self._shoulder = model.body_name2id(f"{self._domain.robots[0].robot_model.naming_prefix}link1")
        self._grip_site = model.site_name2id(f"{prefix}grip_site")
        self._fingers = [
            {model.geom_name2id(name) for name in gripper.important_geoms[side]}
            for side in ("left_finger", "right_finger")
        ]
        self._finger_qpos = [model.get_joint_qpos_addr(name) for name in gripper.joints]
        self._boxes: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self._geoms: dict[str, set[int]] = {}
        self.objects: tuple[str, ...] = tuple(self._domain.objects_dict)
        self.fixtures: tuple[str, ...] = tuple(
            name for name in self._domain.fixtures_dict if name in self._domain.obj_body_id
        )
        for name in (*self.objects, *self.fixtures):
            self._measure(name, self._domain.obj_body_id[name])
        self._fixture_geoms = sorted(set().union(*(self._geoms[name] for name in self.fixtures)))

    def _measure(self, name: str, body: int) -> None:
        """Box around the collision geoms of `body` and its descendants, in the body's own frame."""
        model, data = self._sim.model, self._sim.data
        geoms = [
            g
            for g in range(model.ngeom)
            if (model.geom_contype[g] or model.geom_conaffinity[g])
            and self._is_part(model.geom_bodyid[g], body)
        ]
        self._geoms[name] = set(geoms)
        position, rotation = data.body_xpos[body], data.body_xmat[body].reshape(3, 3)
        low, high = np.full(3, np.inf), np.full(3, -np.inf)
        for g in geoms:
            frame = rotation.T @ data.geom_xmat[g].reshape(3, 3)
            center = rotation.T @ (data.geom_xpos[g] - position) + frame @ model.geom_aabb[g][:3]
            half = np.abs(frame) @ model.geom_aabb[g][3:]
            low, high = np.minimum(low, center - half), np.maximum(high, center + half)
        self._boxes[name] = ((low + high) / 2, (high - low) / 2)

    def _is_part(self, body: int, root: int) -> bool:
        while body > root:
            body = self._sim.model.body_parentid[body]
        return bool(body == root)

    def block(self, name: str) -> Block:
        """The box around object or fixture `name`. Raises KeyError for a name the scene has not got."""
        center, half = self._boxes[name]
        body = self._domain.obj_body_id[name]
        origin = np.array(self._sim.data.body_xpos[body])
        axes = np.array(self._sim.data.body_xmat[body]).reshape(3, 3)
        return Block(origin=origin, center=origin + axes @ center, axes=axes, half=half)

    def width(self, name: str, *, along: np.ndarray, low: float, high: float) -> float:
        """Extent of object `name`, metres, along the level unit vector `along` [2], between two heights."""
        parts = sorted(self._geoms[name])
        center, axes, half = self._boxes_of(parts)
        reach = np.einsum("nij,nj->ni", np.abs(axes), half)[:, 2]
        inside = (center[:, 2] - reach < high) & (center[:, 2] + reach > low)
        if not inside.any():
            return 0.0
        middle = center[inside, :2] @ along
        side = (np.abs(np.einsum("d,ndi->ni", along, axes[inside, :2])) * half[inside]).sum(axis=1)
        return float((middle + side).max() - (middle - side).min())

    def obstacles(self, *, ignoring: str) -> Obstacles:
        """One box for every object but `ignoring`, and one for every collision geom of the fixtures."""
        blocks = [self.block(name) for name in self.objects if name != ignoring]
        center, axes, half = self._boxes_of(self._fixture_geoms)
        return _upright(
            np.concatenate([[block.center for block in blocks], center]),
            np.concatenate([[block.axes for block in blocks], axes]),
            np.concatenate([[block.half for block in blocks], half]),
        )

    def _boxes_of(self, geoms: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Middles [N, 3], axes [N, 3, 3] and half sizes [N, 3] of the boxes around `geoms`."""
        axes = np.array(self._sim.data.geom_xmat[geoms]).reshape(-1, 3, 3)
        box = self._sim.model.geom_aabb[geoms]
        return self._sim.data.geom_xpos[geoms] + np.einsum("nij,nj->ni", axes, box[:, :3]), axes, box[:, 3:]

    def gripper(self) -> Gripper:
        data = self._sim.data
        left, right = (float(data.qpos[i]) for i in self._finger_qpos)
        return Gripper(
            position=np.array(data.site_xpos[self._grip_site]),
            rotation=np.array(data.site_xmat[self._grip_site]).reshape(3, 3),
            shoulder=np.array(data.body_xpos[self._shoulder]),
            opening=left - right,
        )

    def ceiling(self, start: np.ndarray, end: np.ndarray, *, ignoring: str, width: float) -> float:
        """Height of the tallest thing but `ignoring` on the straight way from `start` to `end`, each [2].

        The way is a rectangle, `width` to either side of the line and past its ends; -inf if nothing is on it.
        """
        way = end - start
        length = float(np.hypot(*way))
        line = way / length if length > 1e-6 else np.array([1.0, 0.0])
        things = self.obstacles(ignoring=ignoring)
        gap = gaps(
            ((start + end) / 2, line, np.array([length / 2 + width, width])),
            (things.center, things.line, things.half),
        )
        return float(np.max(things.top, where=gap < 0, initial=-np.inf))

    def touching(self, name: str, other: str) -> bool:
        """Whether the two objects or fixtures are in contact."""
        return bool(self._touching(self._geoms[name]) & self._geoms[other])

    def held(self, name: str) -> bool:
        """Whether both fingers touch object `name`."""
        touched = self._touching(self._geoms[name])
        return all(touched & finger for finger in self._fingers)

    def _touching(self, geoms: set[int]) -> set[int]:
        """Geoms in contact with any of `geoms`."""
        data = self._sim.data
        others = set()
        for contact in data.contact[: data.ncon]:
            if contact.geom1 in geoms:
                others.add(contact.geom2)
            if contact.geom2 in geoms:
                others.add(contact.geom1)
        return others

    def site(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Position float64 [3] and rotation float64 [3, 3] of the site `name`."""
        index = self._sim.model.site_name2id(name)
        return (
            np.array(self._sim.data.site_xpos[index]),
            np.array(self._sim.data.site_xmat[index]).reshape(3, 3),
        )

    def part(self, joint: str) -> Part:
        """The part of a fixture that moves with the one-degree joint `joint`."""
        model, data = self._sim.model, self._sim.data
        index = model.joint_name2id(joint)
        geoms = self._geoms_of_body(model.jnt_bodyid[index])
        return Part(
            position=float(data.qpos[model.jnt_qposadr[index]]),
            axis=np.array(data.xaxis[index]),
            anchor=np.array(data.xanchor[index]),
            geoms=tuple(
                Block(origin=center, center=center, axes=axes, half=half)
                for center, axes, half in zip(*self._boxes_of(geoms), strict=True)
            ),
        )

    def holds_part(self, joint: str) -> bool:
        """Whether both fingers touch the part that moves with `joint`."""
        body = self._sim.model.jnt_bodyid[self._sim.model.joint_name2id(joint)]
        touched = self._touching(set(self._geoms_of_body(body)))
        return all(touched & finger for finger in self._fingers)

    def _geoms_of_body(self, body: int) -> list[int]:
        return [g for g in self._fixture_geoms if self._sim.model.geom_bodyid[g] == body]


def _upright(center: np.ndarray, axes: np.ndarray, half: np.ndarray) -> Obstacles:
    """Boxes [N, 3], [N, 3, 3], [N, 3] as upright boxes around them that keep their heading."""
    level = np.abs(axes[:, 2, :]).argmin(axis=1)
    line = axes[np.arange(len(axes)), :2, level]
    line /= np.linalg.norm(line, axis=1, keepdims=True)
    across = np.stack([-line[:, 1], line[:, 0]], axis=1)
    extent = [np.abs(np.einsum("nd,ndi->ni", side, axes[:, :2])) for side in (line, across)]
    return Obstacles(
        center=center[:, :2],
        line=line,
        half=np.stack([(side * half).sum(axis=1) for side in extent], axis=1),
        top=center[:, 2] + (np.abs(axes[:, 2]) * half).sum(axis=1),
    )


def gaps(one: Rectangle, other: Rectangle) -> np.ndarray:
    """Distance between rectangles in the plane along the best separating axis, broadcast; negative: they overlap.

    Two rectangles are apart if they are so along a side of either.
    """
    found = []
    for _, line, _ in (one, other):
        for axis in (line, np.stack([-line[..., 1], line[..., 0]], axis=-1)):
            apart = np.abs(((one[0] - other[0]) * axis).sum(-1))
            found.append(apart - _half_along(one, axis) - _half_along(other, axis))
    return np.max(np.broadcast_arrays(*found), axis=0)


def _half_along(rectangle: Rectangle, axis: np.ndarray) -> np.ndarray:
    _, line, half = rectangle
    across = np.stack([-line[..., 1], line[..., 0]], axis=-1)
    return np.abs((line * axis).sum(-1)) * half[..., 0] + np.abs((across * axis).sum(-1)) * half[..., 1]
