"""Fixtures of OpenVLA's network: towers, projector, logits, log-probabilities, decoding, actions and gradients.

Letters: B examples, N image tokens, T text tokens, S = T + N, L action tokens, V vocabulary.
"""

from __future__ import annotations

import fnmatch
import glob
import re
from collections.abc import Iterator
from typing import Any

import torch

from policies.decoding.engine import decode, token_logps
from policies.decoding.modules import ModuleDecoder
from policies.openvla.actions import action_statistics
from policies.openvla.checkpoint import check_tensors, fill
from policies.openvla.layout import OpenVLALayout, openvla_layout
from policies.openvla.network import OpenVLA
from policies.openvla.towers import TimmBackbone
from policies.openvla.whole_vocabulary import greedy_over_vocabulary, score_over_vocabulary
from policies.parity.fixture import Family, Fixture, FixtureError, Output, Outputs
from policies.protocol import DecisionBatch

Named = Iterator[tuple[str, Output]]


def compute(fixture: Fixture) -> Outputs:
    """Every expected tensor. Raises ValueError when settings, weights, inputs or a name's own numbers do not fit."""
    layout, network = _network(fixture)
    pixels = fixture.input("pixel_values")
    with torch.no_grad():
        image_tokens = _image_tokens(network, pixels)
    outputs = dict(_vision(network, pixels))
    outputs |= _teacher_forced(fixture, network)
    outputs |= _given_actions(fixture, network, image_tokens)
    outputs |= _decoding(fixture, layout, network, image_tokens)
    outputs |= _action_tokens(fixture, layout)
    return outputs


def _network(fixture: Fixture) -> tuple[OpenVLALayout, OpenVLA]:
    config = dict(fixture.setting("official_hf_config"))
    config["timm_create_model_calls"] = fixture.config.get("timm_create_model_calls")
    layout = openvla_layout(config, where=str(fixture.folder / "config.json"))
    shapes = {name: tuple(tensor.shape) for name, tensor in fixture.weights.items()}
    check_tensors(layout, shapes, where=str(fixture.folder / "weights.safetensors"))
    network = layout.allocate(device=torch.device("cpu"), dtype=torch.float32)
    fill(network, fixture.weights.items())
    return layout, network


def _norm_stats(fixture: Fixture) -> dict[str, Any]:
    """Of config.json itself, or of the official one in it."""
    found = fixture.config.get("norm_stats") or fixture.setting("official_hf_config").get("norm_stats")
    if not isinstance(found, dict) or not found:
        raise FixtureError(
            f"{fixture.folder / 'config.json'} lacks 'norm_stats', there and in 'official_hf_config'; expected data "
            "set: statistics"
        )
    return found


