"""OpenVLA's own choice and score of action tokens, among its whole vocabulary; its policies keep to the action tokens.

Letters: B decisions, N image tokens, T prompt tokens, L action tokens, V the whole vocabulary.
"""

from __future__ import annotations

import torch

from policies.decoding.engine import decode, token_logps
from policies.decoding.modules import ModuleDecoder
from policies.openvla.network import OpenVLA
from policies.protocol import DecisionBatch


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
