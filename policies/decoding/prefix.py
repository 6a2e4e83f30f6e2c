"""What tokens decided at once look back on: the embedded prefix, its keys and values, and who attends to whom.

Letters: B observations, R rows of a suffix pass (B observations, each repeated), P prefix tokens, T suffix
tokens, N tokens of both, K key-value heads, Z features of a head, D width of the language model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn


@dataclass(frozen=True, kw_only=True, slots=True)
class Prefix:
    """Embedded images and prompt, before attention."""

    tokens_BPD: torch.Tensor
    mask_BP: torch.Tensor
    """bool: the tokens that exist. False for an absent camera's and for padding of the prompt."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefixCache:
    """Keys and values of a prefix, computed once and read by any number of suffix passes.

    Handed to the attention of Gemma or Llama as its `past_key_values`. A pass never writes to it, so passes share
    it freely, under autograd too. `repeat` lets several chunks of one observation share a row.
    """

    keys: tuple[torch.Tensor, ...]
    """Per layer [B, K, P, Z], after the rotary embedding."""
    values: tuple[torch.Tensor, ...]
    """Per layer [B, K, P, Z]."""
    mask_BP: torch.Tensor
    """bool, as in `Prefix`; keys and values elsewhere mean nothing."""
    hidden_BPD: torch.Tensor
    """The language model's last hidden state, for heads that read the observation."""
    repeats: int = 1
    """Rows of a suffix pass per observation."""

    @property
    def rows(self) -> int:
        """R, rows that a suffix pass must bring."""
        return len(self.mask_BP) * self.repeats

    def repeat(self, times: int) -> PrefixCache:
        """The same prefixes for `times` as many rows, those of one observation side by side. Copies nothing."""
        return replace(self, repeats=self.repeats * times)

    def update(
        self, keys_RKTZ: torch.Tensor, values_RKTZ: torch.Tensor, layer_idx: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [R, K, P + T, Z] that layer `layer_idx` attends to. The name is transformers'; nothing
        is updated."""
        return self._followed_by(self.keys[layer_idx], keys_RKTZ), self._followed_by(
            self.values[layer_idx], values_RKTZ
        )

    def _followed_by(self, prefix_BKPZ: torch.Tensor, suffix_RKTZ: torch.Tensor) -> torch.Tensor:
        suffix = suffix_RKTZ.unflatten(0, (len(prefix_BKPZ), self.repeats))
        prefix = prefix_BKPZ.unsqueeze(1).expand(-1, self.repeats, -1, -1, -1)
        return torch.cat([prefix, suffix], dim=-2).flatten(0, 1)


def attention_mask(valid_BN: torch.Tensor, starts_N: torch.Tensor, *, first: int = 0) -> torch.Tensor:
    """Who attends to whom, bool [B, N - first, N]: entry [b, q, k] lets token first + q look at token k.

    Each True of `starts_N` opens a block; a token sees its own block and those before it, and only tokens that
    exist (`valid_BN`). Rows of tokens that do not exist are filled likewise: nobody reads what comes of them, and
    a row that sees nothing would be NaN.
    """
    block_N = starts_N.cumsum(0)
    return (block_N <= block_N[first:, None]) & valid_BN[:, None, :]


def positions(valid_BN: torch.Tensor) -> torch.Tensor:
    """Rotary positions int64 [B, N]: tokens that do not exist take up none."""
    return valid_BN.cumsum(dim=1) - 1


def encode_prefix(model: nn.Module, prefix: Prefix) -> PrefixCache:
    """Run a language model over the prefix, every token attending to every other that exists."""
    starts_P = torch.zeros(prefix.mask_BP.shape[1], dtype=torch.bool, device=prefix.mask_BP.device)
    output = model(
        inputs_embeds=prefix.tokens_BPD,
        attention_mask=attention_mask(prefix.mask_BP, starts_P).unsqueeze(1),
        position_ids=positions(prefix.mask_BP),
        use_cache=True,
    )
    layers = output.past_key_values.layers
    return PrefixCache(
        keys=tuple(layer.keys for layer in layers),
        values=tuple(layer.values for layer in layers),
        mask_BP=prefix.mask_BP,
        hidden_BPD=output.last_hidden_state,
    )


def suffix_places(cache: PrefixCache, starts_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For a pass of T tokens after the prefixes, all of which exist: who attends to whom, bool [R, 1, T, N], and rotary
    positions int64 [R, T]. `starts_T` as in `attention_mask`."""
    batch, first = cache.mask_BP.shape
    valid_BN = torch.cat([cache.mask_BP, cache.mask_BP.new_ones(batch, len(starts_T))], dim=1)
    starts_N = torch.cat([starts_T.new_zeros(first), starts_T])
    mask_BTN = attention_mask(valid_BN, starts_N, first=first)
    return (
        mask_BTN.repeat_interleave(cache.repeats, dim=0).unsqueeze(1),
        positions(valid_BN)[:, first:].repeat_interleave(cache.repeats, dim=0),
    )
