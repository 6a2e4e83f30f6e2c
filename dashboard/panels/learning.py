"""What the learner did: the supervised start, and over all rounds' optimizer steps margins, rewards and log-ratios."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from configs.schema import Recipe
from dashboard.series import Series

ROUNDS = 500
"""Latest rounds whose numbers and marks are kept."""
UPDATE = (
    *("margin", "margin_std", "accuracy", "chosen_reward", "rejected_reward", "loss", "grad_norm", "held"),
    *("chosen_logratio", "rejected_logratio", "success_logratio", "kl"),
)
"""Metrics of an update's step, by `learners.terms`' names."""
PLOTS = {
    "margin": ("margin", "margin_std"),
    "rewards": ("chosen_reward", "rejected_reward"),
    "logratios": ("chosen_logratio", "success_logratio", "rejected_logratio"),
    "kl": ("kl",),
    "accuracy": ("accuracy", "held"),
    "loss": ("loss",),
    "grad_norm": ("grad_norm",),
}
REFUSED = ("tripped", "rolled_back", "refused")


class Learning:
    """Section `learning`: the plots' columns over optimizer steps, the limits drawn on them, and the rounds' fates."""

    def __init__(self, recipe: Recipe) -> None:
        self._limits = {
            "chosen_drop": -recipe.guard.chosen_drop,
            "rejected_floor": -recipe.preference.rejected_floor,
        }
        self._update = Series(*UPDATE)
        self._supervised = Series("loss", "grad_norm", "lr")
        self._spans: OrderedDict[int, list[int]] = OrderedDict()
        self._fates: OrderedDict[int, str] = OrderedDict()
        self._round, self._before, self._last = -1, 0, 0

    def take(self, journal: str, line: Mapping[str, Any]) -> bool:
        """Fold a line in; whether the section changed."""
        if journal == "events" and line["event"] in (*REFUSED, "promoted", "skipped"):
            self._fates[int(line["round"])] = str(line["event"])
            _bound(self._fates)
            return True
        stage = line.get("stage") if journal == "metrics" else None
        if stage == "supervised":
            self._supervised.append(int(line["step"]), line)
            return True
        if stage != "update":
            return False
        index, step = int(line["round"]), int(line["step"])
        # A round that a resumed run begins anew goes on to the right of what it had.
        if index != self._round or self._before + step <= self._last:
            self._round, self._before = index, self._last
        self._last = self._before + step
        self._spans.setdefault(index, [self._before, self._last])[1] = self._last
        _bound(self._spans)
        self._update.append(self._last, line)
        return True

    def section(self) -> dict[str, Any]:
        return {
            "limits": self._limits,
            "plots": {plot: self._update.drawn(*names) for plot, names in PLOTS.items()},
            "supervised": self._supervised.drawn("loss", "grad_norm"),
            "rounds": [
                {"round": index, "from": first, "to": last, "fate": self._fates.get(index, "")}
                for index, (first, last) in self._spans.items()
            ],
        }


class Pairs:
    """Section `pairs`: what each round's mining found, and the pairs in all."""

    def __init__(self) -> None:
        self._rounds: OrderedDict[int, dict[str, int]] = OrderedDict()

    def take(self, journal: str, line: Mapping[str, Any]) -> bool:
        """Fold a line in; whether the section changed."""
        if journal != "metrics" or line.get("stage") != "pairs":
            return False
        counts = {key: int(line[key]) for key in COUNTS if line.get(key) is not None}
        self._rounds[int(line["round"])] = {"round": int(line["round"]), **counts}
        _bound(self._rounds)
        return True

    def section(self) -> dict[str, Any]:
        return {"rounds": list(self._rounds.values())}


COUNTS = (
    *("pairs", "states", "states_all_success", "states_all_failure", "states_unpairable_other"),
    *("faults", "non_finite", "stale", "duplicates"),
)
"""`preferences.pairing.PairCounts`, by name."""


def _bound(kept: OrderedDict[int, Any]) -> None:
    while len(kept) > ROUNDS:
        kept.popitem(last=False)
