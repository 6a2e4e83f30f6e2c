"""Conditional flow matching as a likelihood surrogate: one squared velocity error per chunk, under common noise.

Lipman et al. 2023, arXiv 2210.02747 (flow matching). Liu et al. 2025, arXiv 2501.13918 (Flow-DPO). CrossVLA, arXiv
2605.21854 (the score of an action chunk over stratified times). McAllister et al. 2025, arXiv 2507.21053 (FPO: the
difference of flow-matching losses under common draws stands in for a log-ratio).

Time runs as in openpi: t = 1 is noise, t = 0 is data.

Letters: B chunks, S draws of one chunk, K actions of a chunk, A dimensions of an action.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from objectives.counter_noise import generator

TimeDensity = Literal["uniform", "beta"]
"""Uniform on [0.001, 1], or openpi's training density there, 0.999 Beta(1.5, 1) + 0.001."""
_JITTER, _NOISE = 0, 1
"""Streams of one key."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FlowDraws:
    """Where a chunk's velocity is asked for. The same key gives the same draws: policy and reference, chosen and
    rejected are told apart by their velocities, not by luck."""

    times_BS: torch.Tensor
    """float32 in [0.001, 1]."""
    noise_BSKA: torch.Tensor
    """float32, standard normal."""


def draw(
    keys: Sequence[int],
    *,
    draws: int,
    shape: tuple[int, int],
    density: TimeDensity = "uniform",
) -> FlowDraws:
    """S = `draws` times and noises for each of B `keys` (0 .. 2^64 - 1), for chunks of `shape` [K, A].

    Draw s of a key comes from a counter-based generator (Philox) keyed by (key, s) and from nothing else: not from
    the batch, nor from the other draws. Times are stratified. Raises ValueError for no draws or a key out of range.
    """
    if draws < 1:
        raise ValueError(f"a score needs at least one draw, got {draws}")
    jitter = [[generator(key, s, _JITTER).random() for s in range(draws)] for key in keys]
    noise = [
        [generator(key, s, _NOISE).standard_normal(shape, dtype=np.float32) for s in range(draws)]
        for key in keys
    ]
    return FlowDraws(
        times_BS=stratified_times(torch.tensor(jitter), density=density),
        noise_BSKA=torch.from_numpy(np.asarray(noise, np.float32)).reshape(len(keys), draws, *shape),
    )


def stratified_times(jitter_BS: torch.Tensor, *, density: TimeDensity = "uniform") -> torch.Tensor:
    """One time in each of S strata of equal probability: t_s = 0.001 + 0.999 F^-1((s - 1 + xi_s) / S), s = 1 .. S.

    `jitter_BS` float [B, S] holds xi in [0, 1): uniform draws make the mean over s unbiased for the density, 0.5
    gives the strata's midpoints (CrossVLA's 0.125, 0.375, 0.625, 0.875 for S = 4).
    """
    strata = jitter_BS.shape[-1]
    levels = (torch.arange(strata, device=jitter_BS.device) + jitter_BS) / strata
    if density == "beta":
        levels = levels ** (2 / 3)  # Beta(1.5, 1) has the distribution function t^1.5
    return 0.001 + 0.999 * levels


def noisy_chunk(clean: torch.Tensor, noise: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
    """x_t = t eps + (1 - t) a, float [..., K, A] of chunks and noise likewise and times [...]: what the network is
    shown beside t."""
    t = times[..., None, None]
    return t * noise + (1 - t) * clean


def velocity_errors(velocity: torch.Tensor, clean: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Squared error of each element against the path's own velocity u = eps - a, all float [..., K, A]."""
    return (velocity - (noise - clean)).square()


def flow_losses(
    velocity_BSKA: torch.Tensor, noise_BSKA: torch.Tensor, clean_BKA: torch.Tensor, valid_BKA: torch.Tensor
) -> torch.Tensor:
    """Mean squared error of the velocity against u = eps - a over each chunk's valid elements, float [B, S].

    `valid_BKA` bool leaves out padded dimensions and actions that were never executed. The mean over S is the chunk's
    score ell. Raises ValueError naming a chunk without valid elements. By chunk, as published, and not trained with:
    it is here to be compared with recorded numbers (`policies.parity`); `policies.flow` scores by element.
    """
    counts = valid_BKA.sum(dim=(-2, -1))
    if not bool(counts.all()):
        raise ValueError(f"chunk {int((counts == 0).nonzero()[0])} has no valid element to score")
    errors = velocity_errors(velocity_BSKA, clean_BKA[:, None], noise_BSKA)
    return torch.where(valid_BKA[:, None], errors, 0).sum(dim=(-2, -1)) / counts[:, None]


def log_ratios(policy_losses: torch.Tensor, reference_losses: torch.Tensor) -> torch.Tensor:
    """(ell_ref - ell_theta) / 2, of the losses' shape: what stands in for log(pi / pi_ref).

    Both sides must be of the same draws. With beta in front it is the implicit reward r of Flow-DPO, so
    `objectives.dpo.sigmoid_loss` of it is Flow-DPO, -log sigma(-(beta / 2) ((ell_w - ref_w) - (ell_l - ref_l))), with
    a constant beta. On means over elements beta is of the order of 100 to 5000, not the 0.1 of summed log-probs.
    As `flow_losses`, it is here to be compared with recorded numbers and not trained with.
    """
    return (reference_losses - policy_losses) / 2
