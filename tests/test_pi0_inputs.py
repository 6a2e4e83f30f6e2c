"""Prompts and images of pi-0 and pi-0.5."""

from __future__ import annotations

import numpy as np
import pytest

from policies.pi0.preprocessing import (
    clean_instruction,
    prompt_ids,
    resize_with_pad,
    state_bins,
    state_prompt,
)


def encode(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def test_an_instruction_becomes_one_line_and_keeps_its_case() -> None:
    assert clean_instruction(" Put_the\nBowl down \n") == "Put the Bowl down"


def test_states_fall_into_256_bins_and_below_them() -> None:
    state = np.array([-1.5, -1.0, -0.9999, -1 + 1 / 128, 0.0, 0.9999, 1.0, 2.0])
    assert state_bins(state).tolist() == [-1, 0, 0, 1, 128, 255, 255, 255]


def test_pi05_reads_its_state_in_the_prompt() -> None:
    prompt = state_prompt("open_drawer", np.array([-1.0, 0.0, 1.0]))
    assert prompt == "Task: open drawer, State: 0 128 255;\nAction: "
    ids, mask = prompt_ids(
        "open_drawer", encode=encode, bos_id=2, length=60, state_S=np.array([-1.0, 0.0, 1.0])
    )
    assert ids[mask].tolist() == [2, *encode(prompt)]


def test_a_prompt_without_state_ends_in_a_line_feed_of_its_own() -> None:
    asked: list[str] = []

    def spy(text: str) -> list[int]:
        asked.append(text)
        return encode(text)

    ids, mask = prompt_ids("go_on\n", encode=spy, bos_id=2, length=10)
    assert asked == ["go on", "\n"]
    assert ids.tolist() == [2, *encode("go on"), 10, 0, 0, 0]
    assert mask.tolist() == [True] * 7 + [False] * 3
    assert (ids.dtype, mask.dtype) == (np.int64, np.bool_)


def test_a_prompt_that_is_too_long_is_refused() -> None:
    assert prompt_ids("abc", encode=encode, bos_id=2, length=5)[1].all()
    with pytest.raises(ValueError, match="the prompt for 'abcd' is 6 ids long, expected at most 5"):
        prompt_ids("abcd", encode=encode, bos_id=2, length=5)


def test_a_wide_image_gets_bars_above_and_below() -> None:
    image = np.full((10, 40, 3), 200, dtype=np.uint8)
    padded = resize_with_pad(image, 20)
    # 10 x 40 fits as 5 x 20: 7 black rows above, 8 below.
    assert padded.shape == (20, 20, 3)
    assert padded[:, 0, 0].tolist() == [0] * 7 + [200] * 5 + [0] * 8
    turned = resize_with_pad(image.transpose(1, 0, 2).copy(), 20)
    assert np.array_equal(turned, padded.transpose(1, 0, 2))


def test_an_image_of_the_right_size_stays_and_a_small_one_grows_bilinearly() -> None:
    draw = np.random.default_rng(0)
    image = draw.integers(0, 256, (20, 20, 3), dtype=np.uint8)
    assert np.array_equal(resize_with_pad(image, 20), image)
    edge = np.zeros((2, 2, 3), dtype=np.uint8)
    edge[:, 1] = 200
    assert resize_with_pad(edge, 4)[0, :, 0].tolist() == [0, 50, 150, 200]


@pytest.mark.parametrize("shape", [(4, 4), (3, 4, 4), (0, 4, 3)])
def test_what_is_no_image_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"image is uint8 \[.*\], expected uint8 \[height, width, 3\]"):
        resize_with_pad(np.zeros(shape, dtype=np.uint8))
    with pytest.raises(ValueError, match="image is float64"):
        resize_with_pad(np.zeros((4, 4, 3)))
