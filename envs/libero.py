"""LIBERO tasks as a Gymnasium environment that draws only when the policy looks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import gymnasium
import numpy as np

from configs.world import EnvironmentPart
from envs.assets import ResolvedAssets, resolve_assets
from envs.domain import SimulatorFaultError, SoftReset, build_domain
from envs.libero_setup import prepare_libero
from envs.tasks import Task, init_states, load_task
from trajectories.records import ACTION_DIM, PROPRIO_DIM, Observation

Within = Callable[[str], AbstractContextManager[None]]


def _unlimited(call: str) -> AbstractContextManager[None]:
    return nullcontext()


HOLD = np.array([0, 0, 0, 0, 0, 0, -1], dtype=np.float32)
"""The settling action: no motion, gripper open."""

_RANGE_TOLERANCE = 1e-6
_DIVERGED = slice(4, 8)
"""MuJoCo's warnings BADQPOS, BADQVEL, BADQACC and BADCTRL."""


class InvalidActionError(ValueError):
    """An action that must not reach the simulator: wrong shape, not finite, or outside [-1, 1]."""


def to_observation(obs: dict[str, np.ndarray], instruction: str) -> Observation:
    """The record that policies and trajectories use."""
    return Observation(**obs, instruction=instruction)


class LiberoEnv(gymnasium.Env[dict[str, np.ndarray], np.ndarray]):
    """One LIBERO task. Reward is 1 on the step that reaches the goal, else 0.

    Observation: `agentview` and `wrist` uint8 [S, S, 3] (upright RGB), `proprio` float32 [8] (see
    `trajectories.records.PROPRIO_DIM`). Action: float [7] in [-1, 1], see `trajectories.records.ACTION_DIM`.

    Attributes:
        instruction: the task in words.
        task: the task.
        max_steps: step limit of an episode, settling not counted.
        domain: LIBERO's own environment (BDDLBaseDomain), for scripted experts and tests.
    """

    metadata = {"render_modes": []}  # noqa: RUF012  (gymnasium declares it so)

    def __init__(
        self,
        *,
        suite: str,
        task_id: int,
        environment: EnvironmentPart,
        assets: ResolvedAssets | None = None,
        within: Within = _unlimited,
    ) -> None:
        """Build the simulator (seconds).

        Args:
            suite, task_id: which task.
            environment: image size, geometry, settling, step limit, renderer.
            assets: resolved asset folder; none: resolve `environment.assets`.
            within: what each call into the simulator is made within, by its kind: `reset` (building it too), `step` (of
                a chunk) or `render`; see `envs.deadlines`.

        Raises:
            ValueError: unknown suite or task_id out of range.
            FileNotFoundError: no such asset folder.
            RendererError: there is nothing to draw with.
        """
        self.task: Task = load_task(suite, task_id)
        self.instruction = self.task.instruction
        self.max_steps = environment.max_steps or self.task.max_steps
        self.assets = assets or resolve_assets(environment.assets)
        self._environment = environment
        self._within = within
        with within("reset"):
            self._build(environment)

    def _build(self, environment: EnvironmentPart) -> None:
        self._init_states = init_states(self.task)
        prepare_libero(self.assets, renderer=environment.renderer)
        # mujoco and robosuite read their settings from the process environment when first imported.
        from envs.fast_control import ControlLoop
        from envs.rendering import CameraRenderer

        self.domain = build_domain(self.task)
        self._renderer = CameraRenderer(
            self.sim.model._model,
            self.sim.data._data,
            size=environment.image_size,
            geometry=environment.geometry,
        )
        self._soft_reset = SoftReset(self.domain)
        self._control = ControlLoop(self.domain)
        self.observation_space: gymnasium.Space[Any] = _observation_space(environment.image_size)
        self.action_space = gymnasium.spaces.Box(-1, 1, (ACTION_DIM,), np.float32)
        self._proprio = [(live.copy(), live) for live in self._proprio_views()]
        self._warnings = self.sim.data._data.warning
        self._steps = 0
        self._done = True

    @property
    def sim(self) -> Any:
        """robosuite's MjSim (privileged state)."""
        return self.domain.sim

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Start an episode from an official initial state.

        Args:
            seed: fixes the fixtures' placement (about 1 cm); none: drawn from the environment's own generator.
            options: `{"init_state": i}`, i in 0..49; default 0.

        Raises:
            ValueError: unknown option, or init_state out of range.
        """
        super().reset(seed=seed)
        index = self._checked_init_state(options or {})
        with self._within("reset"):
            self._soft_reset(
                seed if seed is not None else int(self.np_random.integers(2**31)), self._init_states[index]
            )
            self._control.restart()
            self._keep_observation()
            for _ in range(self._environment.settle_steps):
                self._advance(HOLD)
        self._steps, self._done = 0, False
        return self.observe(), {"init_state": index}

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """One control step (50 ms of simulated time) and a fresh observation.

        Raises:
            InvalidActionError: before the simulator is touched.
            RuntimeError: the episode is over, or was never reset.
        """
        return self.step_chunk(np.asarray(action)[None])

    def step_chunk(
        self, actions: np.ndarray
    ) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Run K actions open-loop and draw once, at the end; stops early on success or at the step limit.

        Args:
            actions: float [K, 7], each in [-1, 1].

        Returns:
            Gymnasium's 5-tuple; info has `executed` (1..K steps run) and `success`.

        Raises:
            InvalidActionError: before the simulator is touched.
            RuntimeError: the episode is over, or was never reset.
            SimulatorFaultError: the physics diverged.
            RendererError: the renderer gave no picture.
        """
        success, truncated, executed = self.advance(actions)
        info = {"executed": executed, "success": success}
        return self.observe(), float(success), success, truncated, info

    def advance(self, actions: np.ndarray) -> tuple[bool, bool, int]:
        """What `step_chunk` does before it looks: run float [K, 7] actions open-loop, drawing nothing.

        Returns success, truncated, and the number of steps executed. Raises as `step_chunk`.
        """
        actions = _checked_actions(actions)
        if self._done:
            raise RuntimeError("the episode is over (or was never reset): call reset() before step()")
        success, executed = False, 0
        with self._within("step"):
            for action in actions:
                success = self._advance(action)
                executed += 1
                self._steps += 1
                if success or self._steps >= self.max_steps:
                    break
        truncated = not success and self._steps >= self.max_steps
        self._done = success or truncated
        return success, truncated, executed

    def close(self) -> None:
        """Free the simulator and its GL context. Safe to call twice."""
        self._renderer.close()
        self._done = True

    def _advance(self, action: np.ndarray) -> bool:
        """One control step of the simulator; true when the goal holds after it."""
        self._control.step(action, self._keep_observation)
        if self._warnings.number[_DIVERGED].any():
            self._done = True
            raise SimulatorFaultError(
                f"{self.task.name}: the simulator diverged at step {self._steps + 1} (MuJoCo found a non-finite or "
                "huge state and reset itself); call reset()"
            )
        success = bool(self.domain._check_success())
        self.domain._post_process()
        return success

    def _proprio_views(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Live views of the end effector's position [3] and quaternion wxyz [4], and the finger joints [2]."""
        robot, data = self.domain.robots[0], self.sim.data._data
        hand = self.sim.model.body_name2id(robot.robot_model.eef_name)
        fingers = robot._ref_gripper_joint_pos_indexes
        return data.site_xpos[robot.eef_site_id], data.xquat[hand], data.qpos[fingers[0] : fingers[-1] + 1]

    def _keep_observation(self) -> None:
        """Note what the cameras and joints show now; `observe` draws this moment."""
        self._renderer.keep_poses()
        for kept, live in self._proprio:
            np.copyto(kept, live)

    def observe(self, *, depth: bool = False) -> dict[str, np.ndarray]:
        """Draw the observation of the last control step (or of the reset); with `depth`, also float32 [S, S], metres
        along the agentview camera's axis."""
        with self._within("render"):
            agentview, wrist, *depths = self._renderer.render(depth_of="agentview" if depth else None)
        position, quaternion, fingers = (kept for kept, _ in self._proprio)
        proprio = np.concatenate((position, axis_angle(quaternion), fingers))
        seen = {"agentview": agentview, "wrist": wrist, "proprio": proprio.astype(np.float32)}
        return seen | {"depth": depths[0]} if depths else seen

    def _checked_init_state(self, options: dict[str, Any]) -> int:
        unknown = sorted(set(options) - {"init_state"})
        if unknown:
            raise ValueError(f"unknown reset option {unknown[0]!r}; expected 'init_state'")
        index = options.get("init_state", 0)
        count = len(self._init_states)
        if isinstance(index, bool) or not isinstance(index, (int, np.integer)) or not 0 <= index < count:
            raise ValueError(f"init_state={index!r} is out of range; expected an integer in 0..{count - 1}")
        return int(index)


def _observation_space(side: int) -> gymnasium.spaces.Dict:
    image = gymnasium.spaces.Box(0, 255, (side, side, 3), np.uint8)
    proprio = gymnasium.spaces.Box(-np.inf, np.inf, (PROPRIO_DIM,), np.float32)
    return gymnasium.spaces.Dict({"agentview": image, "wrist": image, "proprio": proprio})


def axis_angle(quaternion_wxyz: np.ndarray) -> np.ndarray:
    """Rotation vector of a unit quaternion [w, x, y, z], radians, angle in [0, 2 pi].

    The sign of the quaternion is kept, as in the published LIBERO evaluations: folding it to the nearer antipode
    makes the vector jump near a half turn, where the gripper points down.
    """
    w = float(np.clip(quaternion_wxyz[0], -1.0, 1.0))
    sine = np.sqrt(1.0 - w * w)
    if sine < 1e-12:
        return np.zeros(3)
    return np.asarray(quaternion_wxyz[1:]) * (2.0 * np.arccos(w) / sine)


def _checked_actions(actions: np.ndarray) -> np.ndarray:
    """float64 [K, 7], K >= 1, finite and within [-1, 1] (rounding of 1e-6 is clipped)."""
    try:
        checked = np.asarray(actions, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InvalidActionError(
            f"actions are not numbers ({error}); expected float [K, {ACTION_DIM}]"
        ) from error
    if checked.ndim != 2 or checked.shape[0] < 1 or checked.shape[1] != ACTION_DIM:
        raise InvalidActionError(
            f"actions have shape {checked.shape}; expected [K, {ACTION_DIM}] with K >= 1"
        )
    if not np.isfinite(checked).all():
        step, dim = np.argwhere(~np.isfinite(checked))[0]
        raise InvalidActionError(
            f"action {step} has {checked[step, dim]} in dimension {dim}; expected a finite number"
        )
    if np.abs(checked).max() > 1 + _RANGE_TOLERANCE:
        step, dim = np.argwhere(np.abs(checked) > 1 + _RANGE_TOLERANCE)[0]
        raise InvalidActionError(
            f"action {step} has {checked[step, dim]:g} in dimension {dim}; expected [-1, 1]: clip or unnormalise it"
        )
    return np.clip(checked, -1.0, 1.0)
