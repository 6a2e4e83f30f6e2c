"""Fixtures of transformers' own pi-0, recorded here from the class itself at a tiny size with random weights."""

from __future__ import annotations

import functools
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import PI0Config, PI0ForConditionalGeneration
from typer.testing import CliRunner

import launch
from policies.parity.check import check_fixture
from policies.parity.fixture import Fixture, FixtureError, load_fixture
from policies.pi0.network import Pi0Network
from policies.pi0.sizes import PI05, config_of_transformers
from tests.pi0_tiny import TINY, tiny_batch

IMAGE, VOCABULARY, HORIZON, ACTIONS, STATES = 50, 48, 4, 5, 6
IMAGE_TOKENS = 4


def gemma(*, width: int, mlp: int) -> dict[str, object]:
    return {
        "model_type": "gemma",
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": VOCABULARY,
    }


@functools.cache
def official(image: int = 28, reduction: str = "none") -> PI0ForConditionalGeneration:
    config = PI0Config(
        vlm_config={
            "model_type": "paligemma",
            "text_config": gemma(width=24, mlp=40),
            "vision_config": {
                "model_type": "siglip_vision_model",
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": image,
                "patch_size": 14,
                "vision_use_head": False,
            },
            "projection_dim": 24,
            "hidden_size": 24,
            "image_token_index": IMAGE,
        },
        dit_config=gemma(width=16, mlp=24),
        chunk_size=HORIZON,
        max_state_dim=STATES,
        max_action_dim=ACTIONS,
        num_inference_steps=7,
        loss_reduction=reduction,
    )
    torch.manual_seed(11)
    network = PI0ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.2 if "norm" in name else 0.3))
    return network


def inputs(image: int = 28) -> dict[str, torch.Tensor]:
    """Two observations: of three cameras and a short prompt, of two and a long one. Image tokens lie in front of the
    text and padding behind it, as transformers' processor puts them."""
    draw = torch.Generator().manual_seed(12)
    cameras = torch.tensor([[True, True, True], [True, True, False]])
    rows = []
    for images, text in ((3, 4), (2, 9)):
        words = torch.randint(1, VOCABULARY, (text,), generator=draw)
        rows.append(torch.cat([torch.full((images * IMAGE_TOKENS,), IMAGE), words]))
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return {
        "input_ids": ids,
        "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long(),
        "pixel_values": torch.rand(2, 3, 3, image, image, generator=draw) * 2 - 1,
        "pixel_attention_mask": cameras,
        "state": torch.randn(2, STATES, generator=draw),
        "noise": torch.randn(2, HORIZON, ACTIONS, generator=draw),
        "timestep": torch.rand(2, generator=draw),
    }


def record(
    folder: Path,
    *,
    actions: bool = False,
    samples: dict[str, int] | None = None,
    under: str = "",
    image: int = 28,
    reduction: str = "none",
) -> Path:
    """A fixture of `forward`, with the loss where there are `actions`, and of `sample_actions` by name and steps."""
    network, given = official(image, reduction), inputs(image)
    if actions:
        given["actions"] = torch.randn(given["noise"].shape, generator=torch.Generator().manual_seed(13))
    network.zero_grad()
    output = network(**given)
    expected = {"logits": output.logits}
    if actions:
        expected["loss"] = output.loss
        output.loss.mean().backward()
        for key in ("action_out_proj.bias", "model.dit.layers.1.mlp.down_proj.weight"):
            expected[f"grad.{key}"] = network.get_parameter(key).grad
    arguments = {key: given[key] for key in given if key not in ("actions", "timestep")}
    for name, steps in (samples or {}).items():
        expected[name] = network.sample_actions(**arguments, num_steps=steps)
    settings = json.loads(network.config.to_json_string(use_diff=False))
    family = {"family": "pi0_transformers"}
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps(family | ({under: settings} if under else settings), default=str)
    )
    save_file({k: t.contiguous() for k, t in network.state_dict().items()}, folder / "weights.safetensors")
    save_file(given, folder / "inputs.safetensors")
    save_file({k: t.detach().clone() for k, t in expected.items()}, folder / "expected.safetensors")
    return folder


def check(fixture: Fixture) -> dict[str, tuple[bool, float]]:
    return {result.name: (result.passed, result.difference) for result in check_fixture(fixture)}


def test_the_official_class_comes_out(tmp_path: Path) -> None:
    samples = {"sample_actions": 7, "sample_actions_10steps": 10, "sampled_actions_3_steps": 3}
    fixture = load_fixture(record(tmp_path / "one", actions=True, samples=samples))
    results = check(fixture)
    assert set(results) == set(fixture.expected)
    assert all(passed for passed, _ in results.values())
    # What tells openpi's float64 embedding of flow time apart.
    assert max(results[name][1] for name in ("logits", "sample_actions", "sample_actions_10steps")) < 5e-6


def test_the_verb_reads_it(tmp_path: Path) -> None:
    folder = record(tmp_path / "one", under="hf_config", samples={"sample_actions": 7})
    done = CliRunner().invoke(launch.app, ["parity", str(folder)])
    assert done.exit_code == 0
    lines = done.output.splitlines()
    assert lines[0] == f"{folder} (pi0_transformers): 2 of 2 expected tensors"
    assert lines[-1] == "parity: 2 tensors compared, 0 failed"


