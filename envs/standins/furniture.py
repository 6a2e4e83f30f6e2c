"""Containers, racks, shelves and books: boxes, some with regions that things are put in or on."""

from __future__ import annotations

from envs.standins.models import Body, Family, Model, Site
from envs.standins.shapes import Colour, Shapes, about, block, box, panel, product

WICKER: Colour = (0.72, 0.50, 0.28)
WICKER_RIM: Colour = (0.50, 0.32, 0.16)
OAK: Colour = (0.45, 0.33, 0.23)
PINE: Colour = (0.82, 0.62, 0.42)
MAHOGANY: Colour = (0.36, 0.11, 0.05)
WALNUT: Colour = (0.22, 0.17, 0.14)
INK: Colour = (0.08, 0.08, 0.09)
PAGES: Colour = (0.93, 0.92, 0.88)
SAND: Colour = (0.80, 0.66, 0.30)

SCANNED: Family = "stable_scanned_objects"
BOUGHT: Family = "turbosquid_objects"
HALF_TURN_Z = (0.0, 0.0, 0.0, 1.0)
HALF_TURN_Y = (0.0, 0.0, 1.0, 0.0)


def furniture() -> tuple[Model, ...]:
    """Every container, rack, shelf and book that the tasks use."""
    return (
        _basket(),
        _wooden_tray(),
        _desk_caddy(),
        _wine_rack(),
        _two_layer_shelf(),
        _book("black_book", 42.5, (-15.0, 14.0), (-67.3, 43.1), (2.2, 136.6), INK),
        _book("yellow_book", 28.1, (-10.2, 13.4), (-48.8, 49.0), (2.0, 124.2), SAND),
    )


def _furniture(name: str, mass: float, shapes: Shapes, sites: tuple[Site, ...], family: Family) -> Model:
    return Model(name=name, family=family, body=Body(name="object", shapes=shapes, sites=sites, mass=mass))


def _basket() -> Model:
    """The basket of libero_object: four walls leaning out a little."""
    shapes = (
        block((-74.0, 79.0), (-72.0, 72.0), (4.2, 22.0), WICKER),
        box((-72.6, 0.0, 76.6), (6.7, 72.0, 63.7), WICKER, about("y", -4.5)),
        box((75.6, 0.0, 76.6), (6.7, 72.0, 63.7), WICKER, about("y", 3.0)),
        box((0.0, -68.6, 81.8), (72.0, 6.7, 63.7), WICKER, about("x", 3.0)),
        box((0.0, 69.1, 81.8), (72.0, 6.7, 63.7), WICKER, about("x", -2.5)),
        panel((-85.0, -70.0), (-78.0, 79.0), (132.0, 142.0), WICKER_RIM),
        panel((71.0, 86.0), (-78.0, 79.0), (132.0, 142.0), WICKER_RIM),
        panel((-72.0, 72.0), (-80.0, -65.0), (137.0, 147.0), WICKER_RIM),
        panel((-72.0, 72.0), (65.0, 80.0), (137.0, 147.0), WICKER_RIM),
    )
    region = Site(
        name="contain_region", centre=(0.0, 0.0, 71.85), half=(61.08, 61.08, 69.49), turn=HALF_TURN_Z
    )
    return _furniture("basket", 136.1, shapes, (region,), SCANNED)


def _wooden_tray() -> Model:
    long = (-136.0, 152.0)
    shapes = (
        block(long, (-85.0, 75.0), (-0.8, 8.0), OAK),
        block(long, (-87.6, -81.4), (3.8, 62.6), OAK),
        block(long, (72.7, 78.9), (2.8, 59.6), OAK),
        block((-141.6, -136.9), (-83.0, 72.5), (1.0, 80.9), OAK),
        block((150.9, 155.5), (-83.0, 72.5), (1.0, 80.9), OAK),
    )
    region = Site(
        name="contain_region",
        centre=(8.63, -4.71, 42.55),
        half=(40.38, 78.39, 135.49),
        turn=about("y", 90),
    )
    return _furniture("wooden_tray", 57.2, shapes, (region,), BOUGHT)


