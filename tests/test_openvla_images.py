"""What OpenVLA sees of LIBERO: each step of its training images, taken again."""

from __future__ import annotations

import re

import numpy as np
import pytest

from policies.openvla.images import crop_centre, jpeg_round_trip, openvla_view, resize_lanczos


def test_an_upright_image_is_mirrored_which_turns_the_simulators_by_180_degrees() -> None:
    upright = np.zeros((64, 64, 3), np.uint8)
    upright[:16, :16] = 255
    simulators = upright[::-1]
    seen = openvla_view(upright, size=64)
    assert seen.shape == (64, 64, 3)
    turned = np.ascontiguousarray(simulators[::-1, ::-1])
    assert np.abs(seen.astype(int) - crop_centre(turned, 0.9)).mean() < 1
    assert seen[4, 60].min() > 250
    assert seen[4, 4].max() < 5


def test_jpeg_keeps_grey_and_halves_colour() -> None:
    grey = np.full((16, 16, 3), 77, np.uint8)
    np.testing.assert_array_equal(jpeg_round_trip(grey), grey)
    stripes = np.zeros((16, 16, 3), np.uint8)
    stripes[:, ::2, 0], stripes[:, 1::2, 2] = 255, 255
    back = jpeg_round_trip(stripes).astype(int)
    # Columns of red and blue alike bright become nearly one purple: their colour is averaged by pairs.
    assert np.abs(back[4, 4, 0] - back[4, 5, 0]) < 128


def test_lanczos_weights_are_the_kernels() -> None:
    """A column of one bright row, shrunk 8 -> 4: each new row is the kernel at the distance, widened twice."""
    image = np.zeros((8, 8, 3), np.uint8)
    image[3] = 200
    small = resize_lanczos(image, 4)
    centres = 2 * np.arange(4) + 1.0
    distance = (np.arange(8)[None] + 0.5 - centres[:, None]) / 2
    kernel = np.where(np.abs(distance) < 3, np.sinc(distance) * np.sinc(distance / 3), 0)
    expected = 200 * kernel[:, 3] / kernel.sum(axis=1)
    np.testing.assert_array_equal(small[:, 0, 0], np.clip(np.rint(expected), 0, 255))
    assert small[1, 0, 0] > 80
    same = np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    np.testing.assert_array_equal(resize_lanczos(same, 9), same)


def test_resizing_rounds_once() -> None:
    image = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    centres = (np.arange(224) + 0.5) * 256 / 224
    distance = (np.arange(256)[None] + 0.5 - centres[:, None]) * 224 / 256
    kernel = np.where(np.abs(distance) < 3, np.sinc(distance) * np.sinc(distance / 3), 0)
    kernel /= kernel.sum(axis=1, keepdims=True)
    exact = np.moveaxis(kernel @ np.moveaxis(image.astype(np.float64), -1, 0) @ kernel.T, 0, -1)
    assert np.abs(resize_lanczos(image, 224) - np.clip(exact, 0, 255)).max() < 0.501


def test_the_centre_crop_keeps_nine_tenths_of_the_area() -> None:
    # Brightness is the column, so a pixel says where it came from.
    ramp = np.broadcast_to(np.arange(224, dtype=np.uint8)[None, :, None], (224, 224, 3))
    cropped = crop_centre(np.ascontiguousarray(ramp), 0.9)
    first = (1 - np.sqrt(0.9)) / 2 * 223
    assert cropped.shape == (224, 224, 3)
    # Back to whole numbers by cutting off: 5.72 is 5, and 217.28 is 217.
    assert cropped[0, 0, 0] == int(first) == 5
    assert cropped[100, -1, 0] == int(223 - first) == 217
    np.testing.assert_allclose(cropped[50, :, 1], np.linspace(first, 223 - first, 224), atol=1)
    whole = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    np.testing.assert_array_equal(crop_centre(whole, 1.0), whole)


def test_a_view_is_stored_resized_and_cropped() -> None:
    upright = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    plain = resize_lanczos(jpeg_round_trip(upright[:, ::-1]), 56)
    np.testing.assert_array_equal(openvla_view(upright, size=56), crop_centre(plain, 0.9))
    with pytest.raises(
        ValueError, match=re.escape("an image is uint8 [64, 64], expected uint8 [rows, columns, 3]")
    ):
        openvla_view(upright[..., 0], size=56)
