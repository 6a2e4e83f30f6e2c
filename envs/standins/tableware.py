"""Bowls, plates, mugs, pots and the bottle: round things made of rings of boxes, so that they are hollow."""

from __future__ import annotations

from envs.standins.models import Body, Family, Model
from envs.standins.shapes import Colour, Shapes, about, block, box, disc, prism, ring

CHARCOAL: Colour = (0.16, 0.16, 0.17)
ASH: Colour = (0.36, 0.36, 0.38)
CREAM: Colour = (0.92, 0.89, 0.82)
PORCELAIN: Colour = (0.96, 0.96, 0.95)
IRON: Colour = (0.13, 0.13, 0.14)
STEEL: Colour = (0.68, 0.69, 0.71)
RUBBER: Colour = (0.07, 0.07, 0.07)
SCARLET: Colour = (0.75, 0.06, 0.07)
SUN: Colour = (0.91, 0.71, 0.20)
CLARET: Colour = (0.26, 0.04, 0.07)
PAPER: Colour = (0.90, 0.85, 0.68)
CORK: Colour = (0.80, 0.62, 0.40)


def tableware() -> tuple[Model, ...]:
    """Every bowl, plate, pan, pot, mug and bottle that the tasks use."""
    scanned: Family = "stable_scanned_objects"
    bought: Family = "turbosquid_objects"
    return (
        _vessel("akita_black_bowl", scanned, 5.6, _akita_black_bowl()),
        _vessel("white_bowl", scanned, 2.1, _white_bowl()),
        _vessel("plate", scanned, 11.5, _plate()),
        _vessel("glazed_rim_porcelain_ramekin", scanned, 9.7, _ramekin()),
        _vessel("chefmate_8_frypan", scanned, 50.2, _frypan()),
        _vessel("moka_pot", bought, 68.2, _moka_pot()),
        _vessel("porcelain_mug", bought, 16.5, _porcelain_mug()),
        _vessel("red_coffee_mug", bought, 29.4, _red_coffee_mug()),
        _vessel("white_yellow_mug", bought, 30.9, _white_yellow_mug()),
        _vessel("wine_bottle", bought, 15.4, _wine_bottle()),
    )


def _vessel(name: str, family: Family, mass: float, shapes: Shapes) -> Model:
    return Model(name=name, family=family, body=Body(name="object", shapes=shapes, mass=mass))


def _akita_black_bowl() -> Shapes:
    """A flat foot, a shallow lower wall and a steep upper one; 107 mm wide and 52 mm high.

    The lower wall has an odd number of plates, and with them the bowl comes to lie askew when it is dropped on
    the ramekin (libero_spatial task 5 starts so), within 3 mm of where the published bowl lies. An even number
    nests it upright, 15 mm away.
    """
    return (
        *prism(21.0, (1.6, 6.8), CHARCOAL),
        *ring(33.5, 9.8, (0.8, 11.8), CHARCOAL, count=13, lean=60.0, start=90.0),
        *ring(47.1, 33.7, (1.3, 18.8), ASH, count=14, lean=14.5),
    )


def _white_bowl() -> Shapes:
    """Smaller: 81 mm wide and 35 mm high."""
    return (
        *prism(17.0, (0.6, 4.2), PORCELAIN),
        *ring(23.8, 7.0, (0.6, 8.5), PORCELAIN, count=12, lean=60.0),
        *ring(35.7, 22.6, (1.0, 12.6), PORCELAIN, count=14, lean=16.0),
    )


def _plate() -> Shapes:
    """138 mm wide; the rim's inner edge, 2 mm below the middle, is what it stands on."""
    return (
        *prism(33.0, (0.2, 6.0), CREAM),
        *ring(48.3, 7.0, (2.5, 19.1), CREAM, count=10, lean=70.5),
    )


def _ramekin() -> Shapes:
    return (
        *prism(34.0, (0.9, 7.3), CREAM),
        *ring(38.2, 21.7, (2.6, 20.8), PORCELAIN, count=16, lean=8.6),
    )


