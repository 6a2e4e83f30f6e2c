"""Family `openpi`: pi-0 and pi-0.5 against openpi's `PI0Pytorch`.

Letters: B observations, C cameras, P prefix tokens, H actions of a chunk, A action dimensions.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from objectives.flow_matching import noisy_chunk, velocity_errors
from policies.decoding.prefix import Prefix, PrefixCache, attention_mask, positions
from policies.parity.fixture import Family, Fixture, FixtureError, Output
from policies.pi0.checkpoint import LAYOUTS, check_weights, load_pi0
from policies.pi0.network import Pi0Network
from policies.pi0.sizes import GEMMA_2B, GEMMA_300M, Pi0Config, StreamSize, VisionSize

LOSS_RELATIVE = 1e-5
"""Losses of tens are right to float32's precision only."""
STEPS = 10
"""Euler steps of `sample_actions` where the fixture does not say."""
_VISION = {
    "width": "hidden_size",
    "depth": "num_hidden_layers",
    "mlp": "intermediate_size",
    "heads": "num_attention_heads",
    "image": "image_size",
    "patch": "patch_size",
}
_STREAM = {
    "width": "width",
    "depth": "depth",
    "mlp": "mlp_dim",
    "heads": "num_heads",
    "kv_heads": "num_kv_heads",
    "head_dim": "head_dim",
}
_VARIANTS = {"gemma_2b": GEMMA_2B, "gemma_300m": GEMMA_300M}
"""openpi's names of sizes; with `_lora` behind them, they are those of the same network with adapters."""


def compute(fixture: Fixture) -> dict[str, Output]:
    """Everything the fixture expects. Raises ValueError for sizes, weights or inputs that do not fit."""
    file, config = fixture.folder / "weights.safetensors", _config(fixture)
    check_weights(file, config)  # before memory is taken for sizes that may not be the weights' own
    network = load_pi0(file, config)
    fixture.ids("tokenized_prompt", network.config.vocab)
    with torch.no_grad():
        image_tokens = network.encode_images(_cameras(fixture, "image"))
        prefix = network.join_prefix(
            image_tokens,
            _cameras(fixture, "image_mask"),
            fixture.input("tokenized_prompt"),
            fixture.input("tokenized_prompt_mask"),
        )
        cache = network.encode_prefix(prefix)
        return {
            "image_features": Output(image_tokens),
            **_of_prefix(prefix, cache),
            **_of_velocity(network, cache, fixture),
            **_of_sampling(network, cache, fixture),
            **_of_training(network, prefix, fixture),
        }


FAMILY = Family(compute=compute, required=("loss", "v_t", "sample_actions*", "grad.*"))


def _config(fixture: Fixture) -> Pi0Config:
    state = _state(fixture)
    vision = _sizes(fixture, "vision_config", fixture.setting("vision_config"), _VISION)
    return Pi0Config(
        adaptive=fixture.setting("pi05"),
        vision=VisionSize(**vision),
        vlm=_stream(fixture, "paligemma_variant"),
        expert=_stream(fixture, "action_expert_variant"),
        vocab=fixture.setting("vocab_size"),
        horizon=fixture.setting("action_horizon"),
        action_dim=fixture.setting("action_dim"),
        state_dim=fixture.setting("action_dim") if state is None else state.shape[-1],
    )


def _stream(fixture: Fixture, setting: str) -> StreamSize:
    """Of an object of sizes, or of a name that openpi has for them."""
    variant = fixture.setting(setting)
    if not isinstance(variant, str):
        return StreamSize(**_sizes(fixture, setting, variant, _STREAM))
    size = _VARIANTS.get(variant.removesuffix("_lora"))
    if size is None:
        raise FixtureError(
            f"{fixture.folder / 'config.json'}: {setting} is {variant!r}, expected {' or '.join(_VARIANTS)} or an "
            f"object with {', '.join(_STREAM.values())}"
        )
    return size


def _sizes(fixture: Fixture, setting: str, given: Any, names: Mapping[str, str]) -> dict[str, int]:
    """Our name of a size -> its value, `names` being ours -> openpi's."""
    missing = [key for key in names.values() if not isinstance(given, dict) or key not in given]
    if missing:
        raise FixtureError(
            f"{fixture.folder / 'config.json'}: {setting} lacks the size {missing[0]!r}; it is {given!r}"
        )
    return {name: given[key] for name, key in names.items()}


def _state(fixture: Fixture) -> torch.Tensor | None:
    """pi-0.5 reads none, so there need be none."""
    return fixture.inputs.get("state") if fixture.setting("pi05") else fixture.input("state")


def _cameras(fixture: Fixture, kind: str) -> torch.Tensor:
    return torch.stack([fixture.input(f"{kind}.{key}") for key in fixture.setting("image_keys")], dim=1)


