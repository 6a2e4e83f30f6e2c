"""Actions as tokens: each action dimension is cut into bins, named by the last ids of the vocabulary.

OpenVLA (arXiv 2406.09246, section 3.2): the bin of the largest action has the lowest id, so id = vocab - bin.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from trajectories.records import ACTION_DIM


class ActionTokenizer:
    """Maps actions in [-1, 1] to the last `bins` ids of a vocabulary and back to bin centres.

    An even `bins` (256 is OpenVLA's) follows OpenVLA to the letter: `bins` edges evenly spaced over [-1, 1],
    hence `bins` - 1 centres between them, the lowest of which two ids share. The centres miss -1 and +1 by
    1 / (`bins` - 1), which is 0.004 at 256 and far too much for a gripper at 20.

    An odd `bins` puts the centres themselves evenly over [-1, 1], each id its own: -1, 0 and +1 are exact, so
    a coarse vocabulary can still hold the arm still, drive it at full speed and close the gripper.

    Either way the number of centres is odd, so 0 is always one of them. (A checkpoint that was trained with OpenVLA's
    rule on an odd number is read with `exact_ends=False`.)
    """

    def __init__(self, *, vocab_size: int, bins: int, exact_ends: bool | None = None) -> None:
        """`vocab_size` counts text and action ids together; padding ids that follow them do not count.

        `exact_ends`: whether -1 and +1 are centres; none: as the number of bins decides, see above.
        """
        if not 3 <= bins < vocab_size:
            raise ValueError(
                f"bins must lie in 3..{vocab_size - 1} (the vocabulary has {vocab_size} ids), got {bins}"
            )
        self.bins = bins
        self.stop_id = vocab_size
        """One past the last action id."""
        self.first_id = vocab_size - bins
        if not (bins % 2 if exact_ends is None else exact_ends):
            self._edges = np.linspace(-1, 1, bins)
            centres = (self._edges[:-1] + self._edges[1:]) / 2
        else:
            centres = np.linspace(-1, 1, bins)
            self._edges = np.concatenate([[-1.0], (centres[:-1] + centres[1:]) / 2])
        self._centres = centres
        self.centres = centres.astype(np.float32)
        """float32 [`bins` or `bins` - 1], rising."""

    def encode(self, actions: np.ndarray) -> np.ndarray:
        """Actions float [K, 7], clipped to [-1, 1] -> token ids int64 [K * 7], step by step.

        Raises ValueError for a wrong shape or a value that is not finite.
        """
        if actions.ndim != 2 or actions.shape[1] != ACTION_DIM:
            raise ValueError(f"actions must be [K, {ACTION_DIM}], got {list(actions.shape)}")
        if not np.isfinite(actions).all():
            step, dim = np.argwhere(~np.isfinite(actions))[0]
            raise ValueError(f"actions[{step}, {dim}] is {actions[step, dim]}; expected a number in [-1, 1]")
        return self.ids(actions).reshape(-1)

    def decode(self, ids: np.ndarray) -> np.ndarray:
        """Token ids int [..., K * 7] -> bin centres float32 [..., K, 7]; ValueError for any other id."""
        self.check(ids)
        return self.values(ids).astype(np.float32).reshape(*ids.shape[:-1], -1, ACTION_DIM)

    def ids(self, values: np.ndarray) -> np.ndarray:
        """Finite values of any shape, clipped to [-1, 1] -> token ids int64 of that shape."""
        bins = np.digitize(np.clip(values.astype(np.float64), -1, 1), self._edges)
        return (self.stop_id - bins).astype(np.int64)

    def values(self, ids: np.ndarray) -> np.ndarray:
        """Token ids of any shape -> bin centres float64 of that shape.

        An id below the action ids gives the highest centre and one above them the lowest, as in OpenVLA, whose
        decoding over the whole vocabulary may choose such ids. Where that would hide a fault, `check` first.
        """
        return self._centres[np.clip(self.stop_id - ids - 1, 0, len(self._centres) - 1)]

    def check(self, ids: np.ndarray) -> None:
        """Raises ValueError naming the first id that is no action token."""
        outside = (ids < self.first_id) | (ids >= self.stop_id)
        if outside.any():
            raise ValueError(
                f"token id {ids[outside][0]} is no action token; expected {self.first_id}..{self.stop_id - 1}"
            )


class ActionTokens(Protocol):
    """Actions to token ids and back; see `ActionTokenizer`."""

    first_id: int
    stop_id: int
    bins: int

    def encode(self, actions: np.ndarray) -> np.ndarray: ...

    def decode(self, ids: np.ndarray) -> np.ndarray: ...

    def check(self, ids: np.ndarray) -> None: ...
