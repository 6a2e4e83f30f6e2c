"""From OpenVLA's tokens to LIBERO's actions and back: a data set's quantiles, and the gripper."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.encoding.action_tokens import ActionTokenizer
from policies.openvla.actions import (
    ActionStatistics,
    OpenVLAActions,
    action_statistics,
    from_libero_gripper,
    to_libero_gripper,
)
from tests import openvla_tiny as tiny


def test_unnormalising_spans_the_quantiles_where_the_mask_is_true() -> None:
    stats = action_statistics(tiny.STATISTICS, tiny.KEY, where="test")
    values = np.array([-1.0, 0.0, 1.0, -1.0, 0.0, 1.0, 0.25])
    np.testing.assert_allclose(stats.unnormalize(values), [-0.5, 0.025, 0.9, -0.1, -0.025, 0.3, 0.25])
    np.testing.assert_allclose(stats.normalize(stats.unnormalize(values)), values, atol=1e-12)
    flat = ActionStatistics(q01=np.array([0.2]), q99=np.array([0.2]), mask=np.array([True]))
    assert flat.normalize(np.array([5.0])).tolist() == [0]
    assert flat.unnormalize(np.array([0.0])).tolist() == [0.2]


@given(shares=st.lists(st.floats(0, 1), min_size=6, max_size=6), closed=st.booleans())
def test_actions_survive_a_checkpoints_tokens_within_half_a_bin(shares: list[float], closed: bool) -> None:
    stats = action_statistics(tiny.STATISTICS, tiny.KEY, where="test")
    actions = OpenVLAActions(ActionTokenizer(vocab_size=32000, bins=256), stats)
    width = (stats.q99 - stats.q01)[:6]
    given_actions = np.array([[*(stats.q01[:6] + np.array(shares) * width), 1.0 if closed else -1.0]])
    ids = actions.encode(given_actions)
    assert ((ids >= 31744) & (ids < 32000)).all()
    back = actions.decode(ids)
    assert back.dtype == np.float32
    assert back[0, 6] == given_actions[0, 6]
    # Half a bin is 1 / 255 of normalised units, which span two; a shared lowest centre is as far.
    assert (np.abs(back - given_actions)[0, :6] <= width / 2 / 255 + 1e-6).all()
    # The two lowest ids share the highest centre, which is the second's own.
    np.testing.assert_array_equal(actions.encode(back)[:6], np.maximum(ids, 31745)[:6])


def test_the_gripper_is_always_open_or_closed() -> None:
    actions = np.tile(np.arange(7.0), (5, 1))
    actions[:, 6] = [0.0, 0.49, 0.5, 1.0, -0.2]
    libero = to_libero_gripper(actions)
    assert libero[:, 6].tolist() == [1, 1, -1, -1, 1]
    assert libero[:, :6].tolist() == actions[:, :6].tolist()
    assert actions[2, 6] == 0.5
    assert from_libero_gripper(libero)[:, 6].tolist() == [0, 0, 1, 1, 0]


def test_statistics_of_another_robot_are_refused() -> None:
    stats = ActionStatistics(q01=np.zeros(14), q99=np.ones(14), mask=np.ones(14, bool))
    with pytest.raises(ValueError, match="statistics are of 14 action dimensions, LIBERO's robot has 7"):
        OpenVLAActions(ActionTokenizer(vocab_size=32000, bins=256), stats)
