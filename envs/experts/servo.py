"""Proportional control of robosuite's OSC_POSE controller, as LIBERO configures it.

An action of 1.0 sets the position goal 0.05 m (the orientation goal 0.5 rad) from the present pose for one
control step of 1/20 s; the arm then moves at most about 15 mm a step.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.spatial.transform import Rotation

from envs.experts.scene import Gripper

METRES_PER_UNIT = 0.05
RADIANS_PER_UNIT = 0.5
POSITION_GAIN = 1.5
"""Goal displacement per metre of error."""
TURN_GAIN = np.array([0.6, 0.6, 1.0])
"""Goal rotation per radian of error about the world's x, y and z axes. Tilt is righted gently: the controller drives
position and orientation as if they were independent, and with the arm stretched out they disturb each other."""
WRIST_HEIGHT, WRIST_SETBACK = 0.204, 0.088
"""From the grip site of an upright hand up, and back, to the Panda's sixth joint, metres."""
FAR_REACH, NEAR_REACH = 0.63, 0.33
"""Comfortable distances from the second joint to the sixth, metres: at 0.70 the elbow is straight, below 0.25 or so it
is folded up, and the arm stops short."""
MAX_LEAN = 0.6
OPEN, CLOSE = -1.0, 1.0

DOWN = np.array([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, -1.0]])
"""Palm down with the fingers moving along the world's y axis: the pose every LIBERO episode starts near."""


def palm_down(gripper: Gripper, yaw: float, at: np.ndarray) -> np.ndarray:
    """Rotation [3, 3] of a palm facing down, turned by `yaw` radians about the world's vertical from `DOWN`.

    Where the grip site is to go, `at` [3], may be so far out that an upright hand would need a longer arm, or so near
    that the elbow would have to fold too tightly: there the palm leans outwards, or inwards.
    """
    outward = at[:2] - gripper.shoulder[:2]
    distance = float(np.hypot(*outward))
    height = at[2] + WRIST_HEIGHT - gripper.shoulder[2]
    far, near = (
        WRIST_SETBACK + math.sqrt(max(0.0, reach**2 - height**2)) for reach in (FAR_REACH, NEAR_REACH)
    )
    lean = float(np.clip((distance - np.clip(distance, near, far)) / WRIST_HEIGHT, -MAX_LEAN, MAX_LEAN))
    axis = np.array([outward[1], -outward[0], 0.0]) / max(distance, 1e-6)
    return (
        Rotation.from_rotvec(lean * axis).as_matrix()
        @ Rotation.from_rotvec([0.0, 0.0, yaw]).as_matrix()
        @ DOWN
    )


def nearest_yaw(gripper: Gripper, yaw: float, *, share: float = 1.0) -> float:
    """`yaw` or a half turn away from it (the same grasp), whichever the gripper is nearer to; or only `share` of the
    way there. Radians."""
    now = heading(gripper)
    return now + share * (math.pi / 2 - (math.pi / 2 - (yaw - now)) % math.pi)


def turn_left(gripper: Gripper, yaw: float) -> float:
    """Angle from the gripper's heading to `yaw`, radians, signed."""
    return yaw - heading(gripper)


def heading(gripper: Gripper) -> float:
    """Angle of the fingers' line from the world's y axis, radians, -pi to pi."""
    line = gripper.rotation[:2, 0]
    return math.atan2(-line[0], line[1])


def move(
    gripper: Gripper, displacement: np.ndarray, *, rotation: np.ndarray, grip: float, limit: float = 1.0
) -> np.ndarray:
    """Action float32 [7] towards `displacement` metres [3] from here and the orientation `rotation` [3, 3].

    Too long a step is shortened, not bent: all three position components are scaled to `limit`.
    """
    step = np.asarray(displacement) * (POSITION_GAIN / METRES_PER_UNIT)
    step *= min(1.0, limit / max(float(np.abs(step).max()), 1e-9))
    turn = Rotation.from_matrix(rotation @ gripper.rotation.T).as_rotvec() * (TURN_GAIN / RADIANS_PER_UNIT)
    turn *= min(1.0, 1.0 / max(float(np.abs(turn).max()), 1e-9))
    return np.concatenate([step, turn, [grip]]).astype(np.float32)
