"""robosuite's OSC_POSE control loop without its Python overhead, bit for bit.

robosuite 1.4 runs 25 physics steps per control step and, in each, evaluates the dynamics twice (`forward`, then
`step`), rebuilds its controller's state through name look-ups, and refreshes every observable. Here each physics
step evaluates the dynamics once (`mj_step1`, torques, `mj_step2`) and one compiled function computes the torques,
calling robosuite's own compiled operational-space formulas (Khatib, 1987) on arrays of the same memory layout, so
that rounding is the same too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mujoco
import numba
import numpy as np
from robosuite.utils import control_utils

_ARM = 7
_opspace_matrices = control_utils.opspace_matrices
_nullspace_torques = control_utils.nullspace_torques
_orientation_error = control_utils.orientation_error


class ControlLoop:
    """Steps one LIBERO domain at its control rate (20 Hz, 25 physics steps of 2 ms)."""

    def __init__(self, domain: Any) -> None:
        """`domain`: LIBERO's BDDLBaseDomain with one Panda under a fixed-impedance, relative OSC_POSE controller.

        Raises:
            ValueError: the robot's joints are not the model's first seven, which this loop relies on.
        """
        self._domain = domain
        self._model, self._data = domain.sim.model._model, domain.sim.data._data
        robot = domain.robots[0]
        joints = [int(i) for i in robot._ref_joint_vel_indexes]
        if joints != list(range(_ARM)) or robot._ref_joint_actuator_indexes != list(range(_ARM)):
            raise ValueError(f"the arm's degrees of freedom are {joints}; expected the model's first {_ARM}")
        self._substeps = int(domain.control_timestep / domain.model_timestep)
        self._site = robot.eef_site_id
        nv = self._model.nv
        self._jacp, self._jacr = np.zeros((3, nv)), np.zeros((3, nv))
        self._inertia = np.zeros((nv, nv))
        data = self._data
        self._arm_state = (
            data.qpos[:_ARM],
            data.qvel,
            data.qfrc_bias[:_ARM],
            data.site_xpos[self._site],
            data.site_xmat[self._site],
        )
        fingers = robot._ref_joint_gripper_actuator_indexes
        limits = self._model.actuator_ctrlrange
        self._torque_low, self._torque_high = limits[:_ARM, 0].copy(), limits[:_ARM, 1].copy()
        self._arm_ctrl = data.ctrl[:_ARM]
        self._finger_ctrl = data.ctrl[fingers[0] : fingers[-1] + 1]
        self._finger_bias = 0.5 * (limits[fingers, 1] + limits[fingers, 0])
        self._finger_weight = 0.5 * (limits[fingers, 1] - limits[fingers, 0])
        self._fresh = True

    def restart(self) -> None:
        """Call after each reset of the domain."""
        self._fresh = True

    def step(self, action: np.ndarray, observe: Callable[[], None]) -> None:
        """One control step.

        Args:
            action: float64 [7], validated.
            observe: called once, after the physics step at which robosuite samples its observables.
        """
        model, data = self._model, self._data
        first = 0
        if self._fresh:
            self._first_substep(action)
            first = 1
        else:
            self._evaluate()
            self._set_goal(action)
        robot = self._domain.robots[0]
        controller, gripper = robot.controller, robot.gripper
        goal = (
            controller.goal_pos,
            controller.goal_ori,
            controller.initial_joint,
            controller.kp,
            controller.kd,
        )
        finger_target = gripper.current_action
        finger_step = np.array([-1.0, 1.0]) * gripper.speed * np.sign(action[_ARM - 1 :])
        for substep in range(first, self._substeps):
            if substep > 0:
                self._evaluate()
            mujoco.mj_jacSite(model, data, self._jacp, self._jacr, self._site)
            mujoco.mj_fullM(model, self._inertia, data.qM)
            _apply_torques(
                self._jacp,
                self._jacr,
                self._inertia,
                *self._arm_state,
                *goal,
                self._torque_low,
                self._torque_high,
                self._arm_ctrl,
            )
            finger_target = np.clip(finger_target + finger_step, -1.0, 1.0)
            self._finger_ctrl[:] = self._finger_bias + self._finger_weight * finger_target
            mujoco.mj_step2(model, data)
            if substep == self._substeps - 2:
                observe()
        gripper.current_action = finger_target

    def _evaluate(self) -> None:
        """The dynamics at the current state, under the previous torques.

        Torques only need `mj_step1`. The constraint solves that follow are there because robosuite evaluates the
        dynamics twice before it sets new torques, and each solve leaves its result as the next one's starting
        point: without them trajectories part at the solver's tolerance (1e-8). A solve that took no iterations
        would only be repeated.
        """
        model, data = self._model, self._data
        mujoco.mj_step1(model, data)
        mujoco.mj_fwdActuation(model, data)
        mujoco.mj_fwdAcceleration(model, data)
        mujoco.mj_fwdConstraint(model, data)
        if data.solver_niter[0] > 0:
            mujoco.mj_fwdConstraint(model, data)

    def _first_substep(self, action: np.ndarray) -> None:
        """robosuite's own first physics step after a reset: its controller then still holds the pose it was built
        in, before the initial state was set, and takes its first goal and torques from that."""
        self._domain.sim.forward()
        self._domain._pre_action(action, True)
        self._domain.sim.step()
        self._fresh = False

    def _set_goal(self, action: np.ndarray) -> None:
        """The end-effector goal: the current pose moved by the scaled action; without a rotation command the old
        orientation goal stays, as in robosuite."""
        controller, data = self._domain.robots[0].controller, self._data
        delta = controller.scale_action(action[: _ARM - 1])
        controller.goal_pos = data.site_xpos[self._site] + delta[:3]
        if delta[3:].any():
            controller.goal_ori = control_utils.set_goal_orientation(
                delta[3:], data.site_xmat[self._site].reshape(3, 3)
            )


@numba.njit(cache=True)
def _apply_torques(  # type: ignore[no-untyped-def]  # compiled, typed by its first call
    jacp, jacr, inertia, qpos, qvel, bias, pos, mat, goal_pos, goal_ori, initial, kp, kd, low, high, ctrl
):
    """Write the arm's seven torques into `ctrl`. Column-major copies where robosuite's arrays are column-major."""
    jacobian = np.empty((7, 6)).T
    jacobian[:3] = jacp[:, :7]
    jacobian[3:] = jacr[:, :7]
    jacobian_pos = np.asfortranarray(jacobian[:3])
    jacobian_ori = np.asfortranarray(jacobian[3:])
    mass = np.asfortranarray(inertia[:7, :7])
    rotation_error = _orientation_error(goal_ori, mat.reshape(3, 3))
    force = np.multiply(goal_pos - pos, kp[:3]) + np.multiply(-np.dot(jacp, qvel), kd[:3])
    torque = np.multiply(rotation_error, kp[3:]) + np.multiply(-np.dot(jacr, qvel), kd[3:])
    _, lambda_pos, lambda_ori, nullspace = _opspace_matrices(mass, jacobian, jacobian_pos, jacobian_ori)
    wrench = np.empty(6)
    wrench[:3] = np.dot(lambda_pos, force)
    wrench[3:] = np.dot(lambda_ori, torque)
    total = np.dot(jacobian.T, wrench) + bias
    total += _nullspace_torques(mass, nullspace, initial, qpos, qvel[:7])
    ctrl[:] = np.minimum(np.maximum(total, low), high)
