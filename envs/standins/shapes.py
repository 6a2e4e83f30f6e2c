"""Primitive shapes and the few ways they are arranged. Lengths in millimetres, angles in degrees.

A shape is solid (a collision geom, which alone carries mass), drawn (a visual geom), or both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

Vector = tuple[float, float, float]
Quaternion = tuple[float, float, float, float]  # w, x, y, z
Colour = tuple[float, float, float]  # red, green, blue in [0, 1]

UNTURNED: Quaternion = (1.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One MuJoCo geom.

    Attributes:
        half: half sizes of a box; (radius, half length, 0) of a cylinder or capsule along its own z.
        name: geom name of the solid part, where a loader asks for it.
        opacity: 0 hides the shape even where solid shapes are drawn.
    """

    kind: Literal["box", "cylinder", "capsule"]
    centre: Vector
    half: Vector
    colour: Colour
    turn: Quaternion = UNTURNED
    solid: bool = True
    drawn: bool = True
    name: str | None = None
    opacity: float = 1.0

    @property
    def volume(self) -> float:
        """Cubic millimetres."""
        radius, length = self.half[0], 2 * self.half[1]
        match self.kind:
            case "box":
                return 8 * self.half[0] * self.half[1] * self.half[2]
            case "cylinder":
                return math.pi * radius**2 * length
            case "capsule":
                return math.pi * radius**2 * (length + 4 * radius / 3)


Shapes = tuple[Shape, ...]


def product(a: Quaternion, b: Quaternion) -> Quaternion:
    """Hamilton product: turn by `b`, then by `a`."""
    aw, ax, ay, az = a
    bw, bx, by, bz = b
    return (
        aw * bw - ax * bx - ay * by - az * bz,
        aw * bx + ax * bw + ay * bz - az * by,
        aw * by - ax * bz + ay * bw + az * bx,
        aw * bz + ax * by - ay * bx + az * bw,
    )


def about(axis: Literal["x", "y", "z"], degrees: float) -> Quaternion:
    """Right-handed turn about a coordinate axis."""
    half = math.radians(degrees) / 2
    w, s = math.cos(half), math.sin(half)
    return (w, s * (axis == "x"), s * (axis == "y"), s * (axis == "z"))


def box(
    centre: Vector,
    half: Vector,
    colour: Colour,
    turn: Quaternion = UNTURNED,
    *,
    solid: bool = True,
    drawn: bool = True,
    name: str | None = None,
) -> Shape:
    """A box by centre and half sizes."""
    return Shape(
        kind="box", centre=centre, half=half, colour=colour, turn=turn, solid=solid, drawn=drawn, name=name
    )


def block(x: tuple[float, float], y: tuple[float, float], z: tuple[float, float], colour: Colour) -> Shape:
    """An axis-aligned solid and drawn box by its limits."""
    centre = (sum(x) / 2, sum(y) / 2, sum(z) / 2)
    return box(centre, ((x[1] - x[0]) / 2, (y[1] - y[0]) / 2, (z[1] - z[0]) / 2), colour)


def panel(x: tuple[float, float], y: tuple[float, float], z: tuple[float, float], colour: Colour) -> Shape:
    """A box by its limits that is only drawn: labels, trims, lids."""
    return replace(block(x, y, z, colour), solid=False)


def disc(
    radius: float, z: tuple[float, float], colour: Colour, centre: tuple[float, float] = (0.0, 0.0)
) -> Shape:
    """A cylinder along z that is only drawn."""
    return Shape(
        kind="cylinder",
        centre=(*centre, sum(z) / 2),
        half=(radius, (z[1] - z[0]) / 2, 0.0),
        colour=colour,
        solid=False,
    )


def prism(
    radius: float,
    z: tuple[float, float],
    colour: Colour,
    centre: tuple[float, float] = (0.0, 0.0),
    *,
    boxes: int = 4,
    drawn: bool = True,
) -> Shapes:
    """A solid regular prism with 2 * `boxes` sides, drawn as the cylinder of the same radius.

    Each box spans two opposite sides; together they fill the polygon. Boxes rather than a cylinder, because
    box contacts have several points and a standing can therefore comes to rest. `radius` is the distance of
    the sides from the axis.
    """
    width = radius * math.tan(math.pi / (2 * boxes))
    height = (z[1] - z[0]) / 2
    solids = tuple(
        box((*centre, sum(z) / 2), (radius, width, height), colour, about("z", 180 * i / boxes), drawn=False)
        for i in range(boxes)
    )
    return (*solids, disc(radius, z, colour, centre)) if drawn else solids


def ring(
    radius: float,
    z: float,
    wall: tuple[float, float],
    colour: Colour,
    centre: tuple[float, float] = (0.0, 0.0),
    *,
    count: int,
    lean: float = 0.0,
    start: float = 0.0,
) -> Shapes:
    """A round wall of `count` boxes.

    Args:
        radius: distance of the box centres from the axis at `centre`.
        z: height of the box centres.
        wall: half thickness and half height (along the slope).
        lean: angle by which the wall leans outwards.
        start: direction, seen from the axis, of the first box.
    """
    thickness, height = wall
    widest = radius + height * math.sin(math.radians(abs(lean)))
    width = widest * math.tan(math.pi / count)
    shapes = []
    for i in range(count):
        angle = start + 360 * i / count
        place = (
            centre[0] + radius * math.cos(math.radians(angle)),
            centre[1] + radius * math.sin(math.radians(angle)),
            z,
        )
        turn = product(about("z", angle), about("y", lean))
        shapes.append(box(place, (thickness, width, height), colour, turn))
    return tuple(shapes)


def stand_on_y(shapes: Shapes) -> Shapes:
    """Turn shapes described with z up into a frame whose up axis is y: (x, y, z) becomes (x, z, -y)."""
    turn = about("x", -90)
    return tuple(
        replace(s, centre=(s.centre[0], s.centre[2], -s.centre[1]), turn=product(turn, s.turn))
        for s in shapes
    )