def _desk_caddy() -> Model:
    """Four compartments: two square ones at the ends, a narrow front and a narrow back one between them."""
    depth = (-70.6, 70.6)
    shapes = (
        block((-75.5, 75.5), (-216.9, 216.9), (1.4, 13.8), OAK),
        block(depth, (-74.2, -61.8), (2.6, 167.4), OAK),
        block(depth, (-215.6, -203.2), (2.6, 167.4), OAK),
        block((62.8, 70.8), (-209.8, 209.8), (5.3, 168.3), OAK),
        block((-5.6, 2.4), (-66.8, 66.8), (11.8, 98.6), OAK),
        block((-70.9, -62.9), (-209.8, 209.8), (4.9, 74.1), OAK),
        block((-70.9, -62.9), (-216.4, -63.2), (8.1, 167.3), OAK),
        *(
            shape
            for y in ((67.0, 74.2), (205.0, 212.2))
            for shape in (
                block(depth, y, (11.9, 78.5), OAK),
                block((4.6, 70.6), y, (78.5, 115.0), OAK),
                block((38.0, 70.6), y, (115.0, 146.0), OAK),
            )
        ),
    )
    end = (61.96, 62.16, 60.46)
    sites = (
        Site(name="right_contain_region", centre=(6.31, -143.39, 65.58), half=end, turn=HALF_TURN_Y),
        Site(name="left_contain_region", centre=(6.31, 145.51, 65.58), half=end, turn=HALF_TURN_Y),
        Site(
            name="back_contain_region",
            centre=(33.64, -0.64, 85.58),
            half=(27.75, 62.16, 60.46),
            turn=HALF_TURN_Y,
        ),
        Site(
            name="front_contain_region",
            centre=(-31.02, -0.64, 40.54),
            half=(27.75, 35.95, 62.16),
            turn=product(HALF_TURN_Y, about("x", 90)),
        ),
    )
    return _furniture("desk_caddy", 278.0, shapes, sites, BOUGHT)


def _wine_rack() -> Model:
    """Two sloping shelves with a lip at their lower edge, on a leaning post."""
    slope = about("x", 31.3)
    shapes = (
        box((0.0, -6.1, 251.2), (134.4, 78.9, 4.5), PINE, slope),
        box((0.0, -42.7, 127.3), (134.4, 78.9, 4.5), PINE, slope),
        box((0.0, -74.8, 220.7), (132.2, 1.2, 8.7), MAHOGANY, about("x", 29.4)),
        box((0.0, -109.1, 97.4), (132.2, 1.2, 8.7), MAHOGANY, about("x", 29.4)),
        box((0.0, 8.9, 170.3), (7.6, 9.0, 161.6), MAHOGANY, about("x", -15.7)),
        block((-66.5, 66.5), (-93.0, 93.0), (2.1, 11.1), MAHOGANY),
        box((0.0, 69.4, 10.1), (90.0, 60.0, 4.5), MAHOGANY, about("x", -7.5)),
        box((0.0, -64.3, 12.6), (90.0, 60.0, 4.5), MAHOGANY, about("x", 8.0)),
        block((-90.5, 90.5), (-14.1, 14.1), (16.0, 25.0), MAHOGANY),
    )
    region = Site(
        name="top_region",
        centre=(0.0, -80.03, 217.45),
        half=(100.87, 22.0, 2.51),
        turn=(0.8549119, -0.5187733, 0.0, 0.0),
    )
    return _furniture("wine_rack", 152.7, shapes, (region,), BOUGHT)


def _two_layer_shelf() -> Model:
    shapes = (
        block((-160.9, -146.7), (-79.2, 111.6), (0.2, 209.0), WALNUT),
        block((156.0, 170.2), (-79.2, 111.6), (0.2, 209.0), WALNUT),
        block((-160.4, 166.2), (107.1, 111.7), (0.2, 209.0), WALNUT),
        block((-148.1, 158.5), (-70.9, 108.3), (68.9, 71.1), WALNUT),
        block((-170.8, 180.8), (-78.9, 111.7), (205.7, 210.7), WALNUT),
    )
    sites = (
        Site(name="top_side", centre=(4.96, 15.67, 206.88), half=(175.57, 94.38, 1.47)),
        Site(
            name="top_region",
            centre=(5.38, 16.87, 136.72),
            half=(67.39, 85.64, 150.93),
            turn=about("y", -90),
        ),
        Site(
            name="bottom_region",
            centre=(5.55, 16.87, 14.07),
            half=(35.28, 85.64, 155.8),
            turn=about("y", 90),
        ),
    )
    return _furniture("wooden_two_layer_shelf", 206.3, shapes, sites, BOUGHT)


def _book(
    name: str,
    mass: float,
    x: tuple[float, float],
    y: tuple[float, float],
    z: tuple[float, float],
    cover: Colour,
) -> Model:
    """A closed book standing on its short side, its pages showing on three sides."""
    inside = (x[0] + 3.0, x[1] - 3.0)
    pages = panel(inside, (y[0] + 4.0, y[1] + 0.3), (z[0] - 0.3, z[1] + 0.3), PAGES)
    return _furniture(name, mass, (block(x, y, z, cover), pages), (), BOUGHT)
