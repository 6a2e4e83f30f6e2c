"""Family `peft_dora`: LoRA and DoRA adapters on a Llama decoder, as peft saves, runs and merges them.

Beside the files of every fixture there is `adapters.safetensors`: `<adapter>/` and the name peft saves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from policies.parity.fixture import Family, Fixture, FixtureError, Output, Outputs
from policies.weights import adapters, merging
from policies.weights.adapter_files import adapter_from_peft
from policies.weights.snapshots import state_tensors

_DECODER = "model"
_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)
_RELATIVE = 1e-5
"""Losses and gradients of tens are right to float32's precision only, of sums over tokens and layers."""
_SAVED_AS = {"A": "lora_A.weight", "B": "lora_B.weight", "m": "lora_magnitude_vector.weight"}


def compute(fixture: Fixture) -> Outputs:
    """Merged weights, logits, loss, gradients and initial magnitudes of every adapter in config.json.

    Raises FixtureError for weights, adapters or settings that do not fit.
    """
    found: dict[str, Output] = {}
    given = fixture.tensors("adapters.safetensors")
    for name, settings in _settings(fixture).items():
        saved = {key.removeprefix(f"{name}/"): t for key, t in given.items() if key.startswith(f"{name}/")}
        if not saved:
            raise FixtureError(
                f"{fixture.folder / 'adapters.safetensors'} has no tensor of adapter {name!r}; it has those of "
                f"{sorted({key.split('/')[0] for key in given})}"
            )
        try:
            found |= {f"{name}/{key}": output for key, output in _adapter(fixture, saved, settings).items()}
        except FixtureError:
            raise
        except ValueError as error:
            raise FixtureError(f"{fixture.folder}: adapter {name!r}: {error}") from error
    with torch.no_grad():
        found["logits_base"] = Output(_run(fixture, _network(fixture, fixture.weights)).logits)
    return found


def _settings(fixture: Fixture) -> Mapping[str, Mapping[str, Any]]:
    """Adapter -> its adapter_config.json."""
    found = fixture.setting("adapters")
    if not isinstance(found, dict) or not all(isinstance(settings, dict) for settings in found.values()):
        raise FixtureError(
            f"{fixture.folder / 'config.json'}: adapters are {found!r}, expected an object of name: settings"
        )
    return found


def _adapter(
    fixture: Fixture, saved: Mapping[str, torch.Tensor], settings: Mapping[str, Any]
) -> dict[str, Output]:
    part, weights = adapter_from_peft({key: t.numpy() for key, t in saved.items()}, settings)
    network = _network(fixture, fixture.weights)
    base = state_tensors(network)
    targets = settings.get("target_modules") or fixture.config.get("target_modules")
    adapters.attach(network, part, seed=0, decoders=[_DECODER], linears=_linears(targets))
    found = {
        f"init_magnitude/{_saved_name(name)}": Output(parameter.detach().clone())
        for name, parameter in adapters.parameters(network).items()
        if name.endswith(".m")
    }
    adapters.load(network, weights)
    with torch.no_grad():
        found["logits_adapter"] = Output(_run(fixture, network).logits)
    if "labels" in fixture.inputs:
        found |= _training(fixture, network)
    merged = {
        name: torch.from_numpy(array)
        for name, array in merging.merge(base, adapters.extract(network, base_hash="")).items()
    }
    found |= {f"merged/{name}": Output(tensor) for name, tensor in merged.items()}
    with torch.no_grad():
        found["logits_merged"] = Output(_run(fixture, _network(fixture, merged)).logits)
    return found


def _linears(targets: Any) -> Sequence[str]:
    """Of peft's `target_modules`. Raises ValueError for a pattern, which it has as well."""
    if targets is None or targets == "all-linear":  # peft leaves out the head, which no Llama layer has
        return adapters.LINEARS
    if not isinstance(targets, list) or not all(isinstance(name, str) for name in targets):
        raise ValueError(
            f"target_modules is {targets!r}, expected 'all-linear' or a list of some of {', '.join(adapters.LINEARS)}"
        )
    return targets


def _training(fixture: Fixture, network: LlamaForCausalLM) -> dict[str, Output]:
    """The way a learner takes: merged once, gradients carried on to the factors."""
    with adapters.merged_forward(network):
        loss = _run(fixture, network).loss
        loss.backward()
    gradients = {
        f"grad/{_saved_name(name)}": Output(parameter.grad, relative=_RELATIVE)
        for name, parameter in adapters.parameters(network).items()
        if parameter.grad is not None
    }
    return {"loss": Output(loss, relative=_RELATIVE), **gradients}


def _network(fixture: Fixture, weights: Mapping[str, torch.Tensor]) -> LlamaForCausalLM:
    given = fixture.setting("llama_config")
    for key in _SIZES:
        size = given.get(key)
        if size is not None and (not isinstance(size, int) or size < 1):
            raise FixtureError(
                f"{fixture.folder / 'config.json'}: llama_config.{key} is {size!r}, "
                "expected a whole number of 1 or more"
            )
    config = LlamaConfig(**given)
    config._attn_implementation = fixture.config.get("attn_implementation", "eager")
    network = LlamaForCausalLM(config).eval()
    own = network.state_dict()
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    for name in sorted((set(own) - tied) ^ (set(weights) - tied)):
        where = "is missing from" if name in own else "is not a Llama tensor but in"
        raise FixtureError(f"{name} {where} {fixture.folder / 'weights.safetensors'}")
    for name, tensor in weights.items():
        if tensor.shape != own[name].shape:
            raise FixtureError(
                f"{name} in {fixture.folder / 'weights.safetensors'} has shape {list(tensor.shape)}, "
                f"expected {list(own[name].shape)}"
            )
    network.load_state_dict(dict(weights), strict=False)
    return network


def _run(fixture: Fixture, network: LlamaForCausalLM) -> Any:
    return network(
        input_ids=fixture.ids("input_ids", network.config.vocab_size),
        attention_mask=fixture.inputs.get("attention_mask"),
        labels=fixture.inputs.get("labels"),
    )


def _saved_name(parameter: str) -> str:
    layer, _, key = parameter.rpartition(".")
    return f"base_model.model.{layer}.{_SAVED_AS[key]}"


FAMILY = Family(compute=compute, required=("*/merged/*", "*/logits_adapter", "*/logits_merged"))
