"""Direct preference optimisation on single decisions and on whole trajectories.

Rafailov et al. 2023, arXiv 2305.18290 (DPO). Gheshlaghi Azar et al. 2023, arXiv 2310.12036 (IPO). Mitchell
2023, "A note on DPO with noisy preferences" (conservative DPO). Chowdhury et al. 2024, arXiv 2403.00409 (robust
DPO). Zhang et al. 2024, arXiv 2411.19309 (GRAPE: DPO with the log-ratio summed over a trajectory inside one
sigmoid). FlowPRO, arXiv 2606.05468 (RPRO's proximal term).

A log-ratio is log(pi / pi_ref) where likelihoods are exact, or an estimate that stands in for it: the difference of
two bounds (`objectives.masked_diffusion.bound_elements`), or of two flow-matching errors, which a policy scores by
element and on a scale of its own (`policies.flow`; by chunk, as published: `objectives.flow_matching.log_ratios`).
Every loss here takes either.

Letters: P pairs, D decisions, L elements (tokens) of a chunk, N trajectories.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True, kw_only=True, slots=True)
class PreferenceLoss:
    """What a batch of pairs gives, all float [P]; `losses.mean()` is the batch's loss."""

    losses: torch.Tensor
    """Per pair, nats in the sigmoid form."""
    chosen_rewards: torch.Tensor
    """Implicit reward beta * log-ratio of the chosen side (DPO Eq. 5 up to the partition term), detached."""
    rejected_rewards: torch.Tensor
    """The same for the rejected side, detached."""


def sigmoid_loss(
    chosen_log_ratios: torch.Tensor,
    rejected_log_ratios: torch.Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> PreferenceLoss:
    """DPO, Eq. 7: -log sigma(beta h), h = chosen minus rejected log(pi / pi_ref), each summed over tokens.

    Log-ratios are float [P]. With label smoothing e in [0, 0.5) this is conservative DPO,
    -(1 - e) log sigma(beta h) - e log sigma(-beta h), e being the assumed share of flipped labels: no recipe sets it,
    it is here to be compared with recorded numbers (`policies.parity`).
    """
    logits = beta * (chosen_log_ratios - rejected_log_ratios)
    losses = -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)
    return _with_rewards(losses, chosen_log_ratios, rejected_log_ratios, beta)


def robust_loss(
    chosen_log_ratios: torch.Tensor,
    rejected_log_ratios: torch.Tensor,
    *,
    beta: float,
    label_smoothing: float,
) -> PreferenceLoss:
    """Robust DPO: (-(1 - e) log sigma(beta h) + e log sigma(-beta h)) / (1 - 2 e), e in [0, 0.5) the share of
    flipped labels. Over those flips its mean is the DPO loss of the true labels, so single losses can be negative.

    Log-ratios are float [P]. Raises ValueError for e outside [0, 0.5), where no such estimate exists. No recipe trains
    with it: it is here to be compared with recorded numbers (`policies.parity`).
    """
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must lie in [0, 0.5) for robust DPO, got {label_smoothing}")
    logits = beta * (chosen_log_ratios - rejected_log_ratios)
    losses = -(1 - label_smoothing) * F.logsigmoid(logits) + label_smoothing * F.logsigmoid(-logits)
    losses = losses / (1 - 2 * label_smoothing)
    return _with_rewards(losses, chosen_log_ratios, rejected_log_ratios, beta)


def proximal_loss(log_ratios: torch.Tensor, *, beta: float) -> torch.Tensor:
    """RPRO's proximal term, float [P]: -(log sigma(r) + log sigma(-r)) / 2 with r = beta * log-ratio, for either
    side of a pair. It is least, log 2, at r = 0 and grows as |r| / 2: a bound on how far a pair may move."""
    rewards = beta * log_ratios
    return -(F.logsigmoid(rewards) + F.logsigmoid(-rewards)) / 2


def ipo_loss(
    chosen_log_ratios: torch.Tensor, rejected_log_ratios: torch.Tensor, *, beta: float
) -> PreferenceLoss:
    """IPO, Eq. 17: (h - 1 / (2 beta))^2, a squared pull of h towards a finite margin.

    Log-ratios are float [P]: summed over tokens as in the paper, or divided by their own length for the
    convention of TRL, whose beta is then on the per-token scale.
    """
    h = chosen_log_ratios - rejected_log_ratios
    losses = (h - 1 / (2 * beta)).square()
    return _with_rewards(losses, chosen_log_ratios, rejected_log_ratios, beta)


def _with_rewards(
    losses: torch.Tensor, chosen: torch.Tensor, rejected: torch.Tensor, beta: float
) -> PreferenceLoss:
    return PreferenceLoss(
        losses=losses, chosen_rewards=beta * chosen.detach(), rejected_rewards=beta * rejected.detach()
    )


def bounded_below(log_ratios: torch.Tensor, *, floor: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum each chunk's log-ratios float [D, L] over its elements, held from below at -floor nats per element.

    A rejected chunk that has fallen past the floor gives no more gradient, so a preference loss cannot lower
    rejected (and, through shared weights, chosen) likelihoods without limit: likelihood displacement,
    Razin et al. 2024, arXiv 2410.08847.

    Returns the bounded sums, float [D], and which chunks are held, bool [D].
    """
    sums = log_ratios.sum(dim=-1)
    lowest = -floor * log_ratios.shape[-1]
    held = sums.detach() < lowest
    return torch.where(held, torch.full_like(sums, lowest), sums), held


def sum_by_trajectory(
    log_ratios: torch.Tensor, owners: torch.Tensor, weights: torch.Tensor, trajectories: int
) -> torch.Tensor:
    """Trajectory log-ratios, the inner sum of GRAPE's trajectory-wise preference loss, float [N].

    `log_ratios` float [D]; `owners` int64 [D], which of the N trajectories a decision belongs to; `weights`
    float [D]. When n of a trajectory's T decisions were drawn uniformly without replacement, weights of
    T / n make its sum unbiased.
    """
    sums = log_ratios.new_zeros(trajectories)
    return sums.index_add(0, owners, log_ratios * weights)
