"""Where an object is to be let go so that LIBERO's goal predicate holds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from envs.experts.scene import TIP, Scene


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where to let go."""

    position: np.ndarray
    """float64 [2], for the object's origin, metres."""
    release: float
    """Height of the object's underside at which the fingers open, metres."""
    clear: float
    """Height of the object's underside on the way there, metres; >= release."""
    support: str
    """What it then lies on or in."""
    tolerance: float
    """Horizontal distance from `position` within which to let go, metres."""


def in_basket(scene: Scene, item: str, *, basket: str) -> Place:
    """Let go with the fingertips at the rim: a tall object is then inside already, a flat one falls in."""
    rim = scene.block(basket).top
    middle, _ = scene.site(f"{basket}_contain_region")
    hanging = scene.gripper().position[2] - TIP - scene.block(item).bottom
    return Place(
        position=middle[:2], release=rim + 0.005 - hanging, clear=rim + 0.02, support=basket, tolerance=0.03
    )


def on_object(scene: Scene, item: str, *, support: str) -> Place:
    """Set down in the middle of a plate or bowl, until it touches."""
    block = scene.block(support)
    return Place(
        position=block.origin[:2],
        release=block.top - 0.01,
        clear=block.top + 0.04,
        support=support,
        tolerance=0.015,
    )


def on_site(scene: Scene, item: str, *, site: str, support: str) -> Place:
    """Set down on a region of a fixture, until it touches the fixture.

    LIBERO asks for the origin within a box that stands on the site, so aim at the middle of that box (on the sloping
    wine rack it is not above the site).
    """
    position, rotation = scene.site(site)
    aim = position + rotation.T @ np.array([0.0, 0.0, 0.05])
    return Place(
        position=aim[:2],
        release=position[2] - 0.02,
        clear=position[2] + 0.05,
        support=support,
        tolerance=0.02,
    )
