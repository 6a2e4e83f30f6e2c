"""Attach a peft adapter to a policy's decoder, switch it off, read its factors and write them back.

LoRA: arXiv 2106.09685. DoRA: arXiv 2402.09353. peft owns the trained parameters and their forward pass.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear as AdaptedLinear

from configs.preference import AdapterPart
from policies.weights.merging import drift, merge
from policies.weights.snapshots import to_array, to_tensor
from trajectories.records import AdapterWeights

_NAME = "default"
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linears of a Llama layer."""


def attach(
    module: torch.nn.Module,
    part: AdapterPart,
    *,
    seed: int,
    decoders: Sequence[str],
    linears: Sequence[str] = LINEARS,
) -> None:
    """Add a trainable adapter, in place, to those `linears` of every layer of each `module.<decoder>`; default all.

    Everything else is frozen. At first the adapter changes nothing (merged on a CPU, not a bit): B = 0 and, for DoRA,
    m = row norms of W. `seed` fixes A. The adapted layers keep their names; their weight moves to
    `<layer>.base_layer.weight`, so read the base tensors first. Its own parameters are float32 whatever the network's
    dtype. Raises ValueError for a decoder in which no linear of a Llama layer is found, or for a linear that such a
    layer does not have.
    """
    unknown = sorted(set(linears) - set(LINEARS))
    if unknown or not linears:
        raise ValueError(f"linears to adapt must be some of {', '.join(LINEARS)}, got {unknown or 'none'}")
    config = LoraConfig(
        r=part.rank,
        lora_alpha=part.alpha,  # type: ignore[arg-type]  # peft only divides by it
        lora_dropout=part.dropout,
        use_dora=part.method == "dora",
        bias="none",
        target_modules=rf"({'|'.join(map(re.escape, decoders))})\.layers\.\d+\.(self_attn|mlp)\.({'|'.join(linears)})",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, module, adapter_name=_NAME)
    adapted = [name for name, _ in adapted_layers(module)]
    for decoder in decoders:
        if not any(name.startswith(f"{decoder}.layers.") for name in adapted):
            raise ValueError(f"no attention or MLP linear found under {decoder}.layers; nothing to adapt")
    own = parameters(module)
    for parameter in own.values():
        # AdamW's steps are below bfloat16's resolution.
        parameter.data = parameter.data.float()
    for _, layer in adapted_layers(module):
        if layer.use_dora[_NAME]:
            # peft rounds m to the network's dtype; the merges divide it by the norm that is taken here.
            weight = layer.get_base_layer().get_parameter("weight").detach().float()
            factors(layer)["m"].data = torch.linalg.vector_norm(weight, dim=1)
    trainable = {id(p) for p in own.values()}
    for parameter in module.parameters():
        parameter.requires_grad_(id(parameter) in trainable)


def adapted_layers(module: torch.nn.Module) -> Iterator[tuple[str, AdaptedLinear]]:
    """Name and layer of every adapted linear, in the order of the network."""
    for name, layer in module.named_modules():
        if isinstance(layer, AdaptedLinear):
            yield name, layer


