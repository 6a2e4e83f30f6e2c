"""Fixtures with a joint: the two cabinets, the stove and the microwave."""

from __future__ import annotations

from dataclasses import replace

from envs.standins.models import Body, Joint, Model, Site
from envs.standins.shapes import Colour, Shape, Shapes, about, block, box, disc, panel, prism, ring

WALNUT: Colour = (0.24, 0.18, 0.15)
WALNUT_FRONT: Colour = (0.31, 0.23, 0.19)
IVORY: Colour = (0.88, 0.88, 0.87)
IVORY_FRONT: Colour = (0.95, 0.95, 0.94)
STEEL: Colour = (0.62, 0.63, 0.65)
ENAMEL: Colour = (0.50, 0.51, 0.53)
SOOT: Colour = (0.10, 0.10, 0.10)
COIL: Colour = (0.20, 0.19, 0.19)
SHELL: Colour = (0.22, 0.22, 0.24)
GLASS: Colour = (0.42, 0.46, 0.48)

SPAN = (-45.0, 45.0, 45.0)


def appliances() -> tuple[Model, ...]:
    """Every articulated fixture that the tasks use."""
    return (
        _cabinet("wooden_cabinet", WALNUT, WALNUT_FRONT),
        _cabinet("white_cabinet", IVORY, IVORY_FRONT),
        _flat_stove(),
        _microwave(),
    )


def _cabinet(name: str, wood: Colour, front: Colour) -> Model:
    """Three drawers, 160 mm of travel each, that open towards -y.

    The drawers touch the case in physics (it does not move, so MuJoCo does not exempt them): every gap below
    is at least half a millimetre.
    """
    case: Shapes = (
        block((-117.4, -107.0), (-79.0, 111.6), (8.5, 220.1), wood),
        block((113.8, 124.2), (-79.0, 111.6), (8.5, 220.1), wood),
        block((-117.0, 121.2), (107.2, 111.6), (8.5, 220.1), wood),
        block((-118.9, 126.9), (-73.4, 106.1), (4.7, 10.3), wood),
        block((-108.0, 115.6), (-70.9, 108.2), (78.2, 80.3), wood),
        block((-108.0, 115.6), (-70.9, 108.2), (148.3, 150.4), wood),
        block((-123.3, 131.2), (-78.3, 109.9), (220.2, 223.0), wood),
    )
    top_side = Site(name="top_side", centre=(3.54, 15.67, 221.52), half=(125.34, 94.38, 1.47))
    drawers = (
        _drawer("top", 155.1, 183.9, 185.63, wood, front),
        _drawer("middle", 85.4, 110.4, 116.9, wood, front),
        _drawer("bottom", 16.8, 41.1, 47.01, wood, front),
    )
    base = Body(name="base", shapes=case, sites=(top_side,), parts=drawers)
    return Model(
        name=name,
        family="articulated_objects",
        body=Body(name="object", parts=(base,)),
        span=SPAN,
    )


def _drawer(level: str, floor: float, handle: float, middle: float, wood: Colour, front: Colour) -> Body:
    """One drawer.

    Args:
        floor: height of the middle of its floor.
        handle: height of its handle.
        middle: height of the middle of its region.
    """
    inside = (floor - 3.0, floor + 60.5)
    shapes: Shapes = (
        block((-106.0, 112.6), (-78.0, -72.4), (floor - 6.2, floor + 62.3), front),
        block((-103.4, 110.1), (-72.4, -64.9), inside, wood),
        block((-103.4, 110.1), (87.2, 94.3), inside, wood),
        block((-104.5, -99.2), (-70.4, 92.5), inside, wood),
        block((106.2, 111.6), (-70.4, 92.5), inside, wood),
        block((-103.4, 110.4), (-70.4, 91.4), (floor - 4.0, floor + 4.0), wood),
        block((-47.2, 41.6), (-109.3, -94.0), (handle - 8.2, handle + 8.2), STEEL),
        block((24.1, 34.2), (-94.0, -73.0), (handle - 5.5, handle + 5.5), STEEL),
        block((-40.6, -30.6), (-94.0, -73.0), (handle - 5.5, handle + 5.5), STEEL),
    )
    region = Site(
        name=f"{level}_region",
        centre=(3.28, 11.28, middle),
        half=(29.93, 75.61, 102.24),
        turn=about("y", 90),
    )
    slide = Joint(
        name=f"{level}_level", kind="slide", axis=(0.0, 1.0, 0.0), range=(-0.16, 0.01), damping=50.0
    )
    return Body(name=f"cabinet_{level}", shapes=shapes, sites=(region,), joint=slide, inertial=3.0)


