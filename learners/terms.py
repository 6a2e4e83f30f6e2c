"""One optimizer step's draw of decisions, and the gradient of its loss, in micro-batches.

    loss =   preference_weight * mean over pairs of DPO(weighted log-ratio sums of the two trajectories)
           + proximal_weight   * mean over pairs of the proximal terms of both sums, before any bound
           + anchor_weight     * mean over the chosen decisions drawn of -log pi per token
           + success_weight    * mean over successful decisions drawn of -log pi per token
           + demo_weight       * mean over demonstrated decisions drawn of -log pi per token

A term of weight zero, or without data, is neither drawn nor computed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from configs.preference import PreferencePart
from learners.decisions import DecisionPool
from objectives import dpo


@dataclass(frozen=True, kw_only=True, slots=True)
class Side:
    """Decisions drawn from one trajectory."""

    rows: torch.Tensor
    """int64 [n], row numbers in the pool."""
    weights: torch.Tensor
    """float32 [n], what each one's log-ratio counts in the trajectory's sum."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Draw:
    """What one step looks at."""

    pairs: Sequence[tuple[Side, Side]]
    """Chosen and rejected."""
    successes: torch.Tensor
    """int64 rows, maybe none."""
    demos: torch.Tensor
    """int64 rows, maybe none."""
    noise: int = 0
    """The draw of noise of each side's, and each likelihood term's, first decision; see `DecisionPool.draws`."""


class Sums(defaultdict[str, float]):
    """Sums over the micro-batches of a step, by name."""

    def __init__(self) -> None:
        super().__init__(float)
        self.margins: list[float] = []
        """Of every pair."""

    def mean(self, name: str) -> float:
        return self[name] / self[f"{name}_count"]

    def add(self, name: str, values: torch.Tensor) -> None:
        """Add every element of `values`, detached."""
        self[name] += values.detach().double().sum().item()
        self[f"{name}_count"] += values.numel()


def accumulate_gradients(draw: Draw, pool: DecisionPool, part: PreferencePart) -> dict[str, float]:
    """Add the gradient of the step's loss to the adapter's `.grad`, and return the step's metrics.

    Metrics: `loss` and its unweighted terms `preference_loss`, `proximal_loss` (at least 2 log 2), `anchor_nll`,
    `success_nll`, `demo_nll` (nats; per token the last three); `accuracy`, share of pairs whose chosen implicit reward
    is the larger; `chosen_reward`, `rejected_reward`, `margin`, means over pairs; `margin_std`, the margin's (sample)
    standard deviation over the step's pairs, two at least: the spread of the logit that beta scales; `chosen_logratio`,
    `rejected_logratio`, means per token of log pi / pi_ref before any bound; `success_logratio`, the same over the
    successful decisions drawn; `kl`, minus the mean log-ratio over both sides' decisions; `held`, share of rejected
    decisions at the floor.
    """
    sums = Sums()
    for group in _groups(draw.pairs, part.micro_batch):
        _pair_gradients(group, draw, pool, part, sums)
    for name, weight, rows in (
        ("success_nll", part.success_weight, draw.successes),
        ("demo_nll", part.demo_weight, draw.demos),
    ):
        if len(rows):
            noise = pool.draws(len(rows), draw.noise)
            micro_batches = zip(rows.split(part.micro_batch), noise.split(part.micro_batch), strict=True)
            _likelihood_gradients(name, weight / len(rows), micro_batches, pool, sums)
    return _metrics(sums, part)


def lowest_logratio(metrics: Mapping[str, float]) -> float:
    """What the tripwire watches: of the chosen decisions (with value credit the few decisive ones) and of the
    successful ones (drawn from all), the lower mean log-ratio per token; NaN where one is, 0 where neither was
    drawn."""
    found = [metrics[name] for name in ("chosen_logratio", "success_logratio") if name in metrics]
    # Python's min passes over a NaN that does not come first.
    return float(np.min(found)) if found else 0.0


def refer(draw: Draw, pool: DecisionPool, part: PreferencePart) -> bool:
    """Have the pool compute every reference that the terms of a draw compare with; whether all are finite."""
    chosen, rejected = _sides(draw.pairs, part)
    rows, noise = _looked_at([*chosen, *rejected], draw, pool)
    likely = pool.draws(len(draw.successes), draw.noise)
    return pool.refer(torch.cat([rows, draw.successes]), torch.cat([noise, likely]))


def logratios(draw: Draw, pool: DecisionPool, part: PreferencePart) -> dict[str, float]:
    """Mean log pi / pi_ref per token on the preferred decisions of a draw, by the metric's name, under the weights as
    they are."""
    wanted = {"success_logratio": (draw.successes, pool.draws(len(draw.successes), draw.noise))}
    if draw.pairs:
        wanted["chosen_logratio"] = _looked_at([chosen for chosen, _ in draw.pairs], draw, pool)
    found = {}
    for name, (rows, noise) in wanted.items():
        if len(rows):
            parts = zip(rows.split(part.micro_batch), noise.split(part.micro_batch), strict=True)
            with torch.no_grad():
                ratios = [pool.score(*some) - pool.reference(*some) for some in parts]
            found[name] = torch.cat(ratios).mean().item()
    return found


@torch.no_grad()
def pair_margins(draw: Draw, pool: DecisionPool, part: PreferencePart) -> torch.Tensor:
    """What beta multiplies: the chosen side's weighted log-ratio sum less the rejected one's, bounded as in the loss,
    float [pairs], under the weights as they are. `refer` comes first."""
    found = []
    for group in _groups(draw.pairs, part.micro_batch):
        chosen_sides, rejected_sides = _sides(group, part)
        rows, noise = _looked_at([*chosen_sides, *rejected_sides], draw, pool)
        ratios = pool.score(rows, noise) - pool.reference(rows, noise)
        split = sum(len(side.rows) for side in chosen_sides)
        bounded, _ = dpo.bounded_below(ratios[split:], floor=part.rejected_floor)
        chosen = _trajectory_sums(ratios[:split].sum(-1), chosen_sides)
        found.append(chosen - _trajectory_sums(bounded, rejected_sides))
    return torch.cat(found)


