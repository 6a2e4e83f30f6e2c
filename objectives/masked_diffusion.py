"""Masked (absorbing) discrete diffusion over the tokens of a chunk: masks, an unbiased bound, parallel decoding.

Hoogeboom et al. 2021, arXiv 2110.02037 (ARDM: the order-agnostic bound). Chang et al. 2022, arXiv 2202.04200
(MaskGIT: the cosine schedule and decoding by confidence). Discrete Diffusion VLA, arXiv 2508.20072 (both for action
chunks).

Letters: B chunks, S draws of one chunk, L tokens of a chunk, V vocabulary, K decoding iterations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from objectives.counter_noise import generator

_LEVEL, _ORDER, _TOKENS, _CHOICE = 0, 1, 2, 3
"""Streams of one key."""
_TINY = float(np.finfo(np.float32).tiny)
_FLOOR = 1e-20
"""What the released decoder adds to a probability before its logarithm."""


def uniform_counts(levels: torch.Tensor, length: int) -> torch.Tensor:
    """Tokens to mask, int64 of `levels`' shape: 1 + floor(L u), uniform on 1 .. L for u uniform on [0, 1)."""
    return (levels * length).floor().long().clamp(max=length - 1) + 1


def cosine_counts(levels: torch.Tensor, length: int) -> torch.Tensor:
    """Tokens to mask, int64 of `levels`' shape: round(L cos(pi u / 2)), at least 1. MaskGIT's training schedule."""
    return (length * torch.cos(math.pi / 2 * levels)).round().long().clamp(min=1)


def draw_masks(
    keys: Sequence[int],
    *,
    draws: int,
    length: int,
    counts: Callable[[torch.Tensor, int], torch.Tensor] = uniform_counts,
) -> torch.Tensor:
    """S = `draws` masks for each of B `keys` (0 .. 2^64 - 1), bool [B, S, L], true at what is hidden (>= 1 token).

    Draw s of a key comes from a counter-based generator (Philox) keyed by (key, s) and from nothing else, so that
    policy and reference, chosen and rejected can be scored under the same masks. The levels of a key's draws are
    stratified, u_s = (s - 1 + xi_s) / S, the hidden positions are a uniformly random subset. Raises ValueError for no
    draws or a key out of range.
    """
    if draws < 1:
        raise ValueError(f"a score needs at least one draw, got {draws}")
    levels = [[(s + generator(key, s, _LEVEL).random()) / draws for s in range(draws)] for key in keys]
    orders = [[generator(key, s, _ORDER).permutation(length) for s in range(draws)] for key in keys]
    hidden_BS = counts(torch.tensor(levels).reshape(len(keys), draws), length)
    ranks_BSL = torch.from_numpy(np.asarray(orders, np.int64)).reshape(len(keys), draws, length)
    return ranks_BSL < hidden_BS[..., None]


def bound_elements(logps_BSL: torch.Tensor, masks_BSL: torch.Tensor) -> torch.Tensor:
    """An unbiased estimate of the order-agnostic bound on log pi(chunk | observation), by token, float [B, L].

    `logps_BSL` are log-probabilities of the chunk's own tokens, each draw's given the tokens that its mask
    (`draw_masks` with `uniform_counts`) leaves visible. ARDM: log p(x) >= E_t[D L_t], where D is the length and
    L_t = 1 / (D - t + 1) * E_order[sum of log p(x_k | the first t - 1 in the order) over the rest]. With m = D - t + 1
    hidden tokens, uniform on 1 .. L, a uniformly random subset of that size and stratified draws, the mean over s of
    (L / m_s) * (sum of the hidden tokens' log-probabilities) has that bound as its mean. The sum over L of what is
    returned is this estimate. Differentiable; visible tokens get no gradient.
    """
    hidden = masks_BSL.sum(dim=-1, keepdim=True)
    weighted = torch.where(masks_BSL, logps_BSL, 0) * (masks_BSL.shape[-1] / hidden)
    return weighted.mean(dim=1)


