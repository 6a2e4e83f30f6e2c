"""What OpenVLA sees of LIBERO: the steps its training images went through, taken again.

Its data were rendered at 256 x 256, turned by 180 degrees, stored as JPEG, resized by TensorFlow's antialiased
Lanczos and, since training cropped at random, are cropped at the centre when it acts. Each step follows TensorFlow's
arithmetic; JPEG is Pillow's, whose pixels may differ by a level or two.
"""

from __future__ import annotations

import io
import math

import numpy as np
from PIL import Image

JPEG_QUALITY = 95
"""TensorFlow's; it also halves the colour planes' rows and columns."""
CROP_AREA = 0.9
"""Share of the image that the centre crop keeps."""


def openvla_view(upright: np.ndarray, *, size: int) -> np.ndarray:
    """A camera image uint8 [H, W, 3] that stands upright (`Observation`) -> OpenVLA's, uint8 [size, size, 3].

    The simulator's own rows begin at the bottom, and OpenVLA turns that image by 180 degrees: rows as they are here,
    columns from right to left. The centre is cropped because the checkpoints fine-tuned on LIBERO were all trained
    with random crops. Raises ValueError for another shape or type.
    """
    if upright.dtype != np.uint8 or upright.ndim != 3 or upright.shape[-1] != 3:
        raise ValueError(
            f"an image is {upright.dtype} {list(upright.shape)}, expected uint8 [rows, columns, 3]"
        )
    return crop_centre(resize_lanczos(jpeg_round_trip(upright[:, ::-1]), size), CROP_AREA)


def jpeg_round_trip(image: np.ndarray) -> np.ndarray:
    """Encode uint8 [H, W, 3] as JPEG and decode it again."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(
        buffer, "JPEG", quality=JPEG_QUALITY, subsampling="4:2:0"
    )
    buffer.seek(0)
    return np.asarray(Image.open(buffer))


def resize_lanczos(image: np.ndarray, size: int) -> np.ndarray:
    """uint8 [H, W, 3] -> uint8 [size, size, 3] by the Lanczos kernel of three lobes, widened when shrinking.

    Channel by channel in float, rounded once at the end: on uint8 Pillow would round between columns and rows.
    """
    planes = [
        np.asarray(Image.fromarray(plane).resize((size, size), Image.Resampling.LANCZOS))
        for plane in np.moveaxis(image.astype(np.float32), -1, 0)
    ]
    return np.clip(np.rint(np.stack(planes, axis=-1)), 0, 255).astype(np.uint8)


def crop_centre(image: np.ndarray, area: float) -> np.ndarray:
    """Cut the middle `area` (0..1] out of uint8 [H, W, 3], each side times its root, and resize it back bilinearly.

    The crop's outermost samples lie on its edges, and nothing is smoothed (TensorFlow's crop_and_resize).
    """
    rows, columns = (_samples(side, math.sqrt(area)) for side in image.shape[:2])
    scaled = image.astype(np.float32) / np.float32(255)
    mixed = _interpolate(_interpolate(scaled, columns, axis=1), rows, axis=0)
    # TensorFlow's way back to uint8: times 255.5, and the fraction cut off.
    return (np.clip(mixed, 0, 1) * np.float32(255.5)).astype(np.uint8)


def _samples(side: int, share: float) -> np.ndarray:
    """Where the `side` samples of the middle `share` of a side lie, in pixels, float32."""
    first = (1 - share) / 2 * (side - 1)
    return np.linspace(first, side - 1 - first, side, dtype=np.float32)


def _interpolate(image: np.ndarray, samples: np.ndarray, *, axis: int) -> np.ndarray:
    below = np.floor(samples).astype(np.int64)
    above = np.ceil(samples).astype(np.int64)
    shape = [1, 1, 1]
    shape[axis] = -1
    share = (samples - below).reshape(shape)
    low, high = image.take(below, axis), image.take(above, axis)
    return low + (high - low) * share