def _text(fixture: Fixture, network: OpenVLA, ids: str, mask: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded ids int64 [B, T] and mask bool [B, T]. Raises FixtureError for what is padded otherwise."""
    text_BT = fixture.ids(ids, network.language_model.config.vocab_size)
    mask_BT = fixture.input(mask).bool()
    where = fixture.folder / "inputs.safetensors"
    rows = len(fixture.input("pixel_values"))
    if text_BT.shape != mask_BT.shape or len(text_BT) != rows:
        raise FixtureError(
            f"{where}: {ids} has shape {list(text_BT.shape)} and {mask} {list(mask_BT.shape)}, expected one shape with "
            f"the {rows} rows of pixel_values"
        )
    if bool((mask_BT[:, 1:] & ~mask_BT[:, :-1]).any()) or not bool(mask_BT[:, 0].all()):
        row = int((~mask_BT[:, 0] | (mask_BT[:, 1:] & ~mask_BT[:, :-1]).any(dim=1)).nonzero()[0])
        raise FixtureError(
            f"{where}: {mask} is {mask_BT[row].int().tolist()} in row {row}, expected ones and then zeros: texts are "
            "padded on the right"
        )
    return text_BT, mask_BT


def _unnormalised(fixture: Fixture) -> tuple[str, ...]:
    """Two data sets' actions, or all where there are fewer: a mask and the lack of one are not the same."""
    known = [f"greedy_actions_{glob.escape(key)}" for key in sorted(_norm_stats(fixture))]
    found = sum(name.startswith("greedy_actions_") for name in fixture.expected)
    absent = [name for name in known if not fnmatch.filter(fixture.expected, name)]
    return tuple(absent[: max(0, min(2, len(known)) - found)])


def _image_tokens(network: OpenVLA, pixels: torch.Tensor) -> torch.Tensor:
    assert isinstance(network.vision_backbone, TimmBackbone)
    return network.projector(network.vision_backbone.patches(pixels))


@torch.no_grad()
def _vision(network: OpenVLA, pixels: torch.Tensor) -> Named:
    backbone = network.vision_backbone
    assert isinstance(backbone, TimmBackbone)
    fused = backbone.patches(pixels)
    yield "fused_patches", Output(fused)
    yield "projected_patches", Output(network.projector(fused))
    for tower, own in zip(backbone.towers, pixels.split(3, dim=1), strict=True):
        yield "dino_patches" if tower.sizes.layer_scale else "siglip_patches", Output(tower(own))


def _teacher_forced(fixture: Fixture, network: OpenVLA) -> Named:
    """Logits and hidden states where the text is no padding, the loss and its gradients."""
    text, mask = _text(fixture, network, "tf_input_ids", "tf_attention_mask")
    image_tokens = _image_tokens(network, fixture.input("pixel_values"))
    out = network.read(text, image_tokens, labels_BT=fixture.input("tf_labels"))
    assert out.loss is not None
    logits = out.logits_BSV
    seen = torch.ones(image_tokens.shape[:2], dtype=torch.bool)
    real_BS = torch.cat([mask[:, :1], seen, mask[:, 1:]], dim=1)
    real_BS1 = real_BS.unsqueeze(-1)
    yield "tf_loss", Output(out.loss)
    yield "tf_logsumexp", Output(logits.double().logsumexp(dim=-1), real_BS)
    yield "tf_argmax", Output(logits.argmax(dim=-1), real_BS)
    yield "tf_hidden_states", Output(torch.stack(out.hidden_BSD), real_BS1)
    for name in fixture.expected:
        if found := re.fullmatch(r"tf_logits_vocab_(\d+)_(\d+)", name):
            yield name, Output(logits[:, :, int(found[1]) : int(found[2])], real_BS1)
        elif found := re.fullmatch(r"tf_logits_vocab_stride(\d+)", name):
            yield name, Output(logits[:, :, :: int(found[1])], real_BS1)
    out.loss.backward()
    parameters = dict(network.named_parameters())
    idle = sum(parameter.grad is None for parameter in parameters.values())
    yield "grad_is_none_param_count", Output(torch.tensor(idle))
    for name in fixture.expected:
        parameter = parameters.get(name.removeprefix("grad."))
        if name.startswith("grad.") and parameter is not None and parameter.grad is not None:
            yield name, Output(parameter.grad)


@torch.no_grad()
def _given_actions(fixture: Fixture, network: OpenVLA, image_tokens: torch.Tensor) -> Named:
    """What predicts each given action token: over the whole vocabulary, and over the action tokens alone."""
    prompt, prompt_mask = _text(fixture, network, "input_ids", "attention_mask")
    ids = fixture.ids("given_action_ids", network.language_model.config.vocab_size)
    unseen = torch.zeros(len(ids), 1, 1, 3, dtype=torch.uint8)
    batch = DecisionBatch(
        agentview_BHWC=unseen,
        wrist_BHWC=unseen,
        proprio_BP=torch.empty(len(ids), 0),
        prompt_BT=prompt,
        prompt_mask_BT=prompt_mask,
        chunk_BL=ids,
    )
    lengths = prompt_mask.sum(dim=1)
    if not torch.equal(lengths, fixture.inputs.get("prompt_len", lengths)):
        raise FixtureError(f"{fixture.folder}: prompt_len is not the number of ones in attention_mask")
    whole = network.language_model.lm_head(network.action_hidden(batch, image_tokens))
    actions = network(batch, image_tokens)
    logps = score_over_vocabulary(network, batch, image_tokens)
    yield "given_action_token_logprobs", Output(logps)
    yield "given_action_token_logprobs_f32", Output(logps)
    yield "given_action_logprob_sum", Output(logps.sum(dim=1))
    columns = ids - network.action_first_id
    known = (columns >= 0) & (columns < actions.shape[-1])
    restricted = token_logps(actions, columns.clamp(0, actions.shape[-1] - 1))
    yield "given_action_token_logprobs_action_range", Output(restricted, known)
    yield "action_entropy_full_vocab", Output(_entropy(whole.double()))
    yield "action_entropy_action_range", Output(_entropy(actions.double()))
    yield "action_logits_action_range", Output(actions)
    for name in fixture.expected:
        if found := re.fullmatch(r"action_logits_ex(\d+)_full_vocab", name):
            if int(found[1]) >= len(whole):
                raise FixtureError(
                    f"{fixture.folder / 'expected.safetensors'}: {name} is of example {found[1]}, "
                    f"inputs.safetensors has {len(whole)}"
                )
            yield name, Output(whole[int(found[1])])


@torch.no_grad()
def _decoding(fixture: Fixture, layout: OpenVLALayout, network: OpenVLA, image_tokens: torch.Tensor) -> Named:
    """Greedy tokens over the whole vocabulary as published, and over the action tokens as policies here decode."""
    prompt, mask = _text(fixture, network, "input_ids", "attention_mask")
    norm_stats = _norm_stats(fixture)
    where = str(fixture.folder / "config.json")
    length = fixture.input("given_action_ids").shape[1]
    ids, logits = greedy_over_vocabulary(network, image_tokens, prompt, mask, length=length)
    yield "greedy_action_ids", Output(ids)
    yield "greedy_top2_margin", Output(_margin(logits))
    values = layout.actions.values(ids.numpy())
    yield "greedy_normalized_actions", Output(torch.from_numpy(values))
    for name in fixture.expected:
        if name.startswith("greedy_actions_"):
            known = action_statistics(norm_stats, name.removeprefix("greedy_actions_"), where=where)
            scaled = known.unnormalize(values[:, : known.q01.size])
            yield name, Output(torch.from_numpy(scaled))
    tokens = layout.actions
    decoder = ModuleDecoder(network.language_model, first_id=tokens.first_id, stop_id=tokens.stop_id)
    prefix = network.embed(prompt, image_tokens)
    lengths = (mask.sum(dim=1) + image_tokens.shape[1]).tolist()
    chosen, restricted = decode(decoder, prefix, lengths, torch.zeros(length, len(ids), tokens.bins))
    yield "greedy_restricted_ids", Output(chosen.T + tokens.first_id)
    yield "greedy_restricted_top2_margin", Output(_margin(restricted.transpose(0, 1)))


def _action_tokens(fixture: Fixture, layout: OpenVLALayout) -> Named:
    ids = layout.actions.ids(fixture.input("encode_actions").numpy())
    yield "encoded_ids", Output(torch.from_numpy(ids))
    values = layout.actions.values(fixture.input("decode_ids").numpy())
    yield "decoded_actions", Output(torch.from_numpy(values))


def _entropy(logits_BLV: torch.Tensor) -> torch.Tensor:
    return torch.distributions.Categorical(logits=logits_BLV).entropy()


def _margin(logits_BLV: torch.Tensor) -> torch.Tensor:
    best = logits_BLV.topk(2, dim=-1).values
    return best[..., 0] - best[..., 1]


FAMILY = Family(
    compute=compute,
    required=(
        "fused_patches",
        "projected_patches",
        "tf_logits_vocab_[0-9]*_[0-9]*",
        "given_action_logprob_sum",
        "greedy_action_ids",
        "greedy_normalized_actions",
        "greedy_actions_*",
        "encoded_ids",
        "decoded_actions",
        "tf_loss",
    ),
    required_by=_unnormalised,
)
