"""A published OpenVLA checkpoint as a policy on LIBERO, token by token or by unmasking, and its own way of choosing
tokens.

Letters: B decisions, N image tokens, T prompt tokens, L action tokens, V the whole vocabulary.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from configs.policy import DiffusionPart
from policies.autoregressive import AutoregressivePolicy, decode
from policies.decoding.modules import ModuleDecoder
from policies.diffusion import DiffusionPolicy
from policies.openvla.actions import OpenVLAActions
from policies.openvla.checkpoint import OpenVLAFolder, open_openvla
from policies.openvla.images import libero_view
from policies.openvla.network import OpenVLA, token_logps
from policies.protocol import DecisionBatch


def openvla_policy(
    folder: str | Path,
    *,
    unnorm_key: str | None = None,
    crop: bool = True,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    filled: bool = True,
) -> AutoregressivePolicy:
    """The policy of a checkpoint folder: one action at a time, from the agentview alone.

    `unnorm_key` names the data set whose statistics scale the actions, and may be left out where there is one alone;
    `crop`: see `libero_view`; `filled`: see `OpenVLAFolder.network`. Tokens are drawn from the action tokens alone;
    OpenVLA's own argmax is over the whole vocabulary (`greedy_over_vocabulary`), and the two agree whenever that finds
    an action token. Raises ValueError as `load_openvla` does.
    """
    found = open_openvla(folder)
    actions = openvla_actions(found, unnorm_key)
    return AutoregressivePolicy(
        found.network(device=device, dtype=dtype, filled=filled),
        prompts=found.prompts,
        actions=actions,
        chunk=1,
        image_size=found.image_size,
        view=partial(libero_view, size=found.image_size, crop=crop),
        decoder=ModuleDecoder,
    )


def openvla_diffusion_policy(
    folder: str | Path,
    *,
    part: DiffusionPart,
    chunk: int,
    unnorm_key: str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    filled: bool = True,
) -> DiffusionPolicy:
    """A checkpoint as a policy that unmasks chunks of `chunk` actions (Discrete Diffusion VLA, arXiv 2508.20072).

    [MASK] is `mask_id`'s; unless the checkpoint was trained on it, it means nothing before the supervised start.
    Everything else as in `openvla_policy`.
    """
    found = open_openvla(folder)
    actions, mask = openvla_actions(found, unnorm_key), mask_id(found)
    return DiffusionPolicy(
        found.network(device=device, dtype=dtype, filled=filled),
        prompts=found.prompts,
        actions=actions,
        part=part,
        chunk=chunk,
        image_size=found.image_size,
        mask_id=mask,
        view=partial(libero_view, size=found.image_size),
    )


def openvla_actions(found: OpenVLAFolder, unnorm_key: str | None) -> OpenVLAActions:
    """A checkpoint's action tokens in LIBERO's units. ValueError for an unknown key, or another robot's."""
    return OpenVLAActions(found.layout.actions, found.statistics(unnorm_key))


def mask_id(found: OpenVLAFolder) -> int:
    """The first id behind the action tokens that is not the padding token's own: one of those that fill the
    vocabulary up. Raises ValueError where there is none."""
    layout = found.layout
    for free in range(layout.vocab_size, layout.text["vocab_size"]):
        if free != layout.pad_id:
            return free
    raise ValueError(
        f"{found.folder}: the vocabulary of {layout.text['vocab_size']} ids has none left for [MASK] behind the "
        f"{layout.vocab_size} of text and actions; expected a pad_to_multiple_of of 2 or more"
    )


@torch.inference_mode()
def greedy_over_vocabulary(
    network: OpenVLA,
    image_tokens_BND: torch.Tensor,
    prompt_BT: torch.Tensor,
    prompt_mask_BT: torch.Tensor,
    *,
    length: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """OpenVLA's own decoding of a network without proprioception: each token the likeliest of the whole vocabulary,
    and fed back whatever it is (`ActionTokenizer.values` clips those that are no action tokens).

    Returns token ids int64 [B, L] and their logits float32 [B, L, V].
    """
    vocabulary = network.language_model.config.vocab_size
    decoder = ModuleDecoder(network.language_model, first_id=0, stop_id=vocabulary)
    prefix = network.embed(prompt_BT, image_tokens_BND)
    lengths = (prompt_mask_BT.sum(dim=1) + prefix.shape[1] - prompt_BT.shape[1]).tolist()
    no_noise = prefix.new_zeros(1, 1, 1).expand(length, len(prefix), vocabulary)
    ids_LB, logits_LBV = decode(decoder, prefix, lengths, no_noise)
    return ids_LB.T, logits_LBV.transpose(0, 1)


def score_over_vocabulary(
    network: OpenVLA, batch: DecisionBatch, image_tokens_BND: torch.Tensor | None = None
) -> torch.Tensor:
    """Log-probabilities of the chunks' tokens among the whole vocabulary, float32 [B, L], differentiable: OpenVLA's
    own. Less than a policy's `score` by what the network gives to tokens that are no actions."""
    logits = network.language_model.lm_head(network.action_hidden(batch, image_tokens_BND))
    return token_logps(logits.float(), batch.chunk_BL)
