"""Columns of numbers over one rising axis, in bounded memory, and thinned for drawing without losing extremes."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

KEPT = 20_000
"""Rows held before the oldest detail goes."""
DRAWN = 1_000
"""Points of a series that a plot is sent at most; a wide one is 1,000 pixels."""


class Series:
    """Rows of (x, values), appended in order of x. A value that a row lacks is NaN.

    Beyond `KEPT` rows all of them are thinned to half, each bucket keeping its extremes, so that memory is bounded and
    no peak is lost.
    """

    def __init__(self, *names: str) -> None:
        self.names = names
        self._x = array("d")
        self._columns = {name: array("d") for name in names}

    def __len__(self) -> int:
        return len(self._x)

    def append(self, x: float, values: Mapping[str, Any]) -> None:
        """Add a row; of `values` only the columns' names count, and None is as good as absent.

        Raises TypeError or ValueError for a value that is no number, and then adds nothing.
        """
        row = [values.get(name) for name in self._columns]
        numbers = [float("nan") if value is None else float(value) for value in row]
        self._x.append(x)
        for column, number in zip(self._columns.values(), numbers, strict=True):
            column.append(number)
        if len(self._x) > KEPT:
            x_N, values_SN = self._arrays(self.names)
            kept = thinned(values_SN, KEPT // 2)
            self._x = array("d", x_N[kept])
            self._columns = {n: array("d", values_SN[i][kept]) for i, n in enumerate(self.names)}

    def drawn(self, *names: str, points: int = DRAWN) -> dict[str, list[float | None]]:
        """`x` and the named columns (all without names), at most `points` rows, five significant digits, NaN as None.

        A column without a single number is left out.
        """
        x_N, values_SN = self._arrays(names or self.names)
        kept = thinned(values_SN, points)
        columns = {"x": x_N, **dict(zip(names or self.names, values_SN, strict=True))}
        return {
            name: [_short(value) for value in column[kept]]
            for name, column in columns.items()
            if name == "x" or not np.isnan(column).all()
        }

    def _arrays(self, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        columns = [np.array(self._columns[name]) for name in names]
        return np.array(self._x), np.stack(columns) if columns else np.empty((0, len(self._x)))


def thinned(values_SN: np.ndarray, points: int) -> np.ndarray:
    """Which of N rows to draw: int64, rising, at most `points`.

    Rows fall into equal buckets. Of each bucket every series keeps its smallest and its largest value, and the first
    and last row stay. NaN is never an extreme.
    """
    num_series, num_rows = values_SN.shape
    if num_rows <= points or not num_series:
        return np.arange(num_rows)[:: max(1, -(-num_rows // points))]
    buckets = max((points - 2) // (2 * num_series), 1)
    width = -(-num_rows // buckets)
    padded = np.full((num_series, buckets * width), np.nan)
    padded[:, :num_rows] = values_SN
    by_bucket = padded.reshape(num_series, buckets, width)
    starts = np.arange(buckets) * width
    low = np.where(np.isnan(by_bucket), np.inf, by_bucket).argmin(-1) + starts
    high = np.where(np.isnan(by_bucket), -np.inf, by_bucket).argmax(-1) + starts
    kept = np.unique(np.concatenate([low.ravel(), high.ravel(), [0, num_rows - 1]]))
    return kept[kept < num_rows]


def _short(value: float) -> float | None:
    return None if np.isnan(value) else float(f"{value:.5g}")
