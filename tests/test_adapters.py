"""Adapters and their merge, against peft itself and against recorded peft values."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.numpy import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from configs.preference import AdapterPart
from policies.weights import adapters, merging
from policies.weights.adapter_files import adapter_from_peft
from policies.weights.snapshots import state_tensors, to_array
from trajectories.records import AdapterWeights

SHARED = Path(os.environ.get("PAIRLOOM_SHARED", Path(__file__).parents[1].parent / "shared"))
FIXTURE = SHARED / "parity" / "dora_merge"
TOKENS = torch.tensor([[3, 14, 15, 92, 65, 35, 89], [27, 18, 28, 18, 28, 45, 90]])
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
METHODS = pytest.mark.parametrize("method", ["lora", "dora"])


def tiny_llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=56,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=101,
        attention_bias=True,
    )
    return LlamaForCausalLM(config).eval()


def arrays(model: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: parameter.detach().numpy().copy() for name, parameter in model.named_parameters()}


def logits(model: LlamaForCausalLM) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def trained(
    method: str, dtype: torch.dtype = torch.float32
) -> tuple[LlamaForCausalLM, dict[str, np.ndarray]]:
    """A model with a non-trivial adapter, and its base arrays."""
    model = tiny_llama().to(dtype)
    base = state_tensors(model)
    adapters.attach(model, AdapterPart(method=method, rank=4, alpha=8), seed=0, decoders=["model"])
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapters.parameters(model).values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model, base


@METHODS
def test_a_new_adapter_changes_nothing_and_trains_only_itself(method: str) -> None:
    model = tiny_llama()
    before = logits(model)
    adapters.attach(model, AdapterPart(method=method, rank=4, alpha=8), seed=0, decoders=["model"])
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-6)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(names) == 14 * (3 if method == "dora" else 2)
    assert all("lora_" in name for name in names)


@METHODS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_new_adapter_merges_to_the_very_bits_of_its_base(method: str, dtype: torch.dtype) -> None:
    model = tiny_llama().to(dtype)
    base = state_tensors(model)
    adapters.attach(model, AdapterPart(method=method, rank=4, alpha=8), seed=0, decoders=["model"])
    merged = merging.merge(base, adapters.extract(model, base_hash=""))
    layers = dict(adapters.adapted_layers(model))
    assert len(layers) == 14
    with adapters.merged_forward(model):
        forward = {name: to_array(layer.get_base_layer().weight) for name, layer in layers.items()}
    for name in layers:
        np.testing.assert_array_equal(merged[f"{name}.weight"], base[f"{name}.weight"], err_msg=name)
        np.testing.assert_array_equal(forward[name], base[f"{name}.weight"], err_msg=name)


def test_the_seed_fixes_the_adapter_and_leaves_the_global_generator_alone() -> None:
    first, second, other = tiny_llama(), tiny_llama(), tiny_llama()
    state = torch.get_rng_state()
    for model, seed in ((first, 7), (second, 7), (other, 8)):
        adapters.attach(model, AdapterPart(rank=4), seed=seed, decoders=["model"])
    assert torch.equal(torch.get_rng_state(), state)
    layer = "model.layers.0.self_attn.q_proj"
    factor = [adapters.extract(m, base_hash="").factors[layer]["A"] for m in (first, second, other)]
    assert np.array_equal(factor[0], factor[1])
    assert not np.array_equal(factor[0], factor[2])


@METHODS
def test_merge_equals_peft(method: str) -> None:
    base = arrays(tiny_llama())
    config = LoraConfig(r=4, lora_alpha=8, use_dora=method == "dora", target_modules=TARGETS)
    wrapped = get_peft_model(tiny_llama(), config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    adapter = adapters.extract(wrapped.base_model.model, base_hash="")
    merged = merging.merge(base, adapter)
    want = arrays(wrapped.merge_and_unload(safe_merge=True))
    assert set(merged) == set(want)
    for name, array in merged.items():
        np.testing.assert_allclose(array, want[name], rtol=0, atol=1e-6, err_msg=name)
    changed = {name for name in base if not np.array_equal(merged[name], base[name])}
    assert changed == {f"{layer}.weight" for layer in adapter.factors}


@METHODS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_in_it_is_gone_and_the_network_computes_what_both_did(method: str, dtype: torch.dtype) -> None:
    model, base = trained(method, dtype)
    names = [name for name, _ in tiny_llama().named_parameters()]
    want, expected = logits(model), merging.merge(base, adapters.extract(model, base_hash=""))
    drift = adapters.merge_in(model)
    assert [name for name, _ in model.named_parameters()] == names
    assert not list(adapters.adapted_layers(model))
    for name, array in state_tensors(model).items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)
    resolution = 1e-6 if dtype == torch.float32 else 4e-3
    assert 0 < drift < resolution
    torch.testing.assert_close(logits(model), want, rtol=0, atol=10 * resolution * want.abs().max().item())
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # peft's, of an adapter beside another
        adapters.attach(model, AdapterPart(method="dora", rank=2), seed=0, decoders=["model"])
    assert len(list(adapters.adapted_layers(model))) == 14


def test_an_adapter_that_is_not_finite_is_not_merged_in() -> None:
    model, _ = trained("lora")
    with torch.no_grad():
        adapters.parameters(model)["model.layers.1.mlp.up_proj.B"][0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"factor B of model.layers.1.mlp.up_proj is not finite"):
        adapters.merge_in(model)


def test_some_linears_may_be_left_alone() -> None:
    model = tiny_llama()
    adapters.attach(model, AdapterPart(rank=2), seed=0, decoders=["model"], linears=["q_proj", "v_proj"])
    layers = {name.rpartition(".")[2] for name, _ in adapters.adapted_layers(model)}
    assert layers == {"q_proj", "v_proj"}
    with pytest.raises(ValueError, match=r"must be some of q_proj, .* got \['qproj'\]"):
        adapters.attach(tiny_llama(), AdapterPart(rank=2), seed=0, decoders=["model"], linears=["qproj"])


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"use_dora": True, "use_rslora": True}])
def test_an_adapter_that_peft_saved_is_read_and_answers_alike(settings: dict, tmp_path: Path) -> None:
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["k_proj", "down_proj"], **settings)
    wrapped = get_peft_model(tiny_llama(), config).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    wrapped.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    part, weights = adapter_from_peft(load_file(tmp_path / "adapter_model.safetensors"), saved)
    model = tiny_llama()
    adapters.attach(model, part, seed=0, decoders=["model"], linears=saved["target_modules"])
    adapters.load(model, weights)
    torch.testing.assert_close(logits(model), logits(wrapped), rtol=0, atol=1e-6)


def test_a_tensor_that_is_no_factor_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"lm_head\.weight is not a factor"):
        adapter_from_peft({"lm_head.weight": np.zeros((1, 1))}, {"r": 1, "lora_alpha": 1})
    with pytest.raises(ValueError, match="lack 'lora_alpha'"):
        adapter_from_peft({}, {"r": 1})


@pytest.mark.parametrize("name", ["lora", "dora", "dora_rslora"])
def test_merge_equals_recorded_values(name: str) -> None:
    if not FIXTURE.is_dir():
        pytest.skip("recorded values are not on this machine")
    base = load_file(FIXTURE / "weights.safetensors")
    saved = load_file(FIXTURE / "adapters.safetensors")
    expected = load_file(FIXTURE / "expected.safetensors")
    settings = json.loads((FIXTURE / "config.json").read_text())["adapters"][name]
    root = settings["r"] ** (0.5 if settings.get("use_rslora") else 1)
    parts = {"lora_A.weight": "A", "lora_B.weight": "B", "lora_magnitude_vector": "m"}
    factors: dict[str, dict[str, np.ndarray]] = {}
    for key, array in saved.items():
        if key.startswith(f"{name}/base_model.model."):
            layer, _, part = key.removeprefix(f"{name}/base_model.model.").partition(".lora_")
            factors.setdefault(layer, {})[parts[f"lora_{part}"]] = array
    adapter = AdapterWeights(
        method="lora" if name == "lora" else "dora",
        scaling=settings["lora_alpha"] / root,
        base_hash="",
        factors=factors,
    )
    merged = merging.merge(base, adapter)
    assert len(factors) == 14
    for layer in factors:
        want = expected[f"{name}/merged/{layer}.weight"]
        np.testing.assert_allclose(merged[f"{layer}.weight"], want, rtol=0, atol=1e-6, err_msg=layer)


@METHODS
def test_the_merged_model_answers_as_the_adapted_one(method: str) -> None:
    model, base = trained(method)
    adapted = logits(model)
    merged = merging.merge(base, adapters.extract(model, base_hash=""))
    served = tiny_llama(seed=5)
    served.load_state_dict({name: torch.from_numpy(array) for name, array in merged.items()}, strict=False)
    torch.testing.assert_close(logits(served), adapted, rtol=0, atol=1e-5)
    with adapters.disabled(model):
        off = logits(model)
    assert torch.equal(off, logits(tiny_llama()))
    assert (off - adapted).abs().max() > 1e-2
    assert torch.equal(logits(model), adapted)


@METHODS
def test_the_merged_forward_gives_peft_s_outputs_and_gradients(method: str) -> None:
    model, _ = trained(method)
    weights = [layer.get_base_layer().weight for _, layer in adapters.adapted_layers(model)]
    by_peft = model(TOKENS).logits
    by_peft.square().mean().backward()
    parameters = adapters.parameters(model)
    want = {name: parameter.grad.clone() for name, parameter in parameters.items()}
    model.zero_grad()
    with adapters.merged_forward(model):
        by_merging = model(TOKENS).logits
        # Two micro-batches' worth: gradients add up.
        (0.25 * model(TOKENS).logits.square().mean()).backward()
        (0.75 * by_merging.square().mean()).backward()
    torch.testing.assert_close(by_merging, by_peft, rtol=0, atol=1e-5)
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter.grad, want[name], rtol=1e-3, atol=1e-6, msg=name)
        assert parameter.requires_grad
    after = [layer.get_base_layer().weight for _, layer in adapters.adapted_layers(model)]
    assert all(a is b for a, b in zip(after, weights, strict=True))
    assert all(weight.grad is None for weight in weights)


@METHODS
def test_shards_merge_only_their_own_and_leave_the_base_alone(method: str) -> None:
    model, base = trained(method)
    adapter = adapters.extract(model, base_hash="")
    whole = merging.merge(base, adapter)
    pristine = {name: array.copy() for name, array in base.items()}
    names = sorted(base)
    shards = [merging.merge({name: base[name] for name in names[start::2]}, adapter) for start in (0, 1)]
    assert sorted([*shards[0], *shards[1]]) == names
    for name in names:
        assert np.array_equal((shards[0] | shards[1])[name], whole[name])
        assert np.array_equal(base[name], pristine[name])


def test_half_precision_weights_are_merged_in_fp32_and_rounded_once() -> None:
    rng = np.random.default_rng(0)
    base = rng.standard_normal((8, 6)).astype(np.float16)
    factors = {
        "A": rng.standard_normal((2, 6)).astype(np.float32),
        "B": rng.standard_normal((8, 2)).astype(np.float32),
        "m": rng.uniform(1, 2, 8).astype(np.float32),
    }
    merged = merging.merge_tensor("w", base, factors, scaling=0.5)
    exact = base.astype(np.float64) + 0.5 * factors["B"].astype(np.float64) @ factors["A"]
    exact *= (factors["m"] / np.linalg.norm(exact, axis=1))[:, None]
    assert merged.dtype == np.float16
    assert (np.abs(merged - exact) <= np.spacing(np.abs(merged))).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e38])
def test_a_non_finite_merge_is_refused_by_name(value: float) -> None:
    model, base = trained("lora")
    adapter = adapters.extract(model, base_hash="")
    layer = "model.layers.1.mlp.up_proj"
    adapter.factors[layer]["B"][3, 1] = value
    adapter.factors[layer]["A"][1, 0] = 100.0
    with pytest.raises(ValueError, match=r"non-finite .* in model\.layers\.1\.mlp\.up_proj\.weight"):
        merging.merge(base, adapter)


def test_a_dora_row_of_zeros_is_refused() -> None:
    factors = {
        "A": np.zeros((1, 3), np.float32),
        "B": np.zeros((2, 1), np.float32),
        "m": np.ones(2, np.float32),
    }
    with pytest.raises(ValueError, match="non-finite of 6 values in w"):
        merging.merge_tensor("w", np.zeros((2, 3), np.float32), factors, scaling=1.0)


def test_a_damaged_adapter_is_not_extracted() -> None:
    model, _ = trained("dora")
    with torch.no_grad():
        adapters.parameters(model)["model.layers.0.self_attn.q_proj.A"][0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"factor A of model\.layers\.0\.self_attn\.q_proj is not finite"):
        adapters.extract(model, base_hash="")


@METHODS
def test_factors_survive_a_round_trip(method: str) -> None:
    model, _ = trained(method)
    adapter = adapters.extract(model, base_hash="abc")
    assert adapter.scaling == 2.0
    assert adapter.method == method
    other = tiny_llama()
    adapters.attach(other, AdapterPart(method=method, rank=4, alpha=8), seed=3, decoders=["model"])
    adapters.load(other, adapter)
    assert torch.equal(logits(other), logits(model))


def test_an_adapter_of_another_shape_is_refused_and_nothing_is_copied() -> None:
    model, _ = trained("lora")
    other = tiny_llama()
    adapters.attach(other, AdapterPart(method="lora", rank=2, alpha=4), seed=3, decoders=["model"])
    before = adapters.extract(other, base_hash="")
    with pytest.raises(ValueError, match=r"expected .*\(2, 32\)"):
        adapters.load(other, adapters.extract(model, base_hash=""))
    after = adapters.extract(other, base_hash="")
    for layer, factors in before.factors.items():
        assert np.array_equal(after.factors[layer]["A"], factors["A"])


def test_a_network_without_the_named_decoder_is_refused() -> None:
    with pytest.raises(ValueError, match="transformer"):
        adapters.attach(tiny_llama(), AdapterPart(rank=2), seed=0, decoders=["transformer"])


def test_factors_that_do_not_fit_the_base_are_refused() -> None:
    factors = {"A": np.zeros((2, 5), np.float32), "B": np.zeros((4, 2), np.float32)}
    with pytest.raises(ValueError, match=r"cannot merge into w: base \(4, 6\)"):
        merging.merge_tensor("w", np.zeros((4, 6), np.float32), factors, scaling=1.0)
