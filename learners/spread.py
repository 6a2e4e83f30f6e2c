"""How far beta spreads the logits of a run's pairs, and the beta that would spread them by 1.

DPO's sigmoid tells clear pairs from doubtful ones only where its logits, beta times the margins, differ by about 1: far
below, every pair presses alike and nothing ever saturates; far above, a few pairs are all that is learned from. What
margins an update reaches depends on the paradigm's score, the length of what is summed, and the learning rate, so
that no beta is right for all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from configs.preference import PreferencePart
from learners.decisions import DecisionPool
from learners.terms import Draw, pair_margins, refer

AFTER_STEPS = 50
"""Optimizer steps of the first update after which margins are looked at; fewer where it has fewer."""
PAIRS = 100
"""Pairs that are looked at, or as many as there are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """The margins of a run's pairs, as its first update left them after AFTER_STEPS."""

    margin_std: float
    """Standard deviation, nats: of the differences of log-ratio sums that beta multiplies."""
    pairs: int
    """They were taken over."""

    def in_force(self, part: PreferencePart) -> PreferencePart:
        """The part with its beta: the recipe's, or one that makes the logits' standard deviation 1, with the weight
        such that an undecided pair presses as before; so beta alone says where pairs saturate, not how hard they pull
        beside the likelihood terms."""
        if part.beta is not None or not self.margin_std:
            return part
        beta = 1 / self.margin_std
        weight = part.preference_weight * part.first_beta / beta
        return part.model_copy(update={"beta": beta, "preference_weight": weight})

    def metrics(self, part: PreferencePart) -> dict[str, float]:
        """For a report: `logit_std` under the beta that the update began with, `beta_for_unit_std`, `spread_pairs`; and
        the `beta` in force."""
        said = {"logit_std": part.first_beta * self.margin_std, "spread_pairs": float(self.pairs)}
        if self.margin_std:
            said["beta_for_unit_std"] = 1 / self.margin_std
        return said | {"beta": self.in_force(part).first_beta}


def spread(draws: Iterator[Draw], pool: DecisionPool, part: PreferencePart) -> Spread | None:
    """Of up to PAIRS pairs of these draws, under the weights as they are; None of fewer than two, or where a margin is
    not finite, which the tripwire is there for."""
    margins = torch.empty(0)
    for draw in draws:
        if len(margins) >= PAIRS or not refer(draw, pool, part):
            break
        margins = torch.cat([margins, pair_margins(draw, pool, part).float().cpu()])
    if len(margins) < 2 or not margins.isfinite().all():
        return None
    return Spread(margin_std=margins.double().std().item(), pairs=len(margins))
