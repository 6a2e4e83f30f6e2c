"""Scripted demonstrations with recoveries in them: the expert is pushed now and then, and only what it does
undisturbed is a label."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from envs.experts import expert_for
from envs.libero import LiberoEnv, SimulatorFaultError, to_observation
from trajectories.records import ACTION_DIM, ActionSample, Cell, Decision, Observation, Outcome, Trajectory

EXPERT_VERSION = -1
EXPERT_HASH = "scripted-expert"
PUSH_INTERVAL = 40.0
"""Mean number of steps between two pushes."""
PUSH_STEPS = (2, 5)
"""Shortest and longest push, control steps."""

_STILL = 0.004
"""Finger speed below which the fingers are not closing, m/s."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Push:
    """A disturbance added to the expert's actions in steps start..start + steps - 1."""

    start: int
    steps: int
    delta: np.ndarray
    """float64 [6], in action units."""


@dataclass(kw_only=True, slots=True)
class _Run:
    """An episode as it unfolds."""

    observations: dict[int, Observation] = field(default_factory=dict)
    """By step, at every `stride`th step without a push."""
    actions: list[np.ndarray] = field(default_factory=list)
    pushed: list[bool] = field(default_factory=list)
    """For each action, whether it was disturbed."""
    outcome: Outcome = "timeout"
    fault: str = ""


def demonstrate(
    env: LiberoEnv,
    *,
    init_state: int,
    seed: int,
    noise: float,
    chunk: int,
    stride: int = 2,
    depth: bool = False,
) -> Trajectory:
    """One episode of the task's scripted expert.

    Pushes come at random times, never while the fingers close on something. A decision is recorded at every `stride`th
    step from which the next `chunk` actions are the expert's own; the chunk that the episode ends in is filled up
    with standing still, gripper as it was.

    Args:
        env: the task; it is reset.
        init_state: official initial state, 0..49.
        seed: of the fixtures' placement and the pushes.
        noise: standard deviation of a push in action units (0.3: some 5 mm a step); rotations get half. 0: none.
        chunk: actions per decision, K.
        stride: steps from one decision to the next.
        depth: draw each observation's depth too.

    Returns:
        Decisions with actions = model_chunk = float32 [K, 7] and no log-probabilities. Outcome is success,
        timeout, or fault if the physics diverged.

    Raises:
        NoExpertError: the task has no expert.
        ValueError: init_state is out of range.
    """
    run = _run(env, init_state=init_state, seed=seed, noise=noise, stride=stride, depth=depth)
    return Trajectory(
        cell=Cell(suite=env.task.suite, task_id=env.task.task_id, init_state=init_state, seed=seed),
        decisions=tuple(
            _decision(observation, run.actions[step : step + chunk], chunk)
            for step, observation in run.observations.items()
            if not any(run.pushed[step : step + chunk])
        ),
        outcome=run.outcome,
        fault=run.fault,
        env_steps=len(run.actions),
        policy_version=EXPERT_VERSION,
        policy_hash=EXPERT_HASH,
    )


def _run(env: LiberoEnv, *, init_state: int, seed: int, noise: float, stride: int, depth: bool) -> _Run:
    """Drive the expert, disturbed by pushes, to the end of the episode; look at every `stride`th step."""
    expert = expert_for(env)
    run = _Run()
    try:
        env.reset(seed=seed, options={"init_state": init_state})
    except SimulatorFaultError as error:
        run.outcome, run.fault = "fault", str(error)
        return run
    expert.reset(env)
    pushes = _draw_pushes(np.random.default_rng(seed), env.max_steps, noise)
    success = truncated = False
    while not (success or truncated):
        step = len(run.actions)
        action = expert.act(env)
        push = next((push for push in pushes if push.start <= step < push.start + push.steps), None)
        if push is not None and not _closing(env, action):
            action = np.clip(action + np.append(push.delta, 0.0), -1.0, 1.0).astype(np.float32)
            run.pushed.append(True)
        else:
            run.pushed.append(False)
            if step % stride == 0:
                run.observations[step] = to_observation(env.observe(depth=depth), env.instruction)
        run.actions.append(action)
        try:
            success, truncated, _ = env.advance(action[None])
        except SimulatorFaultError as error:
            run.outcome, run.fault = "fault", str(error)
            return run
    run.outcome = "success" if success else "timeout"
    return run


def _draw_pushes(rng: np.random.Generator, max_steps: int, noise: float) -> list[Push]:
    """Pushes of an episode that lasts `max_steps`, at exponentially distributed intervals."""
    pushes: list[Push] = []
    if noise == 0:
        return pushes
    start = int(rng.exponential(PUSH_INTERVAL))
    while start < max_steps:
        steps = int(rng.integers(PUSH_STEPS[0], PUSH_STEPS[1] + 1))
        delta = rng.normal(scale=noise, size=ACTION_DIM - 1) * np.array([1, 1, 1, 0.5, 0.5, 0.5])
        pushes.append(Push(start=start, steps=steps, delta=delta))
        start += steps + int(rng.exponential(PUSH_INTERVAL))
    return pushes


def _closing(env: LiberoEnv, action: np.ndarray) -> bool:
    """Whether the fingers are on their way to grasp."""
    robot = env.domain.robots[0]
    left, right = env.sim.data.qvel[robot._ref_gripper_joint_vel_indexes]
    opening = env.sim.data.qpos[robot._ref_gripper_joint_pos_indexes][0]
    return bool(action[-1] > 0 and (abs(left - right) > _STILL or opening > 0.038))


def _decision(observation: Observation, executed: list[np.ndarray], chunk: int) -> Decision:
    """The executed actions [1..K], filled up to K with standing still, gripper as it was."""
    hold = np.append(np.zeros(ACTION_DIM - 1), executed[-1][-1])
    rows = np.array([*executed, *[hold] * (chunk - len(executed))], dtype=np.float32)
    sample = ActionSample(actions=rows, model_chunk=rows, logps=np.zeros(0, dtype=np.float32))
    return Decision(observation=observation, sample=sample, executed=len(executed))
