"""Intervals and paired tests for success rates.

Sources: Wilson, J. Am. Stat. Assoc. 22 (1927) 209-212; McNemar, Psychometrika 12 (1947) 153-157, in its exact form;
Newcombe, Stat. Med. 17 (1998) 2635-2650, method 10, for the paired difference. All three take the episodes (or pairs)
as independent; episodes that share an initial state or a training seed are less so than their number suggests.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from scipy.stats import binomtest

from trajectories.records import Cell

Key = TypeVar("Key", bound=Hashable)
"""What identifies an episode on both sides: a Cell, or a Cell with a training seed."""

_NAMED = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class McNemarResult:
    """Paired outcomes of two policies on the same cells."""

    better: int
    """Cells that failed before and succeed after."""
    worse: int
    """Cells that succeeded before and fail after."""
    n: int
    """All pairs, the agreeing ones included."""
    p_value: float
    """Two-sided exact p-value of no difference; 1 where every pair agrees."""


def wilson(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a success rate; (0, 1) where there are no episodes.

    Raises:
        ValueError: successes outside 0..n, or confidence outside (0, 1).
    """
    if not 0 <= successes <= n:
        raise ValueError(f"successes must lie in 0..n, got {successes} of {n}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}")
    if n == 0:
        return 0.0, 1.0
    interval = binomtest(successes, n).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def mcnemar(before: Mapping[Key, bool], after: Mapping[Key, bool]) -> McNemarResult:
    """Exact two-sided McNemar test of two policies driven on the same cells.

    Raises:
        ValueError: the two sides do not hold the same cells; some are named.
    """
    return mcnemar_pooled([(before, after)])


def mcnemar_pooled(arms: Iterable[tuple[Mapping[Key, bool], Mapping[Key, bool]]]) -> McNemarResult:
    """The same test with the pairs of several (before, after) arms, one for each training seed, thrown together.

    Raises:
        ValueError: the two sides of an arm do not hold the same cells; some are named.
    """
    better = worse = n = 0
    for before, after in arms:
        _check_same_cells(before, after)
        n += len(before)
        better += sum(after[key] and not before[key] for key in before)
        worse += sum(before[key] and not after[key] for key in before)
    p_value = float(binomtest(better, better + worse).pvalue) if better + worse else 1.0
    return McNemarResult(better=better, worse=worse, n=n, p_value=p_value)


def mcnemar_worse(before: Mapping[Key, bool], after: Mapping[Key, bool]) -> float:
    """One-sided exact p-value that `after` is worse: small when many cells were lost and few won.

    Raises:
        ValueError: the two sides do not hold the same cells; some are named.
    """
    result = mcnemar(before, after)
    changed = result.better + result.worse
    return float(binomtest(result.worse, changed, alternative="greater").pvalue) if changed else 1.0


def paired_difference(
    *, both: int, only_after: int, only_before: int, neither: int, confidence: float = 0.95
) -> tuple[float, float, float]:
    """Success rate after minus before, with Newcombe's interval for paired proportions: (difference, low, high).

    Args:
        both: pairs that succeed on both sides.
        only_after: pairs that succeed after only.
        only_before: pairs that succeed before only.
        neither: pairs that fail on both sides.
        confidence: coverage, between 0 and 1.

    Raises:
        ValueError: no pairs at all.
    """
    n = both + only_after + only_before + neither
    if n == 0:
        raise ValueError("a paired difference needs at least one pair")
    after, before = both + only_after, both + only_before
    after_low, after_high = (abs(after / n - limit) for limit in wilson(after, n, confidence))
    before_low, before_high = (abs(before / n - limit) for limit in wilson(before, n, confidence))
    # phi, the correlation of the two sides, shrunk by n/2 where positive (Newcombe's continuity correction).
    covariance = both * neither - only_after * only_before
    shrunk = max(covariance - n / 2, 0) if covariance > 0 else covariance
    scale = math.sqrt(after * (n - after) * before * (n - before))
    phi = shrunk / scale if scale else 0.0
    difference = (only_after - only_before) / n
    down = math.sqrt(after_low**2 - 2 * phi * after_low * before_high + before_high**2)
    up = math.sqrt(after_high**2 - 2 * phi * after_high * before_low + before_low**2)
    return difference, difference - down, difference + up


def _check_same_cells(before: Mapping[Key, bool], after: Mapping[Key, bool]) -> None:
    lost, extra = before.keys() - after.keys(), after.keys() - before.keys()
    if not lost and not extra:
        return
    said = [
        f"{len(keys)} only {side} ({', '.join(sorted(map(_name, keys))[:_NAMED])}{', ...' * (len(keys) > _NAMED)})"
        for side, keys in (("before", lost), ("after", extra))
        if keys
    ]
    raise ValueError(f"a paired test needs the same cells on both sides, got {' and '.join(said)}")


def _name(key: Hashable) -> str:
    return key.key if isinstance(key, Cell) else str(key)
