"""What pi-0's action tokens look back on: the embedded prefix, its keys and values, and who attends to whom.

Letters: B observations, R rows of a suffix pass (B observations, each repeated), P prefix tokens, T suffix
tokens, N tokens of both, K key-value heads, Z features of a head, D width of the language model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class Prefix:
    """Embedded images and prompt, before attention."""

    tokens_BPD: torch.Tensor
    mask_BP: torch.Tensor
    """bool: the tokens that exist. False for an absent camera's and for padding of the prompt."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefixCache:
    """Keys and values of a prefix, computed once and read by any number of suffix passes.

    Handed to Gemma's attention as its `past_key_values`. A pass never writes to it, so passes share it freely,
    under autograd too. `repeat` lets several chunks of one observation share a row.
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
