"""Procedural images for the floors and walls, whose files LIBERO's arena classes name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 128  # pixels; small, because software rendering pays for every texel

TEXTURES = (
    "gray_ceramic_tile.png",
    "light-gray-floor-tile.png",
    "light-gray-plaster.png",
    "seamless_wood_planks_floor.png",
    "yellow_linen_wall_texture.png",
)


def write_textures(folder: Path) -> None:
    """Write the five PNG files that the tasks' arenas load."""
    images = (
        _tiles((0.56, 0.56, 0.55), 0.44, 4),
        _tiles((0.80, 0.80, 0.79), 0.70, 2),
        _plaster((0.80, 0.80, 0.79), 0.015),
        _planks((0.62, 0.46, 0.31)),
        _plaster((0.86, 0.80, 0.62), 0.03),
    )
    folder.mkdir(parents=True, exist_ok=True)
    for name, image in zip(TEXTURES, images, strict=True):
        pixels = np.clip(np.rint(image * 255), 0, 255).astype(np.uint8)
        Image.fromarray(pixels, "RGB").save(folder / name)


def _plain(colour: tuple[float, float, float]) -> np.ndarray:
    return np.tile(np.asarray(colour), (SIDE, SIDE, 1))


def _grain(seed: int, amplitude: float) -> np.ndarray:
    noise = np.random.Generator(np.random.PCG64(seed)).uniform(-amplitude, amplitude, (SIDE, SIDE, 1))
    return np.asarray(noise)


def _plaster(colour: tuple[float, float, float], amplitude: float) -> np.ndarray:
    return _plain(colour) + _grain(1, amplitude)


def _tiles(colour: tuple[float, float, float], joint: float, count: int) -> np.ndarray:
    """`count` by `count` square tiles with joints of grey level `joint`."""
    image = _plain(colour) + _grain(2, 0.01)
    pitch = SIDE // count
    on_joint = np.arange(SIDE) % pitch < 2
    image[on_joint, :] = joint
    image[:, on_joint] = joint
    return image


def _planks(colour: tuple[float, float, float]) -> np.ndarray:
    """Four boards of slightly different brightness with thin dark gaps."""
    image = _plain(colour) + _grain(3, 0.015)
    board = np.arange(SIDE) // (SIDE // 4)
    image *= np.asarray([1.0, 0.90, 1.06, 0.95])[board][:, None, None]
    image[np.arange(SIDE) % (SIDE // 4) == 0, :] *= 0.6
    return image
