"""Actions as tokens, prompts as words, and images moved at random."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from policies.encoding.action_tokens import ActionTokenizer
from policies.encoding.observations import shift_images
from policies.encoding.prompts import PromptTokenizer

# Action tokens


@given(
    bins=st.integers(3, 256),
    actions=st.lists(st.floats(-1, 1, width=32), min_size=7, max_size=7),
)
def test_actions_survive_tokens_within_half_a_bin(bins: int, actions: list[float]) -> None:
    tokenizer = ActionTokenizer(vocab_size=400, bins=bins)
    ids = tokenizer.encode(np.array([actions]))
    assert ids.min() >= 400 - bins
    assert ids.max() <= 399
    assert np.abs(tokenizer.decode(ids) - np.array([actions])).max() <= 1 / (bins - 1) + 1e-6
    # A centre is its own nearest centre.
    np.testing.assert_array_equal(
        tokenizer.decode(tokenizer.encode(tokenizer.decode(ids))), tokenizer.decode(ids)
    )


def test_256_bins_are_openvlas() -> None:
    tokenizer = ActionTokenizer(vocab_size=32000, bins=256)
    actions = np.array([[-1.0, -0.999, 0.0, 0.5, 0.999, 1.0, 3.0]])
    np.testing.assert_array_equal(
        tokenizer.encode(actions), [31999, 31999, 31872, 31808, 31745, 31744, 31744]
    )
    assert len(tokenizer.centres) == 255
    # The two lowest ids share the highest centre.
    decoded = tokenizer.decode(np.array([31744, 31745, 31746, 31999, 31872, 31872, 31872]))[0]
    np.testing.assert_allclose(decoded, [254 / 255, 254 / 255, 252 / 255, -254 / 255, 0, 0, 0], atol=1e-7)


@pytest.mark.parametrize("bins", [3, 21, 255])
def test_odd_bins_hold_rest_and_both_extremes_exactly(bins: int) -> None:
    tokenizer = ActionTokenizer(vocab_size=300, bins=bins)
    actions = np.array([[-1, 0, 1, 0, 0, 0, 1]], np.float32)
    np.testing.assert_array_equal(tokenizer.decode(tokenizer.encode(actions)), actions)
    assert len(np.unique(tokenizer.centres)) == bins


def test_bad_actions_and_ids_are_named() -> None:
    tokenizer = ActionTokenizer(vocab_size=100, bins=21)
    actions = np.zeros((2, 7))
    actions[1, 3] = np.nan
    with pytest.raises(ValueError, match=r"actions\[1, 3\] is nan"):
        tokenizer.encode(actions)
    with pytest.raises(ValueError, match=r"must be \[K, 7\], got \[2, 6\]"):
        tokenizer.encode(np.zeros((2, 6)))
    with pytest.raises(ValueError, match=r"token id 78 is no action token; expected 79\.\.99"):
        tokenizer.decode(np.array([99, 78, 79, 80, 81, 82, 83]))
    with pytest.raises(ValueError, match="bins must lie in"):
        ActionTokenizer(vocab_size=100, bins=100)


def test_ids_that_are_no_actions_clip_where_openvla_clips_them() -> None:
    tokens = ActionTokenizer(vocab_size=32000, bins=256)
    ids = np.array([31999, 32000, 32063, 31744, 31745, 31743, 5])
    expected = np.array([-254, -254, -254, 254, 254, 254, 254]) / 255
    np.testing.assert_allclose(tokens.values(ids), expected, atol=1e-12)
    with pytest.raises(ValueError, match="token id 32000 is no action token"):
        tokens.decode(ids)


def test_openvlas_rule_holds_for_odd_numbers_of_bins_when_asked() -> None:
    tokens = ActionTokenizer(vocab_size=100, bins=5, exact_ends=False)
    # Edges -1, -0.5, 0, 0.5, 1; centres between them.
    np.testing.assert_allclose(tokens.centres, [-0.75, -0.25, 0.25, 0.75])
    assert tokens.ids(np.array([-1.0, -0.6, 0.1, 0.9, 1.0])).tolist() == [99, 99, 97, 96, 95]


# Prompts


def test_prompts_hold_every_word_of_libero() -> None:
    tokenizer = PromptTokenizer()
    # Found, not imported: LIBERO asks questions on import.
    package = importlib.util.find_spec("libero")
    assert package is not None
    assert package.submodule_search_locations is not None
    files = list(Path(package.submodule_search_locations[0]).glob("libero/bddl_files/libero_*/*.bddl"))
    assert len(files) == 130
    for file in files:
        found = re.search(r"\(:language ([^)]*)\)", file.read_text())
        assert found is not None
        assert tokenizer.unk_id not in tokenizer.encode(found[1]), file
        # The benchmark names a task by its file: SCENE_words, or words.
        words = [word for word in file.stem.split("_") if not word.isupper() and not word[-1].isdigit()]
        assert tokenizer.unk_id not in tokenizer.encode(" ".join(words)), file
    assert tokenizer.encode("pick up the teapot").count(tokenizer.unk_id) == 1
    assert tokenizer.encode("Pick up the MUG") == tokenizer.encode("pick up the mug")


def test_prompts_are_padded_on_the_right() -> None:
    tokenizer = PromptTokenizer()
    ids, mask = tokenizer.stack(
        ["pick up the alphabet soup and place it in the basket", "open the middle drawer of the cabinet"]
    )
    # BOS, in : what action should the robot take to <11 or 7 words> ? out :
    assert mask.sum(axis=1).tolist() == [24, 20]
    assert ids[:, 0].tolist() == [tokenizer.bos_id] * 2
    assert ids[1, 20:].tolist() == [tokenizer.pad_id] * 4


# Images


def test_shifted_images_repeat_their_edges() -> None:
    images = torch.arange(64, dtype=torch.uint8).view(1, 8, 8, 1).expand(200, 8, 8, 3)
    shifted = shift_images(images, 2, torch.Generator().manual_seed(0))
    assert shifted.dtype == torch.uint8
    offsets = set()
    for image in shifted[..., 0].int():
        # The middle pixel says how far the image moved.
        row, column = divmod(int(image[4, 4]), 8)
        offsets.add((row - 4, column - 4))
        rows = (torch.arange(8) + row - 4).clamp(0, 7)
        columns = (torch.arange(8) + column - 4).clamp(0, 7)
        assert torch.equal(image, rows[:, None] * 8 + columns)
    assert offsets == {(r, c) for r in range(-2, 3) for c in range(-2, 3)}
    assert shift_images(images, 0, torch.Generator()) is images