def masked_losses(logps_BSL: torch.Tensor, masks_BSL: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy over each draw's hidden tokens, nats, float [B, S]: the training loss of MaskGIT and of
    Discrete Diffusion VLA (with `cosine_counts`). Unlike the bound it weighs every mask size alike."""
    return -torch.where(masks_BSL, logps_BSL, 0).sum(dim=-1) / masks_BSL.sum(dim=-1)


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodingNoise:
    """Standard Gumbel noise of a decoding, drawn for each request from its own key."""

    tokens_KBLV: torch.Tensor
    choice_KBL: torch.Tensor


def decoding_noise(keys: Sequence[int], *, iterations: int, length: int, vocabulary: int) -> DecodingNoise:
    """Noise for B `keys` (0 .. 2^64 - 1); column b comes from a counter-based generator (Philox) keyed by `keys[b]` and
    from nothing else."""

    def gumbel(stream: int, shape: tuple[int, ...]) -> torch.Tensor:
        columns = [generator(key, 0, stream).standard_exponential(shape, dtype=np.float32) for key in keys]
        # The ziggurat can return 0, whose Gumbel value would be infinite.
        return torch.from_numpy(-np.log(np.maximum(np.stack(columns, axis=1), _TINY)))

    return DecodingNoise(
        tokens_KBLV=gumbel(_TOKENS, (iterations, length, vocabulary)),
        choice_KBL=gumbel(_CHOICE, (iterations, length)),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelDecoding:
    """Every iteration of a decoding."""

    samples_KBL: torch.Tensor
    """int64, the chunk as each iteration completed it; the last is the result."""
    masks_KBL: torch.Tensor
    """bool, what was hidden again after each iteration (after the last one too, though nothing follows)."""
    confidences_KBL: torch.Tensor
    """float32, what hidden tokens were chosen by, lowest first; infinite where a token may not be hidden again."""


def parallel_decode(
    logits_of: Callable[[torch.Tensor], torch.Tensor],
    tokens_BL: torch.Tensor,
    noise: DecodingNoise,
    *,
    mask_id: int,
    temperature: float = 1.0,
    choice_temperature: float = 1.0,
    use_remask: bool = False,
    start: int = 0,
    as_released: bool = False,
) -> ParallelDecoding:
    """Fill the tokens of `tokens_BL` int64 that are `mask_id`, all at once, K times; keep the most confident ones.

    `logits_of(tokens [B, L])` gives logits float [B, L, V], row by row. An iteration with ratio r = (k + 1) / K samples
    every hidden token (argmax of logits + temperature * Gumbel; temperature 0 is greedy) and hides
    `remask_counts(...)` of them again: the lowest of log p + choice_temperature (1 - r) Gumbel, p being the sample's
    probability at temperature 1. With `use_remask` decoded tokens compete too, their present probability scaled by
    1 - r; otherwise they stay. Tokens given at the start always stay, `mask_id` itself is never drawn, and no row
    depends on another. `noise` is of the iterations from `start` on. Raises ValueError for a row with nothing to fill.

    `start` and `as_released` are here to be compared with recorded numbers alone (`policies.parity`); the latter is
    Discrete Diffusion VLA's decoder to the letter: `mask_id` is drawn like any token, given tokens compete too under
    `use_remask`, a lone hidden one is drawn anew each time, and ties with the least confident that stays are all kept.
    """
    given_BL = tokens_BL != mask_id
    unknown_B = (~given_BL).sum(dim=-1)
    if not bool(unknown_B.all()):
        raise ValueError(f"row {int((unknown_B == 0).nonzero()[0])} has no token {mask_id} to fill")
    iterations = start + len(noise.choice_KBL)
    samples, masks, confidences = [], [], []
    for k, (token_noise_BLV, choice_BL) in enumerate(
        zip(noise.tokens_KBLV, noise.choice_KBL, strict=True), start=start
    ):
        ratio = (k + 1) / iterations
        hidden_BL = tokens_BL == mask_id
        logits_BLV = logits_of(tokens_BL).float()
        if not as_released and 0 <= mask_id < logits_BLV.shape[-1]:
            logits_BLV = logits_BLV.index_fill(
                -1, torch.tensor(mask_id, device=logits_BLV.device), -torch.inf
            )
        drawn_BL = (logits_BLV + temperature * token_noise_BLV.to(logits_BLV)).argmax(dim=-1)
        samples_BL = torch.where(hidden_BL, drawn_BL, tokens_BL)
        stays_BL = given_BL & (not as_released) if use_remask else ~hidden_BL
        confidence_BL = _confidence(
            logits_BLV, samples_BL, hidden_BL | stays_BL, ratio=ratio, floor=_FLOOR if as_released else 0.0
        )
        confidence_BL += choice_temperature * (1 - ratio) * choice_BL.to(confidence_BL)
        confidence_BL = torch.where(stays_BL, torch.inf, confidence_BL)
        counts_B = remask_counts(unknown_B, k, iterations)
        masked_BL = (_below_cut if as_released else _lowest)(confidence_BL, counts_B)
        tokens_BL = torch.where(masked_BL, mask_id, samples_BL)
        samples.append(samples_BL)
        masks.append(masked_BL)
        confidences.append(confidence_BL)
    return ParallelDecoding(
        samples_KBL=torch.stack(samples),
        masks_KBL=torch.stack(masks),
        confidences_KBL=torch.stack(confidences),
    )


def remask_counts(unknown_B: torch.Tensor, k: int, iterations: int) -> torch.Tensor:
    """Tokens that stay hidden after iteration k of K, int64 [B]: floor(L cos(pi / 2 (k + 1) / K)), within 1 .. L - 1,
    L being how many were hidden at the start.

    In float32, as the released decoder computes it: where (k + 1) / K is 2 / 3 the cosine is just below one half, so
    56 tokens leave 27 hidden, not 28.
    """
    share = torch.cos(math.pi / 2 * torch.tensor((k + 1) / iterations))
    counts_B = (unknown_B.float() * share.to(unknown_B.device)).floor().long()
    return counts_B.clamp(min=1).minimum(unknown_B - 1)


def _confidence(
    logits_BLV: torch.Tensor,
    samples_BL: torch.Tensor,
    fresh_BL: torch.Tensor,
    *,
    ratio: float,
    floor: float,
) -> torch.Tensor:
    """log(p + floor) of every sample, float32 [B, L]; of those that are not `fresh_BL` p counts times 1 - r."""
    logps_BLV = torch.log_softmax(logits_BLV, dim=-1)
    known_BL = samples_BL.clamp(0, logits_BLV.shape[-1] - 1)  # given tokens may lie outside the vocabulary
    logps_BL = logps_BLV.gather(-1, known_BL[..., None]).squeeze(-1)
    penalty = math.log(1 - ratio) if ratio < 1 else -math.inf
    logps_BL = torch.where(fresh_BL, logps_BL, logps_BL + penalty)
    return torch.logaddexp(logps_BL, torch.full_like(logps_BL, math.log(floor))) if floor else logps_BL


def _lowest(confidence_BL: torch.Tensor, counts_B: torch.Tensor) -> torch.Tensor:
    """The so many least confident of each row, bool [B, L]."""
    # Stable, so that equal confidences hide the earlier token whatever the batch.
    ranks_BL = confidence_BL.argsort(dim=-1, stable=True).argsort(dim=-1)
    return ranks_BL < counts_B[:, None]


def _below_cut(confidence_BL: torch.Tensor, counts_B: torch.Tensor) -> torch.Tensor:
    """What lies below the confidence of that rank, which is 1 at least, bool [B, L]."""
    ranks_B = counts_B.clamp(min=1, max=confidence_BL.shape[-1] - 1)
    return confidence_BL < confidence_BL.sort(dim=-1).values.gather(-1, ranks_B[:, None])