def parameters(module: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The adapter's own parameters in the order of the network: `<layer>.A`, `.B` and, for DoRA, `.m`."""
    return {
        f"{name}.{key}": parameter
        for name, layer in adapted_layers(module)
        for key, parameter in factors(layer).items()
    }


@contextmanager
def disabled(module: torch.nn.Module) -> Iterator[None]:
    """Inside, the network is its base: the reference policy."""
    layers = [layer for _, layer in adapted_layers(module)]
    # peft's own switch also clears requires_grad on the factors; it is set again on the way out.
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


@contextmanager
def merged_forward(module: torch.nn.Module) -> Iterator[None]:
    """Inside, every adapted layer is one product with its merged weight, computed once on entering.

    On leaving without an error, the gradients that backward passes left on the merged weights are carried on to
    the adapter's factors. The same function and gradients as peft's own forward, whose cost per layer and pass is
    three products and, for DoRA, a norm of the whole weight. Adapter dropout is left out, and `disabled` inside
    would not bring back the base.
    """
    layers = [layer for _, layer in adapted_layers(module)]
    merged = [_merged_weight(layer) for layer in layers]
    pristine = [layer.get_base_layer().weight for layer in layers]
    leaves = [torch.nn.Parameter(weight.detach()) for weight in merged]
    with disabled(module):
        try:
            for layer, leaf in zip(layers, leaves, strict=True):
                layer.get_base_layer().weight = leaf
            yield
        finally:
            for layer, weight in zip(layers, pristine, strict=True):
                layer.get_base_layer().weight = weight
    reached = [(w, leaf.grad) for w, leaf in zip(merged, leaves, strict=True) if leaf.grad is not None]
    if reached:
        torch.autograd.backward([w for w, _ in reached], [grad for _, grad in reached])


def _merged_weight(layer: AdaptedLinear) -> torch.Tensor:
    """As `policies.weights.merging.merge_tensor`, in float32 and cast once, differentiable in the factors. The row norm
    counts as a constant in the backward pass (DoRA, section 4.3)."""
    own = factors(layer)
    base = layer.get_base_layer().get_parameter("weight")
    direction = base + scaling(layer) * (own["B"] @ own["A"])
    if "m" in own:
        norm = torch.linalg.vector_norm(direction.detach(), dim=1)
        direction = (own["m"] / norm)[:, None] * direction
    return direction.to(base.dtype)


def extract(module: torch.nn.Module, *, base_hash: str) -> AdapterWeights:
    """Copy the adapter out, float32. Raises ValueError naming the first factor that is not finite."""
    return _extracted(dict(adapted_layers(module)), base_hash=base_hash)


def _extracted(layers: Mapping[str, AdaptedLinear], *, base_hash: str) -> AdapterWeights:
    found: dict[str, dict[str, np.ndarray]] = {}
    for name, layer in layers.items():
        found[name] = {key: _array(parameter) for key, parameter in factors(layer).items()}
        for key, array in found[name].items():
            if not np.isfinite(array).all():
                raise ValueError(f"adapter factor {key} of {name} is not finite; restore an earlier adapter")
    return AdapterWeights(
        method="dora" if layer.use_dora[_NAME] else "lora",
        scaling=scaling(layer),
        base_hash=base_hash,
        factors=found,
    )


@torch.no_grad()
def merge_in(module: torch.nn.Module) -> float:
    """Merge the adapter into the weights that it is on and take it off, in place: layers and names are those from
    before `attach`, and every weight stays frozen. Returns the merge's `drift`. Raises ValueError naming a factor that
    is not finite, and MergeError as `merge` and `drift` do; layers before the one named are merged then."""
    largest = 0.0
    for name, layer in list(adapted_layers(module)):  # one at a time: together they are most of the network
        plain = layer.get_base_layer()
        weight = plain.get_parameter("weight")
        adapter = _extracted({name: layer}, base_hash="")
        before = {f"{name}.weight": to_array(weight)}
        after = merge(before, adapter)
        largest = max(largest, drift(before, after, adapter))
        weight.copy_(to_tensor(after[f"{name}.weight"]))
        parent, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(parent), leaf, plain)
    del module.peft_config  # else peft takes the next adapter for a second one
    return largest


def load(module: torch.nn.Module, weights: AdapterWeights) -> None:
    """Copy factors into the attached adapter. Raises ValueError naming the first that does not fit."""
    layers = dict(adapted_layers(module))
    if set(layers) != set(weights.factors):
        odd = sorted(set(layers) ^ set(weights.factors))
        raise ValueError(f"the adapter covers other layers than the one attached; first difference: {odd[0]}")
    for name, layer in layers.items():
        own = factors(layer)
        given = weights.factors[name]
        if {key: tuple(p.shape) for key, p in own.items()} != {key: a.shape for key, a in given.items()}:
            raise ValueError(
                f"adapter factors of {name} are { ({k: a.shape for k, a in given.items()}) }, "
                f"expected { ({k: tuple(p.shape) for k, p in own.items()}) }"
            )
        if layer.scaling[_NAME] != weights.scaling:
            raise ValueError(f"adapter scaling is {weights.scaling}, expected {layer.scaling[_NAME]}")
    with torch.no_grad():
        for name, layer in layers.items():
            for key, parameter in factors(layer).items():
                parameter.copy_(torch.from_numpy(weights.factors[name][key]))


def factors(layer: AdaptedLinear) -> dict[str, torch.nn.Parameter]:
    """An adapted layer's own parameters: `A`, `B` and, for DoRA, `m`."""
    found = {
        "A": layer.lora_A[_NAME].get_parameter("weight"),
        "B": layer.lora_B[_NAME].get_parameter("weight"),
    }
    if layer.use_dora[_NAME]:
        found["m"] = layer.lora_magnitude_vector[_NAME].get_parameter("weight")
    return found


def scaling(layer: AdaptedLinear) -> float:
    """What an adapted layer multiplies B A by: alpha / rank."""
    return float(layer.scaling[_NAME])


def _array(parameter: torch.nn.Parameter) -> np.ndarray:
    return parameter.detach().to("cpu", torch.float32, copy=True).numpy()