def _frypan() -> Shapes:
    centre = (7.2, 0.0)
    return (
        *prism(72.0, (0.8, 12.3), IRON, centre),
        *ring(89.8, 22.3, (3.6, 21.3), IRON, centre, count=14, lean=31.2),
        block((98.0, 127.0), (-10.0, 11.0), (7.0, 33.0), IRON),
        block((120.0, 141.0), (-10.0, 11.0), (17.0, 39.0), IRON),
        box((192.6, 0.0, 44.1), (66.5, 12.7, 6.2), RUBBER, about("y", -7.5)),
    )


def _moka_pot() -> Shapes:
    return (
        *prism(34.0, (-66.2, 4.0), STEEL, (0.0, 1.8)),
        *prism(34.0, (4.0, 67.0), STEEL, (0.0, 1.8), drawn=False),
        disc(31.0, (0.0, 8.0), RUBBER, (0.0, 1.8)),
        disc(36.0, (8.0, 67.0), STEEL, (0.0, 1.8)),
        block((-17.6, 17.6), (-41.7, -30.0), (18.0, 67.0), STEEL),
        block((-8.0, 8.0), (-56.3, -41.7), (32.5, 60.0), STEEL),
        block((-10.0, 10.0), (34.0, 49.0), (39.0, 66.0), RUBBER),
        block((-6.6, 6.6), (45.0, 84.0), (53.5, 67.3), RUBBER),
        box((0.0, 82.0, 54.0), (6.6, 7.0, 14.0), RUBBER),
        box((0.0, 73.0, 27.0), (6.6, 7.0, 27.0), RUBBER, about("x", -25.0)),
        box((0.0, 60.0, 4.0), (6.6, 7.0, 9.0), RUBBER, about("x", -45.0)),
        block((-5.2, 5.2), (-7.0, 5.0), (67.0, 85.7), RUBBER),
    )


def _porcelain_mug() -> Shapes:
    centre = (14.8, -1.6)
    return (
        *prism(26.0, (2.4, 12.8), PORCELAIN, centre),
        *ring(35.0, 23.9, (1.4, 18.9), PORCELAIN, centre, count=10, lean=23.5),
        *ring(42.0, 75.8, (2.4, 32.6), PORCELAIN, centre, count=10),
        box((-59.5, 0.0, 56.0), (3.8, 8.0, 19.8), PORCELAIN),
        box((-41.6, 0.0, 28.6), (3.8, 8.0, 19.8), PORCELAIN, about("y", 118.5)),
        box((-46.3, 0.0, 83.4), (3.8, 8.0, 19.8), PORCELAIN, about("y", 55.0)),
    )


def _red_coffee_mug() -> Shapes:
    """A tall cup; the lower edge of its leaning wall is what it stands on."""
    centre = (-15.5, -3.0)
    return (
        *prism(25.0, (2.8, 7.8), SCARLET, centre),
        *ring(32.0, 64.5, (3.5, 66.4), SCARLET, centre, count=10, lean=6.3),
        box((36.8, 1.1, 50.4), (2.9, 7.6, 34.2), SCARLET, about("y", 42.6)),
        box((54.7, 1.1, 94.4), (2.7, 6.9, 19.2), SCARLET, about("y", -5.7)),
        box((34.6, 1.1, 111.6), (18.2, 6.9, 2.7), SCARLET, about("y", -8.0)),
    )


def _white_yellow_mug() -> Shapes:
    centre = (-18.5, -0.5)
    return (
        *prism(24.0, (0.2, 5.2), SUN, centre),
        *ring(31.0, 10.6, (4.1, 10.3), SUN, centre, count=10, lean=36.0),
        *ring(42.5, 59.3, (4.1, 43.6), PORCELAIN, centre, count=14, lean=7.5),
        box((64.1, 0.0, 56.0), (4.1, 8.8, 29.2), SUN),
        box((40.2, 0.0, 26.3), (24.9, 8.8, 4.1), SUN, about("y", -11.5)),
        box((46.4, 0.0, 79.6), (21.7, 8.8, 4.1), SUN, about("y", -6.3)),
    )


def _wine_bottle() -> Shapes:
    return (
        *prism(19.7, (1.1, 63.0), CLARET),
        *prism(15.0, (63.0, 74.0), CLARET, boxes=3),
        *prism(11.5, (74.0, 88.0), CLARET, boxes=3),
        *prism(7.2, (88.0, 158.0), CLARET, boxes=3),
        disc(20.1, (18.0, 50.0), PAPER),
        disc(7.6, (138.0, 158.4), CORK),
    )
