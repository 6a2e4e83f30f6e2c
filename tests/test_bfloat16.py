"""bfloat16 weights: their bits in NumPy, through checkpoints, snapshots, hashes, adapters and merges."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn

from configs.preference import AdapterPart
from learners.checkpoint import CheckpointReader, load_checkpoint, save_checkpoint
from policies.weights import adapters
from policies.weights.merging import DRIFT_LIMIT, drift, merge
from policies.weights.snapshots import load_snapshot, state_tensors, to_array, to_tensor
from trajectories.bfloat16 import BFLOAT16, is_finite, narrow, widen
from trajectories.hashing import tensor_hash
from trajectories.records import AdapterWeights, WeightSnapshot

LAYER = "decoder.layers.0.self_attn.q_proj"


class Toy(nn.Module):
    """One linear where an adapter looks for it, without biases."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        layer = nn.Module()
        layer.self_attn = nn.Module()
        layer.self_attn.q_proj = nn.Linear(48, 32, bias=False)
        self.decoder = nn.Module()
        self.decoder.layers = nn.ModuleList([layer])
        self.to(dtype)

    @property
    def linear(self) -> nn.Module:
        return self.get_submodule(LAYER)


def snapshot(tensors: dict[str, np.ndarray]) -> WeightSnapshot:
    return WeightSnapshot(version=3, content_hash="", tensors=tensors)


def trained(method: str, seed: int = 0) -> tuple[Toy, dict[str, np.ndarray], AdapterWeights]:
    """A network, its base tensors, and an adapter that changes them much."""
    torch.manual_seed(seed)
    network = Toy()
    base = state_tensors(network)
    adapters.attach(network, AdapterPart(method=method, rank=4, alpha=8), seed=seed, decoders=["decoder"])
    with torch.no_grad():
        for parameter in adapters.parameters(network).values():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return network, base, adapters.extract(network, base_hash="")


def test_bits_are_torchs_and_rounding_is_torchs() -> None:
    values = torch.randn(5000, generator=torch.Generator().manual_seed(0)) * torch.logspace(-30, 30, 5000)
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 1 + 2**-8, 1 + 3 * 2**-8, 3.4e38])
    values = torch.cat([values, special])
    array = to_array(values.bfloat16())
    assert array.dtype == BFLOAT16
    np.testing.assert_array_equal(narrow(values.numpy(), BFLOAT16), array)
    np.testing.assert_array_equal(widen(array), values.bfloat16().float().numpy())
    np.testing.assert_array_equal(is_finite(array), values.bfloat16().isfinite().numpy())
    assert np.isnan(widen(narrow(np.array([np.nan], np.float32), BFLOAT16)))[0]
    assert torch.equal(to_tensor(array), values.bfloat16())


def test_other_dtypes_are_as_they_were() -> None:
    array = np.array([1.5, np.inf], np.float16)
    np.testing.assert_array_equal(widen(array), np.array([1.5, np.inf], np.float32))
    assert narrow(np.array([0.1], np.float32), np.dtype(np.float16)).dtype == np.float16
    np.testing.assert_array_equal(is_finite(array), [True, False])


def test_an_array_does_not_share_memory_with_its_network() -> None:
    network = Toy()
    tensors = state_tensors(network)
    before = tensors[f"{LAYER}.weight"].copy()
    with torch.no_grad():
        network.linear.weight.zero_()
    np.testing.assert_array_equal(tensors[f"{LAYER}.weight"], before)


def test_a_snapshot_carries_the_very_bits() -> None:
    torch.manual_seed(0)
    one, other = Toy(), Toy()
    tensors = state_tensors(one)
    for array in tensors.values():
        array.setflags(write=False)
    load_snapshot(other, snapshot(tensors))
    assert torch.equal(one.linear.weight, other.linear.weight)
    (name,) = tensors
    assert tensor_hash(tensors[name]) == tensor_hash(state_tensors(other)[name])


def test_a_snapshot_of_another_dtype_or_not_finite_is_refused() -> None:
    network = Toy()
    (name,) = state_tensors(network)
    wide = {name: widen(state_tensors(network)[name])}
    with pytest.raises(ValueError, match=f"{name} is float32, expected bfloat16"):
        load_snapshot(network, snapshot(wide))
    with pytest.raises(ValueError, match=f"{name} is bfloat16, expected float32"):
        load_snapshot(Toy(torch.float32), snapshot(state_tensors(network)))
    broken = state_tensors(network)
    broken[name][1, 2] = 0x7F80
    with pytest.raises(ValueError, match="has 1 non-finite"):
        load_snapshot(network, snapshot(broken))


def test_a_checkpoint_says_bfloat16_and_gives_it_back(tmp_path: Path) -> None:
    tensors = state_tensors(Toy()) | {"wide": np.arange(3, dtype=np.float32)}
    path = save_checkpoint(tmp_path, "start", tensors, {})
    with safe_open(path / "tensors.safetensors", framework="pt") as file:
        assert file.get_slice(f"{LAYER}.weight").get_dtype() == "BF16"
    reader = CheckpointReader(path)
    assert reader.sizes() == {f"{LAYER}.weight": 48 * 32 * 2, "wide": 12}
    for name, array in tensors.items():
        for found in (reader.tensor(name), load_checkpoint(path)[0][name]):
            assert found.dtype == array.dtype
            np.testing.assert_array_equal(found, array)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_an_adapter_on_bfloat16_is_float32_and_its_merge_is_the_servers(method: str) -> None:
    network, base, weights = trained(method)
    parameters = adapters.parameters(network)
    assert {p.dtype for p in parameters.values()} == {torch.float32}
    served = Toy()
    load_snapshot(served, snapshot(merge(base, weights)))
    x = torch.randn(5, 48).bfloat16()
    with adapters.merged_forward(network):
        y = network.linear(x)
        # Both round float32 to bfloat16 once; sums in another order may tip the last bit of a weight.
        torch.testing.assert_close(y, served.linear(x), rtol=0.02, atol=0.02)
        assert (network.linear.get_base_layer().weight != served.linear.weight).float().mean() < 0.02
        y.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in parameters.values())
    assert parameters[f"{LAYER}.B"].grad.abs().max() > 0


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize(("dtype", "limit"), [("bfloat16", 4e-3), ("float32", 1e-6)])
def test_drift_is_what_rounding_costs(method: str, dtype: str, limit: float) -> None:
    _, base, weights = trained(method)
    if dtype == "float32":
        base = {name: widen(array) for name, array in base.items()}
    found = drift(base, merge(base, weights), weights)
    assert 0 < found < limit
    if dtype == "bfloat16":
        assert found > 1e-4
    assert drift(base, base, None) == 0
    assert drift({}, {}, weights) == 0


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_wrong_merge_is_refused_by_its_drift(method: str) -> None:
    _, base, weights = trained(method)
    (name,) = base
    with pytest.raises(ValueError, match=rf"merged {name} gives outputs that are .* limit {DRIFT_LIMIT}"):
        drift(base, dict(base), weights)
    nothing = {name: narrow(np.full(base[name].shape, np.nan, np.float32), BFLOAT16)}
    with pytest.raises(ValueError, match="gives outputs"):
        drift(base, nothing, weights)