def _flat_stove() -> Model:
    """A square burner and, beside it, a knob that turns it on; LIBERO shows the site `burner` when it is on."""
    plate = replace(block((-95.0, 95.0), (-95.0, 95.0), (20.0, 25.5), COIL), drawn=False, opacity=0.0)
    coil = tuple(replace(shape, solid=False) for shape in ring(68.0, 22.5, (4.5, 2.5), COIL, count=16))
    burner = Body(
        name="burner",
        shapes=(
            block((-95.0, 95.0), (-95.0, 95.0), (-20.0, 20.0), ENAMEL),
            plate,
            disc(72.0, (20.0, 21.0), SOOT),
            *coil,
        ),
        sites=(
            Site(name="cook_region", centre=(0.0, 0.0, 0.0), half=(75.0, 75.0, 2.5)),
            Site(
                name="burner",
                centre=(0.0, 0.0, 22.0),
                half=(62.5, 0.5, 5.0),
                kind="cylinder",
                colour=(0.9, 0.05, 0.05, 1.0),
            ),
        ),
        centre=(150.0, 0.0, 0.0),
        contact="default",
    )
    button = Body(
        name="button",
        shapes=(
            *prism(46.0, (0.4, 12.8), SOOT, (1.4, 4.4)),
            block((-10.9, 13.6), (-17.2, 52.0), (1.4, 50.0), SOOT),
            block((-10.9, 13.4), (-32.6, -17.2), (7.6, 43.5), SOOT),
            block((-10.9, 13.3), (-40.6, -32.6), (0.6, 33.8), SOOT),
            panel((-2.0, 4.0), (20.0, 52.2), (49.0, 50.4), STEEL),
        ),
        joint=Joint(name="button", kind="hinge", axis=(0.0, 0.0, 1.0), range=(-0.005, 2.1), damping=1.0),
        turn=about("z", 90),
        inertial=3.0,
    )
    return Model(
        name="flat_stove",
        family="articulated_objects",
        body=Body(name="object", parts=(Body(name="base", parts=(burner, button)),)),
        span=SPAN,
    )


def _capsule(centre: tuple[float, float, float], length: float, *, lying: bool) -> Shape:
    turn = about("x", 90) if lying else (1.0, 0.0, 0.0, 0.0)
    return Shape(kind="capsule", centre=centre, half=(10.0, length, 0.0), colour=STEEL, turn=turn)


def _microwave() -> Model:
    """Opens towards -y about a hinge at its left edge; its parts do not touch one another."""
    door = Body(
        name="microdoorroot",
        shapes=(
            box((129.5, -13.0, 0.0), (129.5, 12.0, 92.5), SHELL),
            panel((30.0, 205.0), (-25.6, -1.0), (-60.0, 60.0), GLASS),
            _capsule((237.5, -54.0, 0.0), 65.0, lying=False),
            _capsule((237.5, -37.5, 65.0), 15.0, lying=True),
            _capsule((237.5, -37.5, -65.0), 15.0, lying=True),
        ),
        joint=Joint(name="microjoint", kind="hinge", axis=(0.0, 0.0, 1.0), range=(-2.094, 0.0), damping=0.5),
        centre=(-172.5, -88.0, 96.0),
        mass=260.0,
        contact="oneway",
    )
    body = Body(
        name="object",
        shapes=(
            block((-172.5, -143.5), (-88.0, 111.0), (0.0, 187.0), SHELL),
            block((63.5, 172.5), (-88.0, 111.0), (0.0, 187.0), SHELL),
            block((-144.0, 63.0), (80.5, 110.5), (0.0, 187.0), SHELL),
            block((-143.5, 63.5), (-88.0, 81.0), (168.0, 187.0), SHELL),
            block((-143.5, 63.5), (-88.0, 80.0), (0.0, 24.0), SHELL),
            block((87.5, 172.5), (-110.5, -86.5), (0.0, 187.0), SHELL),
            panel((100.0, 160.0), (-111.5, -110.0), (120.0, 165.0), GLASS),
        ),
        sites=(
            Site(name="top_side", centre=(0.0, 10.0, 200.0), half=(120.0, 83.5, 5.0)),
            Site(name="heating_region", centre=(0.0, 10.0, 96.0), half=(120.0, 83.5, 80.0)),
        ),
        parts=(door,),
        mass=3000.0,
        contact="oneway",
    )
    return Model(name="microwave", family="articulated_objects", body=body, span=(-60.0, 60.0, 15.0))
