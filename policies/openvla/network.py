"""The network of a token policy: vision towers, projector and Llama decoder, laid out as in OpenVLA
(arXiv 2406.09246), where wanted with a second camera and a proprioception token (OpenVLA-OFT, arXiv 2502.19645),
and with action chunks.

Letters: B decisions, N image tokens of all cameras, T prompt tokens, S tokens of the whole sequence, L action
tokens of a chunk, V ids that are told apart, D decoder width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from configs.policy import DecoderPart
from policies.encoding.observations import PROPRIO_MEAN, PROPRIO_STD, real_first
from policies.openvla.towers import TimmBackbone
from policies.openvla.vision import Projector, VisionBackbone
from policies.protocol import DecisionBatch
from trajectories.records import PROPRIO_DIM

IGNORED = -100
"""A label that asks for nothing."""


class ProprioProjector(nn.Module):
    """Standardised proprioception to one decoder token."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(PROPRIO_MEAN), persistent=False)
        self.register_buffer("std", torch.tensor(PROPRIO_STD), persistent=False)
        self.fc1 = nn.Linear(PROPRIO_DIM, width)
        self.fc2 = nn.Linear(width, width)

    def forward(self, proprio_BP: torch.Tensor) -> torch.Tensor:
        """float32 [B, 8], see `Observation.proprio` -> [B, 1, D]."""
        return self.fc2(F.gelu(self.fc1((proprio_BP - self.mean) / self.std))).unsqueeze(1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """What the decoder made of whole sequences."""

    logits_BSV: torch.Tensor
    """Column s predicts column s + 1, over the whole vocabulary."""
    hidden_BSD: tuple[torch.Tensor, ...]
    """The decoder's input, each layer's output but the last's, and that after the final norm."""
    loss: torch.Tensor | None
    """None without labels."""


class OpenVLA(nn.Module):
    """Sequence: BOS, image tokens (agentview, then wrist), proprioception, the rest of the prompt, action tokens.

    Published checkpoints have one camera and no proprioception. Parameters are named as in those checkpoints
    (`projector.*`, `language_model.model.*`, `language_model.lm_head.weight`, and with a `TimmBackbone` all of
    them). Action tokens are the ids `action_first_id`..`action_stop_id` - 1.
    """

    def __init__(
        self,
        *,
        vision_backbone: VisionBackbone | TimmBackbone,
        language_model: LlamaForCausalLM,
        action_first_id: int,
        action_stop_id: int,
        cameras: Literal[1, 2] = 2,
        proprioception: bool = True,
    ) -> None:
        """One camera is the agentview."""
        super().__init__()
        width = language_model.config.hidden_size
        self.vision_backbone = vision_backbone
        self.projector = Projector(vision_backbone.width, width, fused=vision_backbone.fused)
        self.proprio_projector = ProprioProjector(width) if proprioception else None
        self.language_model = language_model
        self.action_first_id = action_first_id
        self.action_stop_id = action_stop_id
        self.cameras = cameras

    def encode_images(self, agentview_BHWC: torch.Tensor, wrist_BHWC: torch.Tensor) -> torch.Tensor:
        """uint8 [B, H, W, 3] each -> projected image tokens [B, N, D], agentview first. With one camera the wrist
        image is not looked at.

        An adapter on the decoder leaves these alone, so they may be computed once per decision and kept.
        """
        seen = (agentview_BHWC, wrist_BHWC)[: self.cameras]
        tokens = self.projector(self.vision_backbone(torch.cat(seen)))
        return torch.cat(tokens.chunk(self.cameras), dim=1)

    def embed(
        self, text_BT: torch.Tensor, image_tokens_BND: torch.Tensor, proprio_BP: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Decoder input [B, S, D] for text ids whose first column is BOS: S = T + N, and one more with
        proprioception (which is not looked at without). Text column t >= 1 is column t + S - T."""
        text_BTD = self.language_model.model.embed_tokens(text_BT)
        parts = [text_BTD[:, :1], image_tokens_BND]
        if self.proprio_projector is not None:
            if proprio_BP is None:
                raise ValueError("this network reads proprioception; none was given")
            parts.append(self.proprio_projector(proprio_BP))
        return torch.cat([*parts, text_BTD[:, 1:]], dim=1)

    def forward(self, batch: DecisionBatch, image_tokens_BND: torch.Tensor | None = None) -> torch.Tensor:
        """Teacher-forced logits over the action tokens, [B, L, bins]; entry l predicts chunk element l."""
        hidden_BLD = self.action_hidden(batch, image_tokens_BND)
        head = self.language_model.lm_head.weight[self.action_first_id : self.action_stop_id]
        return F.linear(hidden_BLD, head)

    def action_hidden(
        self, batch: DecisionBatch, image_tokens_BND: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Teacher-forced decoder outputs [B, L, D], of which entry l predicts chunk element l.

        `language_model.lm_head` makes logits over the whole vocabulary of them, the distribution that published
        checkpoints were trained with; `forward` is that over the action tokens alone.
        """
        if image_tokens_BND is None:
            image_tokens_BND = self.encode_images(batch.agentview_BHWC, batch.wrist_BHWC)
        length = batch.chunk_BL.shape[1]
        steps = torch.arange(length, device=batch.chunk_BL.device)
        prompt_BT, mask_BT = real_first(batch)
        prompt_B1 = mask_BT.sum(dim=1, keepdim=True)
        # Action tokens follow each prompt's last real token directly. All padding then lies at the end, where
        # causal attention cannot see it: no mask, and positions count up from 0 in every row.
        text_BT = F.pad(prompt_BT, (0, length - 1))
        text_BT = text_BT.scatter(1, prompt_B1 + steps[:-1], batch.chunk_BL[:, :-1])
        embeddings = self.embed(text_BT, image_tokens_BND, batch.proprio_BP)
        hidden = self.language_model.model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
        read_BL = embeddings.shape[1] - text_BT.shape[1] + prompt_B1 - 1 + steps
        return hidden.gather(1, read_BL.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))

    def read(
        self,
        text_BT: torch.Tensor,
        image_tokens_BND: torch.Tensor,
        proprio_BP: torch.Tensor | None = None,
        labels_BT: torch.Tensor | None = None,
    ) -> Reading:
        """One pass over whole right-padded texts; where a text is padding, what comes out means nothing.

        With labels (-100: none) also the loss that published checkpoints were trained with: mean cross-entropy of
        the labelled tokens, each predicted from what is before it, over the whole vocabulary.
        """
        embeddings = self.embed(text_BT, image_tokens_BND, proprio_BP)
        labels_BS = None
        if labels_BT is not None:
            extra = embeddings.shape[1] - text_BT.shape[1]
            none_BE = labels_BT.new_full((len(labels_BT), extra), IGNORED)
            labels_BS = torch.cat([labels_BT[:, :1], none_BE, labels_BT[:, 1:]], dim=1)
        out = self.language_model(
            inputs_embeds=embeddings, labels=labels_BS, use_cache=False, output_hidden_states=True
        )
        assert out.logits is not None
        assert out.hidden_states is not None
        return Reading(logits_BSV=out.logits, hidden_BSD=out.hidden_states, loss=out.loss)


def llama(part: DecoderPart, *, vocab_size: int, bos_id: int, pad_id: int) -> LlamaForCausalLM:
    """A Llama decoder (arXiv 2302.13971) with random weights from torch's current generator."""
    if part.width % part.heads or part.width // part.heads % 2:
        raise ValueError(
            f"decoder.width {part.width} must be an even multiple of decoder.heads {part.heads} (rotary pairs)"
        )
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=part.width,
            intermediate_size=part.mlp,
            num_hidden_layers=part.layers,
            num_attention_heads=part.heads,
            rms_norm_eps=1e-6,
            # Llama's own 0.02 is 1 / sqrt(width) at its width of thousands; at a hundred it starves every layer.
            initializer_range=part.width**-0.5,
            bos_token_id=bos_id,
            pad_token_id=pad_id,
            tie_word_embeddings=False,
        )
    )
