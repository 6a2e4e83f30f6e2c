"""Golden fixtures with something changed: what must be refused in one line that names the folder, and what must not."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from policies.parity.check import FAMILIES, check_fixture
from policies.parity.fixture import Comparison, Family, Fixture, FixtureError, Outputs, load_fixture
from policies.weights.adapter_files import adapter_from_peft

ROOT = Path(__file__).parents[1]
PARITY = Path(os.environ.get("PAIRLOOM_SHARED", ROOT.parent / "shared")) / "parity"
Tensors = Mapping[str, torch.Tensor]


def golden(
    name: str,
    *,
    settings: Mapping[str, Any] | None = None,
    inputs: Tensors | None = None,
    expected: Tensors | None = None,
) -> Fixture:
    """A fixture with settings replaced, and with inputs and expected tensors added or replaced."""
    if not (PARITY / name).is_dir():
        pytest.skip(f"no golden fixture at {PARITY / name}")
    fixture = load_fixture(PARITY / name)
    return replace(
        fixture,
        config={**fixture.config, **(settings or {})},
        inputs={**fixture.inputs, **(inputs or {})},
        expected={**fixture.expected, **(expected or {})},
    )


def without(tensors: Tensors, *parts: str) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not any(part in name for part in parts)}


def failures(fixture: Fixture) -> list[Comparison]:
    return [result for result in check_fixture(fixture) if not result.passed]


def refused(fixture: Fixture, message: str) -> None:
    with pytest.raises(FixtureError, match=message) as caught:
        failures(fixture)
    assert "\n" not in str(caught.value)
    assert str(fixture.folder) in str(caught.value)


# openpi


def test_sizes_that_openpi_has_no_name_for_are_refused() -> None:
    refused(
        golden("pi05_tiny", settings={"paligemma_variant": "gemma_9b"}),
        "paligemma_variant is 'gemma_9b', expected gemma_2b or gemma_300m or an object with width, depth",
    )
    refused(
        golden("pi05_tiny", settings={"paligemma_variant": {"width": 64}}),
        "paligemma_variant lacks the size 'depth'",
    )
    refused(
        golden("pi05_tiny", settings={"vision_config": None}), "vision_config lacks the size 'hidden_size'"
    )


def test_openpis_names_of_sizes_are_read() -> None:
    one = golden("pi05_tiny", settings={"paligemma_variant": "gemma_2b_lora"})
    refused(one, r"expert\.depth is 3, expected the VLM's 18")
    both = golden(
        "pi05_tiny", settings={"paligemma_variant": "gemma_2b", "action_expert_variant": "gemma_300m"}
    )
    refused(both, r"has shape \[64, 32\], expected \[2048, 32\]")


@pytest.mark.parametrize(
    ("setting", "key", "size", "message"),
    [
        ("vision_config", "patch_size", 0, "vision.patch is 0"),
        ("vision_config", "num_attention_heads", 0, "vision.heads is 0"),
        ("action_expert_variant", "num_kv_heads", 0, "expert.kv_heads is 0"),
        ("paligemma_variant", "num_kv_heads", -1, "vlm.kv_heads is -1"),
        ("paligemma_variant", "depth", "3", "vlm.depth is '3'"),
    ],
)
def test_sizes_of_nothing_are_refused(setting: str, key: str, size: object, message: str) -> None:
    fixture = golden("pi05_tiny")
    fixture.config[setting][key] = size
    refused(fixture, f"{message}, expected a whole number of 1 or more")


def test_a_vocabulary_beyond_every_integer_is_refused_without_a_stack() -> None:
    with pytest.raises(FixtureError, match="do not fit the family 'openpi'") as caught:
        failures(golden("pi05_tiny", settings={"vocab_size": 10**30}))
    assert "Overflow" in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_prompt_outside_the_vocabulary_is_refused() -> None:
    fixture = golden("pi05_tiny")
    fixture.inputs["tokenized_prompt"][0, 0] = 9999
    refused(fixture, r"tokenized_prompt holds the token 9999, expected 0 \.\. 511")


def test_what_nobody_foresaw_is_refused_with_its_kind() -> None:
    refused(golden("pi05_tiny", settings={"image_keys": None}), "do not fit the family 'openpi': TypeError: ")
    cut = {"actions": torch.zeros(3, 8, 32)}
    refused(golden("pi05_tiny", inputs=cut), "do not fit the family 'openpi': RuntimeError: ")


def test_pi05_needs_no_state_and_pi0_does() -> None:
    pi05, pi0 = golden("pi05_tiny"), golden("pi0_tiny")
    assert failures(replace(pi05, inputs=without(pi05.inputs, "state"))) == []
    refused(replace(pi0, inputs=without(pi0.inputs, "state")), "lacks the tensor 'state'")


def test_a_chunk_of_any_number_of_steps_counts_as_sampled() -> None:
    fixture = golden("pi05_tiny")
    four_steps = fixture.expected["sample_actions_4steps"]
    fixture = replace(fixture, expected=without(fixture.expected, "sample_"))
    assert [failure.name for failure in failures(fixture)] == ["sample_actions*"]
    fixture.expected["sample_actions_4steps"] = four_steps
    assert failures(fixture) == []


# OpenVLA


def test_an_example_that_there_is_not_is_refused() -> None:
    fixture = golden("openvla_tiny", expected={"action_logits_ex9_full_vocab": torch.zeros(7, 32064)})
    refused(fixture, r"action_logits_ex9_full_vocab is of example 9, inputs\.safetensors has 3")


def test_texts_that_are_not_padded_on_the_right_are_refused() -> None:
    fixture = golden("openvla_tiny")
    mask = fixture.inputs["attention_mask"]
    for other in (mask.flip(1), torch.cat([mask[:, :1], 1 - mask[:, 1:2], mask[:, 2:]], dim=1)):
        refused(replace(fixture, inputs={**fixture.inputs, "attention_mask": other}), "padded on the right")
    left = fixture.inputs["tf_attention_mask"].flip(1)
    refused(replace(fixture, inputs={**fixture.inputs, "tf_attention_mask": left}), "tf_attention_mask is")


def test_openvlas_inputs_that_do_not_fit_are_refused() -> None:
    fixture = golden("openvla_tiny")
    pixels, ids = fixture.inputs["pixel_values"], fixture.inputs["input_ids"]

    def changed(**inputs: torch.Tensor) -> Fixture:
        return replace(fixture, inputs={**fixture.inputs, **inputs})

    refused(changed(pixel_values=pixels[:, :5]), r"pixels have shape \[3, 5, 42, 42\]")
    refused(changed(pixel_values=pixels[:2]), "expected one shape with the 2 rows of pixel_values")
    refused(changed(input_ids=torch.full_like(ids, 99999)), "input_ids holds the token 99999")
    refused(
        replace(fixture, weights={**fixture.weights, "projector.fc1.bias": torch.full((320,), torch.nan)}),
        r"openvla_tiny: projector\.fc1\.bias has 320 non-finite values",
    )


def test_openvlas_statistics_may_lie_in_its_own_config() -> None:
    fixture = golden("openvla_tiny")
    statistics = fixture.config.pop("norm_stats")
    fixture.inputs.pop("prompt_len")
    assert failures(fixture) == []
    fixture.config["official_hf_config"].pop("norm_stats")
    refused(fixture, "lacks 'norm_stats', there and in 'official_hf_config'")
    fixture.config["norm_stats"] = statistics
    fixture.expected.pop("greedy_actions_demo_masked")
    assert [failure.name for failure in failures(fixture)] == ["greedy_actions_demo_masked"]
    statistics.pop("demo_masked")
    assert failures(fixture) == []


# Flow


def stepped(**changes: torch.Tensor) -> Fixture:
    """One step of the stochastic sampler, whose mean is half the sample."""
    inputs = {
        "step_index": torch.tensor([0]),
        "sample": torch.tensor([[2.0, -4.0]]),
        "velocity": torch.zeros(1, 2),
        "prev_sample": torch.tensor([[1.0, -2.0]]),
        "variance_noise": torch.ones(1, 2),
    }
    return Fixture(
        folder=Path("steps"),
        config={"family": "flow_sde", "cases": [{"num_steps": 2, "noise_level": 1.0}]},
        weights={},
        inputs={f"case0/{name}": tensor for name, tensor in {**inputs, **changes}.items()},
        expected={
            "case0/mean": torch.tensor([[1.0, -2.0]]),
            "case0/given_prev_logprob": torch.tensor([-0.9189385]),
        },
    )


def test_a_case_may_have_inputs_of_its_own() -> None:
    assert failures(stepped()) == []
    fixture = stepped()
    fixture.inputs["velocity"] = torch.full((1, 2), 9.0)
    assert failures(fixture) == []


def test_steps_that_cannot_be_taken_are_refused() -> None:
    none = replace(stepped(), config={"family": "flow_sde", "cases": [{"num_steps": 0, "noise_level": 1.0}]})
    refused(none, "steps: a sampler needs at least one step, got 0")
    refused(replace(none, config={"family": "flow_sde", "cases": {"a": 1}}), "expected a list of objects")
    refused(stepped(velocity=torch.zeros(2, 2)), r"must share one shape .*\[1, 2\], \[2, 2\]")
    refused(stepped(step_index=torch.tensor([0, 0])), r"first axis is step_index's, got .* and \[2\]")


# Preferences


def test_masks_of_integers_are_read_and_of_another_shape_refused() -> None:
    fixture = golden("dpo")
    masks = {name: mask.long() for name, mask in fixture.inputs.items() if name.endswith("token_mask")}
    assert len(masks) == 2
    assert failures(replace(fixture, inputs={**fixture.inputs, **masks})) == []
    cut = {"chosen_token_mask": masks["chosen_token_mask"][:, :4]}
    refused(
        replace(fixture, inputs={**fixture.inputs, **cut}),
        r"chosen_token_mask has shape \[12, 4\], expected that of policy_chosen_token_logps, \[12, 9\]",
    )


@pytest.mark.parametrize("beta", ["0", "-0.1", "nan", "inf"])
def test_a_beta_that_is_none_is_refused(beta: str) -> None:
    name = f"trl1.16.0/ipo/beta{beta}/ls0.0/losses"
    refused(
        golden("dpo", expected={name: torch.zeros(12)}), f"beta is {beta} in {name}, expected a finite number"
    )


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("trl0.19.1/sigmoid/beta0.5/ls0.0/chosen_rewards", 1e-2),
        ("trl1.16.0/beta0.5/per_pair_rewards/rejected", 1e-2),
        ("trl1.16.0/beta0.1/metric/logps/chosen", 1e-2),
        ("trl1.16.0/sigmoid/beta0.5/ls0.0/grad_policy_token_logps", 2e-4),
        ("flow_grpo_dpo/theta_mse", 2e-4),
        ("flow_grpo_dpo/beta5000/inside_term", 0.2),
        ("trl1.16.0/sigmoid/beta0.1/ls0.0/mean_loss", 2e-2),
    ],
)
def test_what_is_no_large_loss_is_compared_closely(name: str, change: float) -> None:
    fixture = golden("dpo")
    fixture.expected[name] = fixture.expected[name] + change
    assert [failure.name for failure in failures(fixture)] == [name]


def test_rewards_go_by_either_name_and_conservative_losses_are_required() -> None:
    fixture = golden("dpo")
    of_trl_1 = without(fixture.expected, "trl0")
    assert [failure.name for failure in failures(replace(fixture, expected=of_trl_1))] == [
        "trl0*/sigmoid/*/ls*[1-9]*/losses"
    ]
    bare = without(of_trl_1, "rewards")
    missing = [failure.name for failure in failures(replace(fixture, expected=bare))]
    assert missing[1:] == [
        "*/chosen_rewards or */per_pair_rewards/chosen",
        "*/rejected_rewards or */per_pair_rewards/rejected",
    ]


# Adapters


def test_adapters_need_neither_labels_nor_a_loss() -> None:
    fixture = golden("dora_merge")
    expected = without(fixture.expected, "/loss", "/grad/")
    assert failures(replace(fixture, expected=expected)) == []
    fixture = replace(fixture, inputs=without(fixture.inputs, "labels"), expected=expected)
    results = list(check_fixture(fixture))
    assert [result for result in results if not result.passed] == []
    assert {result.name for result in results} == set(expected)


def test_adapters_that_cannot_be_read_are_refused() -> None:
    refused(
        golden("dora_merge", settings={"adapters": ["dora"]}), r"adapters are \['dora'\], expected an object"
    )
    refused(
        golden("dora_merge", settings={"adapters": {"lora": {"r": 0, "lora_alpha": 8}}}),
        "adapter 'lora': the adapter's r is 0, expected a whole number of 1 or more",
    )


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("r", "four", "the adapter's r is 'four', expected a whole number of 1 or more"),
        ("lora_alpha", "8", "the adapter's lora_alpha is '8', expected a number"),
        (
            "target_modules",
            ".*_proj",
            r"target_modules is '\.\*_proj', expected 'all-linear' or a list of some of q_proj",
        ),
        ("target_modules", 7, "target_modules is 7, expected 'all-linear'"),
    ],
)
def test_a_setting_of_an_adapter_that_cannot_be_met_is_named(key: str, value: object, message: str) -> None:
    fixture = golden("dora_merge")
    fixture.config["adapters"]["dora"][key] = value
    refused(fixture, f"adapter 'dora': {message}")


def test_all_linears_are_those_of_a_layer() -> None:
    fixture = golden("dora_merge")
    for adapter in fixture.config["adapters"].values():
        adapter["target_modules"] = "all-linear"
    assert failures(fixture) == []


@pytest.mark.parametrize("key", ["num_attention_heads", "num_key_value_heads"])
def test_a_decoder_without_heads_is_refused(key: str) -> None:
    fixture = golden("dora_merge")
    fixture.config["llama_config"][key] = 0
    refused(fixture, rf"llama_config\.{key} is 0, expected a whole number of 1 or more")


@pytest.mark.parametrize("error", [ZeroDivisionError, MemoryError, AssertionError])
def test_whatever_breaks_is_one_line(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(fixture: Fixture) -> Outputs:
        raise error("first\nsecond")

    monkeypatch.setitem(FAMILIES, "flow_sde", Family(compute=broken))
    refused(stepped(), f"steps: .* do not fit the family 'flow_sde': {error.__name__}: first second")


@pytest.mark.parametrize("pattern", ["rank_pattern", "alpha_pattern"])
def test_an_adapter_of_several_ranks_or_alphas_is_refused(pattern: str) -> None:
    settings = {"r": 4, "lora_alpha": 8, pattern: {}}
    part, _ = adapter_from_peft({}, settings)
    assert (part.rank, part.alpha) == (4, 8)
    with pytest.raises(ValueError, match=f"the adapter's {pattern} is {{'q_proj': 8}}; expected none"):
        adapter_from_peft({}, {**settings, pattern: {"q_proj": 8}})
