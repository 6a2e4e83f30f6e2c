"""Incremental decoding through transformers' own modules, as they stand: in any dtype, with or without an adapter,
without a copy of the weights. What networks of billions of parameters decode with; `policies.decoding.packed` is the
quick form for small ones.

Letters: B sequences, S cache slots, D decoder width, V ids that decoding chooses from.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from transformers import DynamicCache, LlamaForCausalLM


class ModuleDecoder:
    """A decoder and the ids `first_id`..`stop_id` - 1 that decoding chooses from; all of them is 0..vocabulary."""

    def __init__(self, language_model: LlamaForCausalLM, *, first_id: int, stop_id: int) -> None:
        self.language_model = language_model
        self._head = language_model.lm_head.weight[first_id:stop_id]
        self.embeddings = language_model.model.embed_tokens.weight[first_id:stop_id]

    def logits(self, hidden_BD: torch.Tensor) -> torch.Tensor:
        """Logits float32 [B, V] of the decoder's output."""
        return F.linear(hidden_BD, self._head).float()

    def start(self, prefix_BSD: torch.Tensor, lengths: Sequence[int], steps: int) -> ModuleDecoding:
        """Run the prefixes; see `ModuleDecoding`. The cache grows as it must, so `steps` says nothing here."""
        return ModuleDecoding(self, prefix_BSD, lengths)


class ModuleDecoding:
    """Chunks being decoded: transformers' key/value cache of B sequences, and the output of their last token."""

    hidden_BD: torch.Tensor
    """The decoder's output, after its last norm, for the newest token of every row."""

    def __init__(self, decoder: ModuleDecoder, prefix_BSD: torch.Tensor, lengths: Sequence[int]) -> None:
        """Run the prefixes. The first `lengths[i]` tokens of row i are real and the rest padding."""
        self._model = decoder.language_model.model
        self._cache = DynamicCache(config=decoder.language_model.config)
        batch, filled, _ = prefix_BSD.shape
        self._ends_B = torch.tensor(lengths, device=prefix_BSD.device)
        # Padding comes after all that is real, where causal attention cannot see it; later tokens must not either.
        self._real_BS = torch.arange(filled, device=prefix_BSD.device) < self._ends_B[:, None]
        hidden = self._run(prefix_BSD, mask_BS=None, positions=None)
        self.hidden_BD = hidden[torch.arange(batch, device=prefix_BSD.device), self._ends_B - 1]

    def step(self, step: int, embeddings_BD: torch.Tensor) -> None:
        """Feed the chunk's token number `step` (0, 1, ... in turn) of every row; `hidden_BD` becomes its output."""
        self._real_BS = F.pad(self._real_BS, (0, 1), value=True)
        positions = (self._ends_B + step).unsqueeze(1)
        hidden = self._run(embeddings_BD.unsqueeze(1), mask_BS=self._real_BS, positions=positions)
        self.hidden_BD = hidden[:, 0]

    def _run(
        self, inputs_BSD: torch.Tensor, mask_BS: torch.Tensor | None, positions: torch.Tensor | None
    ) -> torch.Tensor:
        return self._model(
            inputs_embeds=inputs_BSD,
            attention_mask=mask_BS,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
        ).last_hidden_state
