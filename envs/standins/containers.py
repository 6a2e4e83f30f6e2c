"""Baskets, trays and caddies: open boxes with a region that things are put in."""

from __future__ import annotations

from envs.standins.models import Body, Model, Site
from envs.standins.shapes import Colour, about, block, box, panel

WICKER: Colour = (0.72, 0.50, 0.28)
WICKER_RIM: Colour = (0.50, 0.32, 0.16)


def basket() -> Model:
    """The basket of libero_object: four walls leaning out a little."""
    floor = block((-74.0, 79.0), (-72.0, 72.0), (4.2, 22.0), WICKER)
    walls = (
        box((-72.6, 0.0, 76.6), (6.7, 72.0, 63.7), WICKER, about("y", -4.5)),
        box((75.6, 0.0, 76.6), (6.7, 72.0, 63.7), WICKER, about("y", 3.0)),
        box((0.0, -68.6, 81.8), (72.0, 6.7, 63.7), WICKER, about("x", 3.0)),
        box((0.0, 69.1, 81.8), (72.0, 6.7, 63.7), WICKER, about("x", -2.5)),
    )
    rims = (
        panel((-85.0, -70.0), (-78.0, 79.0), (132.0, 142.0), WICKER_RIM),
        panel((71.0, 86.0), (-78.0, 79.0), (132.0, 142.0), WICKER_RIM),
        panel((-72.0, 72.0), (-80.0, -65.0), (137.0, 147.0), WICKER_RIM),
        panel((-72.0, 72.0), (65.0, 80.0), (137.0, 147.0), WICKER_RIM),
    )
    region = Site(
        name="contain_region",
        centre=(0.0, 0.0, 71.85),
        half=(61.08, 61.08, 69.49),
        turn=(0.0, 0.0, 0.0, 1.0),
    )
    return Model(
        name="basket",
        family="stable_scanned_objects",
        body=Body(name="object", shapes=(floor, *walls, *rims), sites=(region,), mass=136.1),
    )
