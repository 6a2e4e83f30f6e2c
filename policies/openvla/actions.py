"""From OpenVLA's normalised actions to the robot's and back: quantile statistics, and LIBERO's gripper.

Letters: A dimensions of an action.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from policies.encoding.action_tokens import ActionTokenizer
from trajectories.records import ACTION_DIM


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ActionStatistics:
    """The 1 % and 99 % quantiles of a data set's actions, which map to -1 and +1."""

    q01: np.ndarray
    """float64 [A], in the robot's units."""
    q99: np.ndarray
    """float64 [A]."""
    mask: np.ndarray
    """bool [A]; where false (the gripper), actions are not normalised."""

    def unnormalize(self, values: np.ndarray) -> np.ndarray:
        """Normalised [..., A] -> the robot's units float64 [..., A]: (x + 1) / 2 * (q99 - q01) + q01."""
        return np.where(self.mask, 0.5 * (values + 1) * (self.q99 - self.q01) + self.q01, values)

    def normalize(self, actions: np.ndarray) -> np.ndarray:
        """The inverse, clipped to [-1, 1]; 0 where both quantiles are one number."""
        width = self.q99 - self.q01
        scaled = 2 * (actions - self.q01) / np.where(width == 0, 1, width) - 1
        scaled = np.where(width == 0, 0, np.clip(scaled, -1, 1))
        return np.where(self.mask, scaled, actions)


def action_statistics(norm_stats: Mapping[str, Any], key: str | None, *, where: str) -> ActionStatistics:
    """A data set's statistics out of a checkpoint's `norm_stats`; without a key, those of its only data set.

    Raises ValueError, naming `where` they were read: no key for several data sets, an unknown one (with its nearest),
    or statistics that are incomplete.
    """
    known = ", ".join(norm_stats)
    if key is None:
        if len(norm_stats) != 1:
            raise ValueError(
                f"{where} has statistics of {len(norm_stats)} data sets; name one as unnorm_key: {known}"
            )
        (key,) = norm_stats
    if key not in norm_stats:
        near = difflib.get_close_matches(key, norm_stats, n=1, cutoff=0)
        hint = f", nearest is {near[0]!r}" if near else ""
        raise ValueError(f"{where} has no statistics for unnorm_key {key!r}{hint}; known: {known}")
    entry = norm_stats[key]
    stats = entry.get("action") if isinstance(entry, Mapping) else None
    if not isinstance(stats, Mapping) or "q01" not in stats or "q99" not in stats:
        raise ValueError(f"{where}: statistics of {key!r} lack action.q01 or action.q99")
    try:
        q01, q99 = np.array(stats["q01"], np.float64), np.array(stats["q99"], np.float64)
        mask = np.array(stats.get("mask") or [True] * q01.size, dtype=bool)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: statistics of {key!r} are not lists of numbers: {error}") from error
    if q01.ndim != 1 or not q01.shape == q99.shape == mask.shape:
        sizes = f"q01 {list(q01.shape)}, q99 {list(q99.shape)}, mask {list(mask.shape)}"
        raise ValueError(f"{where}: statistics of {key!r} differ in length: {sizes}")
    if not (np.isfinite(q01) & np.isfinite(q99)).all():
        raise ValueError(f"{where}: statistics of {key!r} have a quantile that is not finite")
    if (q01 > q99)[mask].any():
        raise ValueError(
            f"{where}: statistics of {key!r} have a q01 above its q99, which would turn motions round"
        )
    return ActionStatistics(q01=q01, q99=q99, mask=mask)


def to_libero_gripper(actions: np.ndarray) -> np.ndarray:
    """Actions [..., A] whose last dimension opens the gripper at 1 and closes it at 0 -> LIBERO's: -1 opens, +1
    closes, nothing between.

    The sign of 2 g - 1, inverted; g = 0.5 opens. There the sign would be 0, by which robosuite's gripper neither
    opens nor closes but stays as it is.
    """
    gripper = np.where(actions[..., -1:] >= 0.5, -1.0, 1.0)
    return np.concatenate([actions[..., :-1], gripper], axis=-1)


def from_libero_gripper(actions: np.ndarray) -> np.ndarray:
    """The inverse, as OpenVLA's data were made: 1 - g clipped to [0, 1]."""
    return np.concatenate([actions[..., :-1], 1 - np.clip(actions[..., -1:], 0, 1)], axis=-1)


class OpenVLAActions:
    """LIBERO's actions as the tokens of an OpenVLA checkpoint, with the interface of `ActionTokenizer`."""

    def __init__(self, tokenizer: ActionTokenizer, statistics: ActionStatistics) -> None:
        """Raises ValueError for statistics of another robot than LIBERO's."""
        if statistics.q01.size != ACTION_DIM:
            raise ValueError(
                f"statistics are of {statistics.q01.size} action dimensions, LIBERO's robot has {ACTION_DIM}; "
                "choose another unnorm_key"
            )
        self._tokenizer = tokenizer
        self._statistics = statistics
        self.first_id, self.stop_id, self.bins = tokenizer.first_id, tokenizer.stop_id, tokenizer.bins

    def encode(self, actions: np.ndarray) -> np.ndarray:
        """LIBERO's actions float [K, 7] -> token ids int64 [K * 7]; ValueError for a wrong shape or a value that is
        not finite."""
        if actions.ndim != 2 or actions.shape[1] != ACTION_DIM:
            raise ValueError(f"actions must be [K, {ACTION_DIM}], got {list(actions.shape)}")
        return self._tokenizer.encode(self._statistics.normalize(from_libero_gripper(actions)))

    def decode(self, ids: np.ndarray) -> np.ndarray:
        """Token ids int [..., K * 7] -> LIBERO's actions float32 [..., K, 7]; other ids clip (`ActionTokenizer`)."""
        values = self._tokenizer.values(ids).reshape(*ids.shape[:-1], -1, ACTION_DIM)
        return to_libero_gripper(self._statistics.unnormalize(values)).astype(np.float32)

    def check(self, ids: np.ndarray) -> None:
        """Raises ValueError naming the first id that is no action token."""
        self._tokenizer.check(ids)