def _groups(pairs: Sequence[tuple[Side, Side]], most: int) -> Iterator[list[tuple[Side, Side]]]:
    """Whole pairs, as many as fit `most` decisions: a pair's loss needs both of its sums at once."""
    group: list[tuple[Side, Side]] = []
    size = 0
    for pair in pairs:
        rows = sum(len(side.rows) for side in pair)
        if group and size + rows > most:
            yield group
            group, size = [], 0
        group.append(pair)
        size += rows
    if group:
        yield group


def _pair_gradients(
    group: Sequence[tuple[Side, Side]], draw: Draw, pool: DecisionPool, part: PreferencePart, sums: Sums
) -> None:
    chosen_sides, rejected_sides = _sides(group, part)
    rows, noise = _looked_at([*chosen_sides, *rejected_sides], draw, pool)
    logps = pool.score(rows, noise)
    ratios = logps - pool.reference(rows, noise)
    split = sum(len(side.rows) for side in chosen_sides)
    anchor = -logps[:split]
    tokens = sum(len(chosen.rows) for chosen, _ in draw.pairs) * logps.shape[1]
    objective = part.anchor_weight * anchor.sum() / tokens
    sums.add("anchor_nll", anchor)
    sums.add("chosen_logratio", ratios[:split])
    if rejected_sides:
        chosen = _trajectory_sums(ratios[:split].sum(-1), chosen_sides)
        sums.add("rejected_logratio", ratios[split:])
        sums.add("kl", -ratios)
    if part.proximal_weight:
        fallen = _trajectory_sums(ratios[split:].sum(-1), rejected_sides)
        proximal = dpo.proximal_loss(chosen, beta=part.first_beta) + dpo.proximal_loss(
            fallen, beta=part.first_beta
        )
        objective = objective + part.proximal_weight * proximal.sum() / len(draw.pairs)
        sums.add("proximal_loss", proximal)
    if part.preference_weight:
        bounded, held = dpo.bounded_below(ratios[split:], floor=part.rejected_floor)
        rejected = _trajectory_sums(bounded, rejected_sides)
        form = dpo.sigmoid_loss if part.loss == "sigmoid" else dpo.ipo_loss
        loss = form(chosen, rejected, beta=part.first_beta)
        objective = objective + part.preference_weight * loss.losses.sum() / len(draw.pairs)
        sums.add("preference_loss", loss.losses)
        sums.add("chosen_reward", loss.chosen_rewards)
        sums.add("rejected_reward", loss.rejected_rewards)
        sums.margins += (loss.chosen_rewards - loss.rejected_rewards).tolist()
        sums.add("accuracy", (loss.chosen_rewards > loss.rejected_rewards).float())
        sums.add("held", held.float())
    objective.backward()


def _likelihood_gradients(
    name: str,
    weight: float,
    micro_batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    pool: DecisionPool,
    sums: Sums,
) -> None:
    """`weight` of each row; rows and their draws of noise."""
    for rows, noise in micro_batches:
        logps = pool.score(rows, noise)
        (-weight * logps.sum() / logps.shape[1]).backward()
        sums.add(name, -logps)
        if name == "success_nll":
            sums.add("success_logratio", logps - pool.reference(rows, noise))


def _sides(pairs: Sequence[tuple[Side, Side]], part: PreferencePart) -> tuple[list[Side], list[Side]]:
    """The chosen sides of pairs, and the rejected ones where a term looks at them: an anchor alone does not."""
    both = part.preference_weight or part.proximal_weight
    return [chosen for chosen, _ in pairs], [rejected for _, rejected in pairs] if both else []


def _looked_at(sides: Sequence[Side], draw: Draw, pool: DecisionPool) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of the sides one after another, and their draws of noise: by rank in their side."""
    none = torch.empty(0, dtype=torch.int64)
    noise = [pool.draws(len(side.rows), draw.noise) for side in sides]
    return torch.cat([none, *(side.rows for side in sides)]), torch.cat([none, *noise])


def _trajectory_sums(log_ratios: torch.Tensor, sides: Sequence[Side]) -> torch.Tensor:
    """Weighted sums, float [sides], of the decisions' log-ratios, float [D], in the order of the sides."""
    sizes = torch.tensor([len(side.rows) for side in sides])
    owners = torch.arange(len(sides)).repeat_interleave(sizes)
    weights = torch.cat([side.weights for side in sides])
    device = log_ratios.device
    return dpo.sum_by_trajectory(log_ratios, owners.to(device), weights.to(device), len(sides))


def _metrics(sums: Sums, part: PreferencePart) -> dict[str, float]:
    names = [name for name in sums if not name.endswith("_count")]
    metrics = {name: sums.mean(name) for name in names}
    if "chosen_reward" in metrics:
        metrics["margin"] = metrics["chosen_reward"] - metrics["rejected_reward"]
    if len(sums.margins) > 1:
        metrics["margin_std"] = torch.tensor(sums.margins, dtype=torch.float64).std().item()
    weights = {
        "preference_loss": part.preference_weight,
        "proximal_loss": part.proximal_weight,
        "anchor_nll": part.anchor_weight,
        "success_nll": part.success_weight,
        "demo_nll": part.demo_weight,
    }
    loss = sum(weight * metrics[name] for name, weight in weights.items() if name in metrics)
    return {"loss": loss, **metrics}
