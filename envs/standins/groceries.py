"""Tins, bottles, cartons and packets. Shapes are described standing (z up) and turned where LIBERO's are not."""

from __future__ import annotations

from envs.standins.models import Body, Model
from envs.standins.shapes import (
    Colour,
    Shape,
    Shapes,
    Vector,
    about,
    block,
    box,
    disc,
    panel,
    prism,
    stand_on_y,
)

SILVER: Colour = (0.72, 0.73, 0.75)
WHITE: Colour = (0.95, 0.95, 0.93)
RED: Colour = (0.80, 0.09, 0.08)
GREEN: Colour = (0.05, 0.42, 0.16)
BLUE: Colour = (0.12, 0.25, 0.62)
YELLOW: Colour = (0.96, 0.78, 0.12)
ORANGE: Colour = (0.93, 0.38, 0.05)
BROWN: Colour = (0.30, 0.15, 0.08)
BARBECUE: Colour = (0.36, 0.13, 0.06)
KETCHUP: Colour = (0.84, 0.24, 0.06)
SKY: Colour = (0.62, 0.70, 0.82)


def groceries() -> tuple[Model, ...]:
    """Every model of the `stable_hope_objects` family that the tasks use."""
    return (
        _grocery("alphabet_soup", 25.9, stand_on_y(_tin(YELLOW, BLUE)), (-40.0, 40.0, 25.0)),
        _grocery("tomato_sauce", 26.6, stand_on_y(_tin(RED, GREEN)), (-60.0, 40.0, 25.0)),
        _grocery("bbq_sauce", 12.2, _bbq_sauce(), (-60.0, 60.0, 15.0)),
        _grocery("ketchup", 23.2, stand_on_y(_ketchup())),
        _grocery("salad_dressing", 21.8, stand_on_y(_salad_dressing())),
        _grocery("milk", 31.7, stand_on_y(_carton(WHITE, RED, BLUE)), (-60.0, 40.0, 30.0)),
        _grocery("orange_juice", 31.7, stand_on_y(_carton(YELLOW, ORANGE, ORANGE))),
        _grocery("butter", 5.2, _packet((38.0, 20.0, 8.7), RED, YELLOW), (-20.0, 20.0, 20.0)),
        _grocery("cream_cheese", 6.2, _packet((40.0, 21.0, 8.9), SKY, BLUE), (-25.0, 25.0, 30.0)),
        _grocery("chocolate_pudding", 10.2, _packet((40.5, 23.0, 13.5), BROWN, SKY)),
        _grocery("cookies", 9.6, _packet((31.0, 41.0, 9.4), WHITE, RED)),
        _new_salad_dressing(),
    )


def _grocery(name: str, mass: float, shapes: Shapes, span: Vector = (-60.0, 40.0, 25.0)) -> Model:
    return Model(
        name=name,
        family="stable_hope_objects",
        body=Body(name="object", shapes=shapes, mass=mass),
        span=span,
    )


def _tin(label: Colour, band: Colour) -> Shapes:
    """A food tin: silver rims, a label and a band of a second colour around its middle."""
    centre = (0.0, 3.2)
    return (
        *prism(30.3, (-38.2, 37.0), label, centre, drawn=False),
        disc(30.8, (-32.0, 31.0), label, centre),
        disc(30.2, (-38.2, 37.0), SILVER, centre),
        disc(31.1, (-9.0, 8.0), band, centre),
    )


def _bbq_sauce() -> Shapes:
    return (
        block((-23.5, 23.5), (-14.5, 14.5), (-54.6, -1.0), BARBECUE),
        block((-18.0, 18.0), (-14.3, 14.3), (-1.0, 27.0), BARBECUE),
        *prism(13.6, (27.0, 52.5), ORANGE, boxes=3),
        panel((-19.0, 19.0), (-14.9, 14.9), (-45.0, -10.0), YELLOW),
        panel((-19.5, 19.5), (-15.2, 15.2), (-32.0, -22.0), RED),
    )


def _ketchup() -> Shapes:
    return (
        block((-27.7, 28.5), (-17.8, 16.2), (-72.5, -6.5), KETCHUP),
        block((-23.5, 24.3), (-18.5, 17.5), (-6.5, 15.0), KETCHUP),
        block((-18.3, 19.1), (-18.5, 17.5), (15.0, 36.3), KETCHUP),
        *prism(16.0, (36.3, 73.0), WHITE, (0.2, -0.8)),
        panel((-23.0, 23.8), (-18.3, 16.7), (-58.0, -18.0), YELLOW),
        panel((-15.0, 15.8), (-18.7, 17.1), (-50.0, -34.0), RED),
    )


def _salad_dressing() -> Shapes:
    return (
        block((-18.0, 16.5), (-17.5, 17.1), (-72.8, -62.0), WHITE),
        block((-27.0, 25.4), (-17.5, 17.1), (-62.0, -8.0), WHITE),
        block((-19.0, 17.5), (-17.5, 17.1), (-8.0, 13.0), WHITE),
        *prism(13.5, (13.0, 35.8), WHITE, (0.3, -0.2), boxes=3),
        *prism(15.8, (35.8, 73.0), GREEN, (0.3, -0.2)),
        panel((-21.0, 19.4), (-18.0, 17.6), (-54.0, -18.0), GREEN),
        panel((-16.0, 14.4), (-18.3, 17.9), (-44.0, -28.0), WHITE),
    )


def _new_salad_dressing() -> Model:
    """The same bottle in a part of its own, 5 cm up."""
    bottle = Body(name="bottle", shapes=stand_on_y(_salad_dressing()), centre=(0.0, 50.0, 0.0), mass=21.8)
    return Model(
        name="new_salad_dressing",
        family="stable_hope_objects",
        body=Body(name="object", parts=(bottle,)),
    )


def _carton(side: Colour, roof: Colour, foot: Colour) -> Shapes:
    """A gable-top carton."""
    half = 25.9
    slopes: list[Shape] = [
        box((0.0, sign * 13.4, 47.8), (26.2, 14.0, 2.2), roof, about("x", -sign * 42.0)) for sign in (-1, 1)
    ]
    return (
        block((-half, half), (-half, half), (-69.8, 39.7), side),
        *slopes,
        block((-26.4, 26.4), (-3.5, 3.5), (55.6, 61.4), roof),
        panel((-26.6, 26.6), (-26.6, 26.6), (-69.5, -46.0), foot),
        panel((-26.6, 26.6), (-26.6, 26.6), (8.0, 39.7), roof),
    )


def _packet(half: Vector, main: Colour, stripe: Colour) -> Shapes:
    """A flat box lying down, with a stripe around its middle."""
    x, y, z = half
    return (
        box((0.0, 0.0, 0.0), half, main),
        panel((-0.45 * x, 0.45 * x), (-y - 0.3, y + 0.3), (-z - 0.3, z + 0.3), stripe),
    )
