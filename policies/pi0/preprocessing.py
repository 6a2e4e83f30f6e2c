"""What pi-0 and pi-0.5 are shown: prompt ids with or without the state, and images on their scale.

openpi, `src/openpi/models/tokenizer.py`, `packages/openpi-client/.../image_tools.py`, `examples/libero/main.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

PI0_PROMPT_LENGTH = 48
"""Prompt ids of pi-0."""
PI05_PROMPT_LENGTH = 200
"""Prompt ids of pi-0.5, which also hold the state."""
STATE_BINS = 256
"""Into which each dimension of a state falls where a prompt tells it."""
IMAGE_SIDE = 224

Encode = Callable[[str], Sequence[int]]
"""PaliGemma's SentencePiece: text to ids, without BOS or EOS."""


def clean_instruction(instruction: str) -> str:
    """One line without underscores or space around it; the case stays."""
    return instruction.strip().replace("_", " ").replace("\n", " ")


def state_bins(state_S: np.ndarray) -> np.ndarray:
    """Bin of each normalised dimension, int64 [S]: 256 bins over [-1, 1], -1 below them and 255 above."""
    edges = np.linspace(-1, 1, STATE_BINS + 1)[:-1]
    return np.digitize(state_S, edges) - 1


def state_prompt(instruction: str, state_S: np.ndarray) -> str:
    """pi-0.5's prompt with the state in it, normalised and not padded."""
    state = " ".join(str(bin_) for bin_ in state_bins(state_S))
    return f"Task: {clean_instruction(instruction)}, State: {state};\nAction: "


def prompt_ids(
    instruction: str, *, encode: Encode, bos_id: int, length: int, state_S: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """BOS and prompt, int64 [length] right-padded with 0, and which ids are real, bool [length].

    With a state (pi-0.5, `discrete_state_input`), `state_prompt`. Without one (pi-0, and pi-0.5 blind to its
    state, such as pi05_libero), the instruction and then a line feed encoded on its own. Raises ValueError when that
    is more than `length` ids, whose end the model could not do without.
    """
    if state_S is not None:
        ids = [bos_id, *encode(state_prompt(instruction, state_S))]
    else:
        ids = [bos_id, *encode(clean_instruction(instruction)), *encode("\n")]
    if len(ids) > length:
        raise ValueError(f"the prompt for {instruction!r} is {len(ids)} ids long, expected at most {length}")
    padded = np.zeros(length, dtype=np.int64)
    padded[: len(ids)] = ids
    return padded, np.arange(length) < len(ids)


def pi0_view(upright_HWC: np.ndarray, *, side: int = IMAGE_SIDE) -> np.ndarray:
    """A camera image that stands upright (`Observation`) -> these models', uint8 [side, side, 3].

    openpi turns the simulator's own image, whose rows begin at the bottom, by 180 degrees: rows as they are here,
    columns from right to left. Raises ValueError as `resize_with_pad`.
    """
    return resize_with_pad(np.ascontiguousarray(upright_HWC[:, ::-1]), side)


def resize_with_pad(image_HWC: np.ndarray, side: int = IMAGE_SIDE) -> np.ndarray:
    """uint8 [H, W, 3] -> uint8 [side, side, 3]: the longer side fits (bilinear), black bars fill the rest evenly.

    The bars differ by a row or column at most; the narrower lies above or to the left. Raises ValueError for
    anything else than such an image.
    """
    if image_HWC.dtype != np.uint8 or image_HWC.ndim != 3 or image_HWC.shape[2] != 3 or not image_HWC.size:
        raise ValueError(
            f"image is {image_HWC.dtype} {list(image_HWC.shape)}, expected uint8 [height, width, 3]"
        )
    height, width = image_HWC.shape[:2]
    if height == width == side:
        return image_HWC
    # As openpi rounds: the ratio is a float, and the scaled side is rounded down from its quotient.
    ratio = max(width / side, height / side)
    new_height, new_width = max(int(height / ratio), 1), max(int(width / ratio), 1)
    resized = Image.fromarray(image_HWC).resize((new_width, new_height), Image.Resampling.BILINEAR)
    canvas = np.zeros((side, side, 3), dtype=np.uint8)
    top, left = (side - new_height) // 2, (side - new_width) // 2
    canvas[top : top + new_height, left : left + new_width] = np.asarray(resized)
    return canvas
