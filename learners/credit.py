"""Which decisions of a trajectory its outcome hangs on: the rise and fall of the chance of success along it.

A failed episode runs to its step limit, most of it long after the grasp was missed. A preference between whole
trajectories then mostly lowers what the policy does where nothing can be saved. Here a linear probe estimates the
chance of success from what the policy sees, and a decision's credit is the change that follows it: generalised
advantage estimation with discount 1 and the outcome as the only reward (Schulman et al. 2016, arXiv 1506.02438,
Eq. 16). Its trace reaches back from where a loss shows (the gripper closes on nothing) to what caused it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

TRACE = 0.7
"""Lambda: how much of a later change each earlier decision shares in."""
FOLDS = 5
RIDGE = 1e-3
"""Weight of the squared coefficients (of standardised features) in the probe's mean log loss."""


def credits(
    features: Sequence[torch.Tensor], successes: Sequence[bool], groups: Sequence[int]
) -> list[torch.Tensor]:
    """Credit of every decision, float32 [T] per trajectory: the sum over decisions l steps ahead of TRACE^l times
    V(next state) - V(state), V being the estimated chance of success and the last next value the outcome itself.

    `features` float [T, F] per trajectory, one row per decision. A trajectory's values come from a probe that was
    fitted to other groups (say, other initial states), so it has not seen the outcome it explains; where the other
    groups have only successes, or only failures, the probe is fitted to all trajectories.
    """
    values = _values(features, torch.tensor(successes, dtype=torch.float32), torch.tensor(groups))
    ends = [value.new_tensor([float(success)]) for value, success in zip(values, successes, strict=True)]
    changes = [torch.cat([value[1:], end]) - value for value, end in zip(values, ends, strict=True)]
    return [_traced(change) for change in changes]


def decisive(credit: torch.Tensor, *, success: bool, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The up to `most` decisions that did most for the outcome, as indices int64 [n] and weights float [n] > 0 that
    sum to 1: in proportion to what they gained in a success, to what they lost in a failure."""
    moved = (credit if success else -credit).clamp_min(0)
    weights, indices = moved.topk(min(most, len(moved)))
    weights = weights.clamp_min(1e-6)
    return indices, weights / weights.sum()


def _traced(changes: torch.Tensor) -> torch.Tensor:
    credit = changes.clone()
    for k in range(len(credit) - 2, -1, -1):
        credit[k] += TRACE * credit[k + 1]
    return credit


def _values(
    features: Sequence[torch.Tensor], outcomes: torch.Tensor, groups: torch.Tensor
) -> list[torch.Tensor]:
    standard = _standardised(features)
    order = {group: i for i, group in enumerate(groups.unique().tolist())}
    folds = torch.tensor([order[group] % FOLDS for group in groups.tolist()])
    values: list[torch.Tensor] = [torch.empty(0)] * len(standard)
    for fold in folds.unique():
        held_out = folds == fold
        # One kind of outcome teaches nothing: then it is all of them, its own included.
        seen = ~held_out if len(outcomes[~held_out].unique()) == 2 else torch.ones_like(held_out)
        probe = _fit([standard[i] for i in seen.nonzero().flatten()], outcomes[seen])
        for i in held_out.nonzero().flatten().tolist():
            values[i] = torch.sigmoid(standard[i] @ probe[:-1] + probe[-1])
    return values


def _standardised(features: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    joined = torch.cat(list(features)).float()
    mean, deviation = joined.mean(0), joined.std(0, correction=0) + 1e-6
    return [(rows.float() - mean) / deviation for rows in features]


def _fit(features: Sequence[torch.Tensor], outcomes: torch.Tensor) -> torch.Tensor:
    """Logistic regression of the outcome, every trajectory weighing the same: coefficients, then the intercept,
    float32 [F + 1]."""
    inputs = torch.cat(list(features))
    targets = torch.cat([outcome.expand(len(rows)) for rows, outcome in zip(features, outcomes, strict=True)])
    weights = torch.cat([torch.full((len(rows),), 1 / len(rows)) for rows in features]) / len(features)
    probe = torch.zeros(inputs.shape[1] + 1, requires_grad=True)
    optimizer = torch.optim.LBFGS([probe], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> float:
        optimizer.zero_grad()
        logits = inputs @ probe[:-1] + probe[-1]
        value = F.binary_cross_entropy_with_logits(logits, targets, weight=weights, reduction="sum")
        value = value + RIDGE * probe[:-1].square().sum()
        value.backward()
        return value.item()

    optimizer.step(loss)
    return probe.detach()
