"""What a model is made of, and its MuJoCo XML. Lengths in millimetres here, metres in the XML."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from dataclasses import dataclass
from typing import Literal

from envs.standins.shapes import UNTURNED, Quaternion, Shape, Shapes, Vector

Family = Literal["articulated_objects", "stable_hope_objects", "stable_scanned_objects", "turbosquid_objects"]

# Contact settings of a body's solid shapes. "firm" is that of nearly all LIBERO models; "default" leaves
# MuJoCo's own; "oneway" touches movable objects and the robot but no other fixture part.
CONTACT: dict[str, dict[str, str]] = {
    "firm": {"friction": "0.95 0.3 0.1", "solref": "0.001 1", "solimp": "0.998 0.998 0.001"},
    "default": {},
    "oneway": {
        "contype": "0",
        "conaffinity": "1",
        "margin": "0.001",
        "solref": "0.02 1",
        "solimp": "0.8 0.9 0.01",
    },
}


@dataclass(frozen=True, kw_only=True)
class Site:
    """A region that goal predicates measure against; invisible unless `colour` is given."""

    name: str
    centre: Vector
    half: Vector
    turn: Quaternion = UNTURNED
    kind: Literal["box", "cylinder"] = "box"
    colour: tuple[float, float, float, float] = (0.8, 0.8, 0.8, 0.0)


@dataclass(frozen=True, kw_only=True)
class Joint:
    """One degree of freedom; range in metres (slide) or radians (hinge), damping in SI units."""

    name: str
    kind: Literal["slide", "hinge"]
    axis: Vector
    range: tuple[float, float]
    damping: float


@dataclass(frozen=True, kw_only=True)
class Body:
    """A rigid part.

    Attributes:
        mass: grams, spread over the solid shapes by volume; none: 100 kg/m3.
        inertial: kilograms (and kg m2 about each axis) that override what the shapes give.
    """

    name: str
    shapes: Shapes = ()
    sites: tuple[Site, ...] = ()
    parts: tuple[Body, ...] = ()
    joint: Joint | None = None
    centre: Vector = (0.0, 0.0, 0.0)
    turn: Quaternion = UNTURNED
    mass: float | None = None
    inertial: float | None = None
    contact: Literal["firm", "default", "oneway"] = "firm"


@dataclass(frozen=True, kw_only=True)
class Model:
    """One object or fixture.

    Attributes:
        span: z of the bottom and top sites and the radius that LIBERO's placement sampler reads, millimetres.
            Not the true size: the sampler draws from numpy's random state until a place is free, so the same
            numbers give the same fixture poses as the published models.
    """

    name: str
    family: Family
    body: Body
    span: Vector = (-60.0, 40.0, 25.0)

    @property
    def path(self) -> str:
        """Where LIBERO looks for the model, relative to the pack."""
        if self.family == "articulated_objects":
            return f"{self.family}/{self.name}.xml"
        return f"{self.family}/{self.name}/{self.name}.xml"


def numbers(values: tuple[float, ...], scale: float = 1.0) -> str:
    """Space-separated, in one fixed format, so that a pack is the same on every machine."""
    return " ".join(f"{round(v * scale, 6) + 0.0:.6g}" for v in values)


def model_document(model: Model) -> ET.Element:
    """The model's XML tree in the layout LIBERO's loader expects."""
    root = ET.Element("mujoco", model=model.name)
    ET.SubElement(root, "compiler", angle="radian")
    ET.SubElement(root, "asset")
    outer = ET.SubElement(ET.SubElement(root, "worldbody"), "body")
    add_body(outer, model.body)
    bottom, top, radius = model.span
    for name, place in (
        ("bottom_site", (0.0, 0.0, bottom)),
        ("top_site", (0.0, 0.0, top)),
        ("horizontal_radius_site", (radius, radius, 0.0)),
    ):
        ET.SubElement(outer, "site", name=name, pos=numbers(place, 1e-3), size="0.005", rgba="0 0 0 0")
    return root


def add_body(parent: ET.Element, body: Body) -> None:
    """Append a body and everything in it."""
    element = ET.SubElement(parent, "body", name=body.name, pos=numbers(body.centre, 1e-3))
    if body.turn != UNTURNED:
        element.set("quat", numbers(body.turn))
    if body.inertial is not None:
        ET.SubElement(element, "inertial", pos="0 0 0", mass=numbers((body.inertial,)), diaginertia="1 1 1")
    if body.joint is not None:
        joint = body.joint
        ET.SubElement(
            element,
            "joint",
            name=joint.name,
            type=joint.kind,
            axis=numbers(joint.axis),
            range=numbers(joint.range),
            limited="true",
            damping=numbers((joint.damping,)),
        )
    for site in body.sites:
        add_site(element, site)
    solids = [shape for shape in body.shapes if shape.solid]
    volume = sum(shape.volume for shape in solids) * 1e-9
    density = 100.0 if body.mass is None or not volume else body.mass * 1e-3 / volume
    for shape in solids:
        add_solid(element, shape, density, CONTACT[body.contact])
    for shape in body.shapes:
        if shape.drawn:
            add_drawn(element, shape)
    for part in body.parts:
        add_body(element, part)


def add_site(parent: ET.Element, site: Site) -> None:
    """Append a region; the loader reads type, size, pos and quat, so all are given."""
    size = site.half if site.kind == "box" else site.half[:2]
    ET.SubElement(
        parent,
        "site",
        name=site.name,
        type=site.kind,
        pos=numbers(site.centre, 1e-3),
        quat=numbers(site.turn),
        size=numbers(size, 1e-3),
        rgba=numbers(site.colour),
        group="0",
    )


def add_solid(parent: ET.Element, shape: Shape, density: float, contact: dict[str, str]) -> None:
    """Append a collision geom (group 0: LIBERO's only source of mass)."""
    geom = _geom(parent, shape, "0")
    geom.set("density", numbers((density,)))
    if shape.name is not None:
        geom.set("name", shape.name)
    for key, value in contact.items():
        geom.set(key, value)


def add_drawn(parent: ET.Element, shape: Shape) -> None:
    """Append a visual geom (group 1), which touches nothing."""
    geom = _geom(parent, shape, "1")
    geom.set("contype", "0")
    geom.set("conaffinity", "0")


def _geom(parent: ET.Element, shape: Shape, group: str) -> ET.Element:
    size = shape.half if shape.kind == "box" else shape.half[:2]
    geom = ET.SubElement(
        parent,
        "geom",
        type=shape.kind,
        pos=numbers(shape.centre, 1e-3),
        size=numbers(size, 1e-3),
        group=group,
        rgba=numbers((*shape.colour, shape.opacity)),
    )
    if shape.turn != UNTURNED:
        geom.set("quat", numbers(shape.turn))
    return geom
