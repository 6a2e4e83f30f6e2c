"""What decodes an action's tokens after a prefix: torch here, vLLM in `policies.decoding.vllm_engine`.

Letters: B decisions, L tokens of a chunk, V action bins, S prefix tokens, D decoder width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from transformers import LlamaForCausalLM

from policies.decoding.modules import ModuleDecoder
from policies.decoding.packed import PackedDecoder


class Engine(Protocol):
    """What decodes chunks of L tokens after prefixes that the network embedded, V bins told apart."""

    def decode(
        self,
        language_model: LlamaForCausalLM,
        prefix_BSD: torch.Tensor,
        lengths: Sequence[int],
        *,
        seeds: Sequence[int],
        temperature: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Bins (ids less the first action id) int64 [L, B] and their log-probabilities float32 [L, B], at temperature
        1 over the action tokens alone, under the weights that `language_model` has now.

        Each token is the argmax of logits + temperature * `gumbel_noise` of its row's seed. The first `lengths[b]`
        entries of row b of the prefixes are real. Raises TypeError while an adapter sits on the decoder.
        """
        ...


class TorchEngine:
    """Decodes in torch, with a decoder made anew only after a weight has changed: packing one copies all of them."""

    def __init__(
        self,
        *,
        first_id: int,
        stop_id: int,
        tokens: int,
        decoder: type[PackedDecoder] | type[ModuleDecoder] = PackedDecoder,
    ) -> None:
        """Action ids `first_id`..`stop_id` - 1; a chunk is `tokens` of them."""
        self._first_id = first_id
        self._stop_id = stop_id
        self._tokens = tokens
        self._decoder = decoder
        self._made: tuple[Any, PackedDecoder | ModuleDecoder] | None = None

    def decode(
        self,
        language_model: LlamaForCausalLM,
        prefix_BSD: torch.Tensor,
        lengths: Sequence[int],
        *,
        seeds: Sequence[int],
        temperature: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Engine`."""
        stamp = tuple((tensor.data_ptr(), tensor._version) for tensor in language_model.parameters())
        if self._made is None or self._made[0] != stamp:
            decoder = self._decoder(language_model, first_id=self._first_id, stop_id=self._stop_id)
            self._made = (stamp, decoder)
        decoder = self._made[1]
        bins = self._stop_id - self._first_id
        noise = torch.zeros(self._tokens, len(seeds), bins)
        if temperature > 0:
            noise = temperature * gumbel_noise(seeds, self._tokens, bins)
        chosen, logits = decode(decoder, prefix_BSD, lengths, noise.to(prefix_BSD.device))
        return chosen, token_logps(logits, chosen)


def decode(
    decoder: PackedDecoder | ModuleDecoder,
    prefix_BSD: torch.Tensor,
    lengths: Sequence[int],
    noise_LBV: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode one token per leading entry of `noise_LBV`, each the argmax of logits + noise over the decoder's ids.

    Returns them less the decoder's first id, int64 [L, B], and the logits without noise, float32 [L, B, V].
    """
    length = len(noise_LBV)
    decoding = decoder.start(prefix_BSD, lengths, length - 1)
    chosen, logits = [], []
    for step, noise_BV in enumerate(noise_LBV.unbind(0)):
        logits_BV = decoder.logits(decoding.hidden_BD)
        bins_B = (logits_BV + noise_BV).argmax(dim=-1)
        chosen.append(bins_B)
        logits.append(logits_BV)
        if step < length - 1:
            decoding.step(step, decoder.embeddings[bins_B])
    return torch.stack(chosen), torch.stack(logits)


def gumbel_noise(seeds: Sequence[int], length: int, bins: int) -> torch.Tensor:
    """Standard Gumbel noise float32 [L, B, V]; column b comes from a counter-based generator (Philox) keyed by
    `seeds[b]`, and from nothing else. argmax(logits + noise) is then a draw from softmax(logits)."""
    columns = [
        np.random.Generator(np.random.Philox(key=seed)).standard_exponential((length, bins), dtype=np.float32)
        for seed in seeds
    ]
    # The ziggurat can return 0, whose Gumbel value would be infinite.
    exponential = np.maximum(np.stack(columns, axis=1), np.finfo(np.float32).tiny)
    return torch.from_numpy(-np.log(exponential))


def token_logps(logits_BLV: torch.Tensor, chosen_BL: torch.Tensor) -> torch.Tensor:
    """Log-probabilities [B, L] of the entries `chosen_BL` (0..V - 1) of each softmax."""
    return torch.log_softmax(logits_BLV, dim=-1).gather(-1, chosen_BL.unsqueeze(-1)).squeeze(-1)
