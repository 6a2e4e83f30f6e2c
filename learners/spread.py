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

    nats: float
    """Standard deviation of the differences of log-ratio sums that beta multiplies."""
    pairs: int
    """They were taken over."""

    def in_force(self, part: PreferencePart) -> PreferencePart:
        """The part with its beta: the recipe's, or one that makes the logits' standard deviation 1, with the weight
        such that an undecided pair presses as before; so beta alone says where pairs saturate, not how hard they pull
        beside the likelihood terms."""
        if part.beta is not None or not self.nats:
            return part
        beta = 1 / self.nats
        weight = part.preference_weight * part.first_beta / beta
        return part.model_copy(update={"beta": beta, "preference_weight": weight})

    def metrics(self, part: PreferencePart) -> dict[str, float]:
        """For the report of the update that looked: `logit_std` under the beta that it began with, the beta that would
        have made that 1, and how many pairs were looked at."""
        said = {"logit_std": part.first_beta * self.nats, "spread_pairs": float(self.pairs)}
        return said | ({"beta_for_unit_std": 1 / self.nats} if self.nats else {})


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
    return Spread(nats=margins.double().std().item(), pairs=len(margins))