def test_a_velocity_is_that_of_the_noisy_chunk_where_there_are_no_actions(tmp_path: Path) -> None:
    folder = record(tmp_path / "one", under="pi0_config", samples={"sampled_actions": 7})
    fixture = load_fixture(folder)
    assert check(fixture)["logits"][0]
    assert check(fixture)["sampled_actions"][0]
    fixture.inputs["actions"] = torch.zeros_like(fixture.inputs["noise"])
    assert check(fixture)["logits"][0]
    fixture.inputs["x_t"], fixture.inputs["t"] = fixture.inputs["noise"], fixture.inputs["timestep"]
    fixture.expected["v_t"] = fixture.expected["logits"]
    assert check(fixture)["v_t"][0]
    fixture.inputs["x_t"] = fixture.inputs["x_t"] + 1
    assert not check(fixture)["v_t"][0]


def test_openpis_names_of_the_inputs_are_read(tmp_path: Path) -> None:
    fixture = load_fixture(record(tmp_path / "one", samples={"sample_actions": 7}))
    given = fixture.inputs
    texts = [
        row[mask.bool()]
        for row, mask in zip(given.pop("input_ids"), given.pop("attention_mask"), strict=True)
    ]
    texts = [text[text != IMAGE] for text in texts]
    given["tokenized_prompt"] = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
    given["tokenized_prompt_mask"] = torch.arange(9) < torch.tensor([[4], [9]])
    pixels, cameras = given.pop("pixel_values"), given.pop("pixel_attention_mask")
    for i, camera in enumerate(("front", "left", "right")):
        given[f"image.{camera}"], given[f"image_mask.{camera}"] = pixels[:, i], cameras[:, i]
    given["sample_noise"], given["x_t"] = given["noise"], given.pop("noise")
    given["t"] = given.pop("timestep")
    fixture.config["image_keys"] = ["front", "left", "right"]
    assert all(passed for passed, _ in check(fixture).values())
    fixture.config["image_keys"] = ["left", "front", "right"]
    assert not any(passed for passed, _ in check(fixture).values())


def test_a_mean_of_the_loss_is_read(tmp_path: Path) -> None:
    fixture = load_fixture(record(tmp_path / "one", actions=True))
    fixture.expected["loss"] = fixture.expected["loss"].mean()
    assert check(fixture)["loss"][0]


def test_gradients_are_of_the_loss_as_it_is_reduced(tmp_path: Path) -> None:
    results = check(load_fixture(record(tmp_path / "one", actions=True, reduction="sum")))
    assert len([name for name in results if name.startswith("grad.")]) == 2
    assert all(passed for passed, _ in results.values())


def test_pixels_beyond_the_last_whole_patch_are_seen_by_none(tmp_path: Path) -> None:
    fixture = load_fixture(record(tmp_path / "one", actions=True, samples={"sample_actions": 7}, image=30))
    assert fixture.inputs["pixel_values"].shape[-1] == 30
    results = check(fixture)
    assert set(results) == set(fixture.expected)
    assert all(passed for passed, _ in results.values())


@pytest.mark.parametrize("steps", ["10", 0])
def test_a_number_of_steps_that_is_none_is_refused(tmp_path: Path, steps: object) -> None:
    fixture = load_fixture(record(tmp_path / "one", samples={"sample_actions": 7}))
    fixture.config["num_steps"] = steps
    with pytest.raises(FixtureError, match=f"num_steps is {steps!r}, expected a whole number of 1 or more"):
        check(fixture)


def test_what_is_no_fixture_of_it_is_refused_in_one_line(tmp_path: Path) -> None:
    fixture = load_fixture(record(tmp_path / "one"))

    def refused(message: str, **changes: object) -> None:
        with pytest.raises(FixtureError, match=message) as caught:
            check(replace(fixture, **changes))
        assert "\n" not in str(caught.value)
        assert str(fixture.folder) in str(caught.value)

    refused("no PI0Config", config={"family": "pi0_transformers"})
    refused("max_period is 8.0, expected pi-0's 4.0", config={**fixture.config, "max_period": 8.0})
    refused("chunk_size", config={**fixture.config, "chunk_size": "four"})
    refused("no velocity, loss or sampled chunk of a known name", expected={"other": torch.zeros(1)})
    without_mask = {name: t for name, t in fixture.inputs.items() if name != "attention_mask"}
    refused("lacks the tensor 'attention_mask'", inputs=without_mask)
    cameras = torch.ones(2, 3, dtype=torch.bool)
    refused(
        "row 1 of input_ids has 8 image tokens 50, expected 12",
        inputs={**fixture.inputs, "pixel_attention_mask": cameras},
    )
    ids = fixture.inputs["input_ids"].flip(1)
    refused(
        "image tokens 50, expected 12 of them .* before its text",
        inputs={**fixture.inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)},
    )
    ids = fixture.inputs["input_ids"].clone()
    ids[1, -1] = 49
    refused(r"input_ids holds the token 49, expected 0 \.\. 47", inputs={**fixture.inputs, "input_ids": ids})


def test_time_is_embedded_and_stepped_as_transformers_does() -> None:
    config = config_of_transformers(official().config)
    assert config.time == "transformers"
    network = Pi0Network(replace(TINY, time="transformers"))
    t = torch.tensor([0.3, 0.9])
    assert network.embed_time(t).dtype == torch.float32
    exact = Pi0Network(TINY).embed_time(t)
    assert 1e-6 < (network.embed_time(t) - exact).abs().max() < 1e-3
    batch = tiny_batch(1)
    with torch.no_grad():
        cache = network.encode_prefix(batch.prefix(network))
        times = [step.t.item() for step in network.integrate(cache, batch.x, 10, batch.state)]
    assert times[8] == torch.tensor(0.2).item()
    with pytest.raises(ValueError, match=re.escape("time is 'transformers', expected 'openpi'")):
        replace(PI05, time="transformers")
