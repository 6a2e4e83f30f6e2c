"""Checkpoints of pi-0 and pi-0.5 in each published layout, what is refused, and their statistics."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors.torch import load_file, save_file
from transformers import PI0ForConditionalGeneration

from policies.pi0.checkpoint import LAYOUTS, load_pi0
from policies.pi0.network import Pi0Network
from policies.pi0.norm_stats import NormStats, normalise, pad_dims, read_norm_stats
from policies.pi0.sizes import pi0_config
from tests import published_tiny
from tests.pi0_tiny import TINY, in_layout, tiny_network
from tests.published_tiny import write_lerobot_stats

JOINT = "paligemma_with_expert."
HEAD = f"{JOINT}paligemma.lm_head.weight"
EMBEDDING = f"{JOINT}paligemma.model.language_model.embed_tokens.weight"
NORM = f"{JOINT}gemma_expert.model.norm.weight"
Tensors = dict[str, torch.Tensor]


def saved(folder: Path, tensors: Tensors) -> Path:
    save_file(
        {key: tensor.clone().contiguous() for key, tensor in tensors.items()}, folder / "model.safetensors"
    )
    return folder


def same_weights(a: Pi0Network, b: Pi0Network) -> bool:
    return all(
        torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("adaptive", [False, True], ids=["pi0", "pi05"])
@pytest.mark.parametrize("layout", ["openpi", "LeRobot"])
@pytest.mark.parametrize("absent", ["head", "embedding", "neither"])
def test_openpis_and_lerobots_layouts_are_read(
    tmp_path: Path, layout: str, absent: str, adaptive: bool
) -> None:
    network = tiny_network(adaptive=adaptive)
    tensors = in_layout(network, LAYOUTS[layout])
    prefix = "model." if layout == "LeRobot" else ""
    assert {
        prefix + HEAD,
        prefix + EMBEDDING,
        f"{prefix}action_in_proj.bias",
        f"{prefix}action_out_proj.bias",
    } <= set(tensors)
    if absent != "neither":
        del tensors[prefix + (HEAD if absent == "head" else EMBEDDING)]
    saved(tmp_path, tensors)
    loaded = load_pi0(tmp_path, replace(TINY, adaptive=adaptive))
    assert same_weights(loaded, network)
    assert not loaded.training


def test_transformers_names_are_read(tmp_path: Path) -> None:
    torch.manual_seed(1)
    official = PI0ForConditionalGeneration(pi0_config(TINY))
    saved(tmp_path, official.state_dict())
    loaded = load_pi0(tmp_path, TINY)
    assert torch.equal(loaded.suffix.state_proj.weight, official.embed_action_time.state_proj.weight)
    assert torch.equal(
        loaded.vlm.vision_tower.encoder.layers[1].mlp.fc1.weight,
        official.model.vlm.vision_tower.encoder.layers[1].mlp.fc1.weight,
    )


def test_what_transformers_saves_is_read(tmp_path: Path) -> None:
    torch.manual_seed(1)
    official = PI0ForConditionalGeneration(pi0_config(TINY))
    official.save_pretrained(tmp_path)
    assert any(key.startswith(JOINT) for key in load_file(tmp_path / "model.safetensors"))
    loaded = load_pi0(tmp_path, TINY)
    by_name = official.state_dict()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, by_name[LAYOUTS["transformers"].key(name)]), name


def test_a_checkpoint_in_half_precision_is_cast(tmp_path: Path) -> None:
    network = tiny_network(adaptive=True).to(torch.bfloat16)
    saved(tmp_path, in_layout(network, LAYOUTS["openpi"]))
    config = replace(TINY, adaptive=True)
    assert same_weights(load_pi0(tmp_path, config), network.float())
    assert load_pi0(tmp_path, config, dtype=torch.bfloat16).action_out_proj.weight.dtype == torch.bfloat16


def without(*keys: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key not in keys}


def with_(**changed: torch.Tensor) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {key.replace("__", "."): tensor for key, tensor in changed.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without(NORM), rf"{NORM} is missing; expected the tensors of pi-0$"),
        (without(NORM, "state_proj.bias"), rf"{NORM} is missing \(and 1 more\); expected"),
        (without(HEAD, EMBEDDING), rf"{EMBEDDING} is missing; expected"),
        (with_(value_head__weight=torch.zeros(2)), r"value_head.weight is not of this network; expected"),
        (
            with_(state_proj__weight=torch.zeros(16, 8)),
            r"state_proj.weight has shape \[16, 8\], expected \[16, 7\]; expected the tensors",
        ),
        (
            with_(state_proj__bias=torch.zeros(16, dtype=torch.int64)),
            r"state_proj.bias is stored as I64, expected one of BF16, F16, F32, F64; integers are",
        ),
        (
            with_(action_out_proj__bias=torch.full((6,), torch.nan)),
            r"action_out_proj.bias has 6 non-finite values",
        ),
        (lambda t: t | {HEAD: t[HEAD] + 1}, rf"{HEAD} differs from {EMBEDDING}, expected them tied"),
        (
            lambda t: t | {EMBEDDING.replace("language_model", "language_model.model"): t[EMBEDDING]},
            r"are one tensor; expected",
        ),
        (
            lambda t: {f"student.{key}": tensor for key, tensor in t.items()},
            r"is no checkpoint of pi-0 or pi-0.5: it",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(
    tmp_path: Path, change: Callable[[Tensors], Tensors], message: str
) -> None:
    saved(tmp_path, change(in_layout(tiny_network(adaptive=False), LAYOUTS["openpi"])))
    with pytest.raises(ValueError, match=message) as refusal:
        load_pi0(tmp_path, TINY)
    assert "\n" not in str(refusal.value)
    assert str(tmp_path / "model.safetensors") in str(refusal.value)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_names_what_is_missing_its_own_way(tmp_path: Path, layout: str) -> None:
    tensors = in_layout(tiny_network(adaptive=False), LAYOUTS[layout])
    key = LAYOUTS[layout].key("vlm.vision_tower.post_layernorm.bias")
    del tensors[key]
    saved(tmp_path, tensors)
    with pytest.raises(ValueError, match=f"{key} is missing; expected the tensors of pi-0"):
        load_pi0(tmp_path, TINY)


def test_a_checkpoint_of_the_other_model_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, in_layout(tiny_network(adaptive=True), LAYOUTS["LeRobot"]))
    with pytest.raises(ValueError, match=r"is missing \(and \d+ more\); expected the tensors of pi-0$"):
        load_pi0(tmp_path, TINY)


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"model.safetensors is missing; expected a checkpoint's weights there"
    ):
        load_pi0(tmp_path, TINY)
    (tmp_path / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        load_pi0(tmp_path, TINY)


STATS = NormStats(
    mean=np.array([0.0, 3.0]), std=np.array([2.0, 0.5]), q01=np.array([-1.0, 2.0]), q99=np.array([3.0, 2.0])
)


def test_quantiles_become_minus_one_and_one_and_nothing_is_clipped() -> None:
    x = np.array([[-1.0, 2.0], [3.0, 2.0], [7.0, 2.0]])
    scaled = normalise(x, STATS, quantile=True)
    np.testing.assert_allclose(scaled, [[-1, -1], [1, -1], [3, -1]], atol=1e-6)
    # The range has 1e-6 added: 4 / (4 + 1e-6) * 2 - 1.
    assert scaled[1, 0] == pytest.approx(1 - 5e-7, abs=1e-12)


def test_pi0_takes_z_scores() -> None:
    scaled = normalise(np.array([4.0, 2.0]), STATS, quantile=False)
    np.testing.assert_allclose(scaled, [4 / (2 + 1e-6), -1 / (0.5 + 1e-6)], rtol=1e-12)


def test_a_vector_shorter_than_the_statistics_takes_the_first() -> None:
    assert normalise(np.array([3.0]), STATS, quantile=True).shape == (1,)
    padded = pad_dims(normalise(np.array([[0.5, 2.5]]), STATS, quantile=False), 32)
    assert padded.shape == (1, 32)
    assert not padded[:, 2:].any()
    with pytest.raises(ValueError, match="3 dimensions, but the statistics have 2"):
        normalise(np.zeros(3), STATS, quantile=True)
    with pytest.raises(ValueError, match="33 dimensions do not fit the model's 32"):
        pad_dims(np.zeros(33), 32)


NUMBERS = st.floats(-100, 100, width=32)
VECTORS = arrays.arrays(np.float64, (4, 3), elements=NUMBERS)


@given(x=VECTORS, low=arrays.arrays(np.float64, 3, elements=NUMBERS), quantile=st.booleans(), data=st.data())
def test_what_openpi_undoes_it_with_undoes_normalise(
    x: np.ndarray, low: np.ndarray, quantile: bool, data: st.DataObject
) -> None:
    spread = data.draw(arrays.arrays(np.float64, 3, elements=st.floats(0, 100)))
    stats = NormStats(mean=low, std=spread, q01=low, q99=low + spread)
    scaled = normalise(x, stats, quantile=quantile)
    # Of the quantiles themselves, as openpi: low + spread - low is the spread but for rounding, which 1e-6 magnifies.
    width = (low + spread) - low + 1e-6 if quantile else spread + 1e-6
    undone = (scaled + 1) / 2 * width + low if quantile else scaled * width + low
    np.testing.assert_allclose(undone, x, atol=1e-9)


def stats_json(**changed: Any) -> dict[str, Any]:
    entry = {"mean": [0.0, 1.0], "std": [1.0, 1.0], "q01": [-1.0, 0.0], "q99": [1.0, 2.0]}
    return {"norm_stats": {"state": entry, "actions": entry | changed}}


@pytest.mark.parametrize("folder", [".", "assets/physical-intelligence/libero"])
def test_statistics_are_found_and_read(tmp_path: Path, folder: str) -> None:
    (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    (tmp_path / folder / "norm_stats.json").write_text(json.dumps(stats_json(q99=[5.0, 2.0])))
    stats = read_norm_stats(tmp_path, quantile=True)
    assert stats["actions"].q99.tolist() == [5.0, 2.0]
    assert stats["state"].mean.tolist() == [0.0, 1.0]


def test_statistics_without_quantiles_do_for_pi0_alone(tmp_path: Path) -> None:
    (tmp_path / "norm_stats.json").write_text(json.dumps(stats_json(q01=None)))
    stats = read_norm_stats(tmp_path / "norm_stats.json", quantile=False)
    with pytest.raises(ValueError, match="the statistics lack q01 and q99"):
        normalise(np.zeros(2), stats["actions"], quantile=True)
    with pytest.raises(ValueError, match=r"norm_stats.json lacks norm_stats.actions.q01$"):
        read_norm_stats(tmp_path, quantile=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"norm_stats.json is not JSON"),
        ("[]", r"norm_stats.json holds a list, expected an object"),
        ('{"norm_stats": {"state": {}}}', r"lacks norm_stats.state.mean"),
        ('{"norm_stats": {"action": {}}}', r"lacks norm_stats.state; it has \['action'\]"),
        (json.dumps(stats_json(std=[1.0])), r"norm_stats.actions.std is \[1.0\], expected 2 finite numbers"),
        (json.dumps(stats_json(q01=["a", "b"])), r"norm_stats.actions.q01 is no list of numbers"),
        (
            json.dumps(stats_json(mean=[float("nan"), 0.0])),
            r"norm_stats.actions.mean is .*, expected 2 finite",
        ),
    ],
)
def test_statistics_that_cannot_be_used_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "norm_stats.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_norm_stats(tmp_path, quantile=True)


def test_no_statistics_or_several_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"has no norm_stats.json, nor have its assets, nor has it LeRobot's"
    ):
        read_norm_stats(tmp_path, quantile=True)
    for name in ("droid", "libero"):
        (tmp_path / "assets" / name).mkdir(parents=True)
        (tmp_path / "assets" / name / "norm_stats.json").write_text("{}")
    with pytest.raises(ValueError, match=r"has 2 of norm_stats.json \(assets/droid, assets/libero\)"):
        read_norm_stats(tmp_path, quantile=True)


@pytest.mark.parametrize(("scaled", "quantile"), [("QUANTILES", True), ("MEAN_STD", False)])
def test_lerobot_s_statistics_are_read_with_their_own_scale(
    tmp_path: Path, scaled: str, quantile: bool
) -> None:
    write_lerobot_stats(tmp_path, scaled=scaled)
    values = np.linspace(-0.5, 0.5, 7)
    for where in (tmp_path, tmp_path / "policy_preprocessor.json"):
        stats = read_norm_stats(where, quantile=True)  # as for pi-0.5, which is scaled by either
        for name, held in published_tiny.STATS.items():
            for key, expected in held.items():
                np.testing.assert_allclose(getattr(stats[name], key), expected, rtol=1e-6)
        plain = replace(stats["actions"], by_quantile=None)
        np.testing.assert_array_equal(
            normalise(values, stats["actions"], quantile=True), normalise(values, plain, quantile=quantile)
        )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"steps": []}', r"names no state_file of one normalizer_processor"),
        ('{"steps": 5}', r"names no state_file of one normalizer_processor"),
        ("[]", r"policy_preprocessor.json holds a list, expected an object"),
        ("{", r"policy_preprocessor.json is not JSON"),
        ("MIN_MAX", r"scales STATE by 'MIN_MAX', expected one of QUANTILES, MEAN_STD; write openpi's"),
        ("no map", r"scales STATE by None, expected one of"),
        ("no tensors", r"which policy_preprocessor.json names, cannot be read"),
        ("no file", r"which policy_preprocessor.json names, cannot be read"),
    ],
)
def test_lerobot_files_that_cannot_be_used_are_refused(tmp_path: Path, content: str, message: str) -> None:
    write_lerobot_stats(tmp_path, scaled=content)
    file, tensors = tmp_path / "policy_preprocessor.json", next(tmp_path.glob("*.safetensors"))
    if content == "no map":
        steps = json.loads(file.read_text())["steps"]
        file.write_text(json.dumps({"steps": [steps[0], steps[1] | {"config": []}]}))
    elif content == "no tensors":
        tensors.write_bytes(b"none")
    elif content == "no file":
        tensors.unlink()
    elif content != "MIN_MAX":
        file.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_norm_stats(tmp_path, quantile=True)