def _of_prefix(prefix: Prefix, cache: PrefixCache) -> dict[str, Output]:
    """Where no token exists, embeddings, hidden states, keys and values mean nothing."""
    exists_BP1 = prefix.mask_BP.unsqueeze(-1)
    outputs = {
        "prefix_embs": Output(prefix.tokens_BPD, where=exists_BP1),
        "prefix_pad_masks": Output(prefix.mask_BP),
        "prefix_att_masks": Output(torch.zeros_like(prefix.mask_BP)),
        "prefix_hidden": Output(cache.hidden_BPD, where=exists_BP1),
    }
    for layer, (keys, values) in enumerate(zip(cache.keys, cache.values, strict=True)):
        outputs[f"prefix_k.{layer}"] = Output(keys, where=exists_BP1.unsqueeze(1))
        outputs[f"prefix_v.{layer}"] = Output(values, where=exists_BP1.unsqueeze(1))
    return outputs


def _of_velocity(network: Pi0Network, cache: PrefixCache, fixture: Fixture) -> dict[str, Output]:
    x_BHA, t_B, state_BS = fixture.input("x_t"), fixture.input("t"), _state(fixture)
    joint = network.velocity_joint(
        _cameras(fixture, "image"),
        _cameras(fixture, "image_mask"),
        fixture.input("tokenized_prompt"),
        fixture.input("tokenized_prompt_mask"),
        x_BHA=x_BHA,
        t_B=t_B,
        state_BS=state_BS,
    )
    return {"v_t": Output(network.velocity(cache, x_BHA, t_B, state_BS)), "v_t_joint": Output(joint)}


def _of_sampling(network: Pi0Network, cache: PrefixCache, fixture: Fixture) -> dict[str, Output]:
    noise, state = fixture.input("sample_noise"), _state(fixture)
    traced = [
        fixture.expected[f"sample_{of}"]
        for of in ("times", "x_t", "v_t")
        if f"sample_{of}" in fixture.expected
    ]
    default = len(traced[0]) if traced else fixture.count("num_steps", STEPS)
    path = list(network.integrate(cache, noise, default, state))
    outputs = {
        "sample_actions": Output(network.sample(cache, noise, default, state)),
        "sample_times": Output(torch.stack([step.t for step in path])),
        "sample_x_t": Output(torch.stack([step.x_RHA for step in path])),
        "sample_v_t": Output(torch.stack([step.v_RHA for step in path])),
    }
    for name in fixture.expected:
        if steps := re.fullmatch(r"sample_actions_(\d+)_?steps?", name):
            outputs[name] = Output(network.sample(cache, noise, int(steps[1]), state))
    return outputs


def _of_training(network: Pi0Network, prefix: Prefix, fixture: Fixture) -> dict[str, Output]:
    actions, noise, t_B = (fixture.input(name) for name in ("actions", "noise", "time"))
    state = _state(fixture)
    x_BHA = noisy_chunk(actions, noise, t_B)
    suffix = network.embed_suffix(x_BHA, t_B, state)
    hidden = network.run_suffix(network.encode_prefix(prefix), suffix)
    exists_BT = prefix.mask_BP.new_ones(suffix.tokens_RTE.shape[:2])
    exists_BN = torch.cat([prefix.mask_BP, exists_BT], dim=1)
    starts_N = torch.cat([suffix.starts_T.new_zeros(prefix.mask_BP.shape[1]), suffix.starts_T])
    outputs = {
        "x_t_train": Output(x_BHA),
        "time_sincos_f64": Output(network.embed_time(t_B)),
        "suffix_embs": Output(suffix.tokens_RTE),
        "suffix_pad_masks": Output(exists_BT),
        "suffix_att_masks": Output(suffix.starts_T.expand_as(exists_BT)),
        "suffix_out": Output(hidden[:, -x_BHA.shape[1] :]),
        # Padding sees nothing upstream and everything here; what becomes of it is read by nobody.
        "att_2d_masks": Output(attention_mask(exists_BN, starts_N), where=exists_BN.unsqueeze(-1)),
        "position_ids": Output(positions(exists_BN)),
    }
    if suffix.cond_RE is not None:
        outputs["adarms_cond"] = Output(suffix.cond_RE)
    return outputs | _of_loss(network, fixture, x_BHA)


def _of_loss(network: Pi0Network, fixture: Fixture, x_BHA: torch.Tensor) -> dict[str, Output]:
    with torch.enable_grad():
        v_BHA = network.velocity_joint(
            _cameras(fixture, "image"),
            _cameras(fixture, "image_mask"),
            fixture.input("tokenized_prompt"),
            fixture.input("tokenized_prompt_mask"),
            x_BHA=x_BHA,
            t_B=fixture.input("time"),
            state_BS=_state(fixture),
        )
        loss = velocity_errors(v_BHA, fixture.input("actions"), fixture.input("noise"))
        loss.mean().backward()
    gradients = {
        f"grad.{LAYOUTS['openpi'].key(name)}": Output(parameter.grad)
        for name, parameter in network.named_parameters()
        if parameter.grad is not None
    }
    return {"loss": Output(loss, relative=LOSS_RELATIVE), "v_t_train": Output(v_BHA), **gradients}
