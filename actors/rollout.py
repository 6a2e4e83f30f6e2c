"""Rollout actors: one process, several LIBERO simulators. While one waits for its action chunk, others simulate.

Each episode is a coroutine: observe, ask a policy actor, run the chunk open-loop, repeat. The simulator blocks the
event loop while it steps (one thread per simulator process is the fastest LIBERO gets); only the wait for an answer
yields, and that is when another episode steps.
"""

from __future__ import annotations

import asyncio
import gc
import hashlib
import logging
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayActorError, RayTaskError

from configs.operation import DeadlinePart
from configs.world import DemonstrationPart, EnvironmentPart
from envs.assets import ResolvedAssets
from envs.deadlines import Deadlines
from envs.demonstrations import demonstrate
from envs.fingerprint import first_frame_hash
from envs.libero import InvalidActionError, LiberoEnv, SimulatorFaultError, Within, to_observation
from trajectories.codec import episode_record
from trajectories.records import ActionSample, Cell, Decision, Observation, Trajectory

log = logging.getLogger(__name__)


def decision_seed(cell: Cell, index: int) -> int:
    """Sampling seed of one decision: fixed by the cell alone, so any two policies share random numbers on it."""
    digest = hashlib.sha256(f"{cell.key}#{index}".encode()).digest()
    return int.from_bytes(digest[:8], "little")


class NoAnswerError(RuntimeError):
    """No policy actor answered in time: the episode says nothing, and is to be run again."""


class SimulatorPool:
    """At most `capacity` simulators, kept by task: building one takes seconds, resetting one a tenth."""

    def __init__(
        self, *, capacity: int, environment: EnvironmentPart, assets: ResolvedAssets, within: Within
    ) -> None:
        self._environment = environment
        self._assets = assets
        self._within = within
        self._free = asyncio.Semaphore(capacity)
        self._capacity = capacity
        self._idle: list[LiberoEnv] = []
        self._built = 0

    async def take(self, suite: str, task_id: int) -> LiberoEnv:
        """An idle simulator of this task, or a new one, replacing an idle one of another task if need be."""
        await self._free.acquire()
        tasks = [(env.task.suite, env.task.task_id) for env in self._idle]
        if (suite, task_id) in tasks:
            return self._idle.pop(tasks.index((suite, task_id)))
        if self._built == self._capacity:
            self._idle.pop(0).close()
            self._built -= 1
        # A closed simulator refers to itself, and Python does not see how large its model is: left to itself it would
        # keep hundreds of megabytes for a while.
        gc.collect()
        try:
            env = LiberoEnv(
                suite=suite,
                task_id=task_id,
                environment=self._environment,
                assets=self._assets,
                within=self._within,
            )
        except Exception:
            self._free.release()
            raise
        self._built += 1
        return env

    def give_back(self, env: LiberoEnv, *, healthy: bool = True) -> None:
        if healthy:
            self._idle.append(env)
        else:
            env.close()
            self._built -= 1
        self._free.release()


class Rollouts:
    """Runs episodes against policy actors, and scripted demonstrations."""

    def __init__(
        self,
        *,
        environment: EnvironmentPart,
        assets: ResolvedAssets,
        num_envs: int,
        deadlines: DeadlinePart | None = None,
    ) -> None:
        part = deadlines or DeadlinePart()
        self._answer_s = part.answer_s
        self._deadlines = Deadlines(
            Path(tempfile.gettempdir()) / f"pairloom-{ray.get_runtime_context().get_actor_id()}.last-words",
            {"reset": part.reset_s, "step": part.step_s, "render": part.render_s},
        )
        self._pool = SimulatorPool(
            capacity=num_envs, environment=environment, assets=assets, within=self._deadlines
        )
        self._asked = 0

    async def introduce(self) -> dict[str, Any]:
        """The node that this actor is on, its process, and what the process that it replaces did when it died."""
        node = ray.get_runtime_context().get_node_id()
        return {"node": node, "process": os.getpid(), "last_words": self._deadlines.last_words}

    async def rollout(
        self, cell: Cell, *, policies: Sequence[Any], version: int, temperature: float
    ) -> tuple[dict[str, Any], Trajectory]:
        """One episode. Returns its outcome record and the trajectory (a fault is an outcome, not an exception). Raises
        NoAnswerError where policy actors are away for too long."""
        started = time.monotonic()
        env = await self._pool.take(cell.suite, cell.task_id)
        decisions: list[Decision] = []
        outcome, fault, steps, content_hash = "timeout", "", 0, ""
        try:
            seed = decision_seed(cell, -1) % 2**32
            frame, _ = env.reset(seed=seed, options={"init_state": cell.init_state})
            done = False
            while not done:
                observation = to_observation(frame, env.instruction)
                sample, content_hash = await self._ask(
                    policies,
                    observation,
                    seed=decision_seed(cell, len(decisions)),
                    version=version,
                    temperature=temperature,
                )
                frame, _, terminated, truncated, info = env.step_chunk(sample.actions)
                decisions.append(Decision(observation=observation, sample=sample, executed=info["executed"]))
                steps += info["executed"]
                done = terminated or truncated
                if info["success"]:
                    outcome = "success"
        except (InvalidActionError, SimulatorFaultError) as error:
            outcome, fault = "fault", f"{type(error).__name__}: {error}"
            log.warning("episode %s quarantined: %s", cell.key, fault)
        except BaseException as error:
            self._pool.give_back(env, healthy=isinstance(error, NoAnswerError))
            raise
        self._pool.give_back(env, healthy=outcome != "fault")
        trajectory = Trajectory(
            cell=cell,
            decisions=tuple(decisions),
            outcome=outcome,  # type: ignore[arg-type]
            fault=fault,
            env_steps=steps,
            policy_version=version,
            policy_hash=content_hash,
        )
        return episode_record(trajectory, wall_s=round(time.monotonic() - started, 3)), trajectory

    async def first_frame(self, cell: Cell) -> tuple[dict[str, Any], str]:
        """Hash of the first images of a cell's task at initial state 0 with seed 0, and what drew them."""
        env = await self._pool.take(cell.suite, cell.task_id)
        try:
            frame, _ = env.reset(seed=0, options={"init_state": 0})
        finally:
            self._pool.give_back(env)
        content = first_frame_hash(frame)
        task = f"{cell.suite}/{cell.task_id}"
        return {"task": task, "hash": content, "renderer": os.environ["MUJOCO_GL"]}, content

    async def demonstration(
        self, cell: Cell, *, part: DemonstrationPart, chunk: int, depth: bool
    ) -> tuple[dict[str, Any], Trajectory]:
        """One perturbed demonstration by the task's scripted expert. Raises what the expert raises, after closing the
        simulator it happened in."""
        env = await self._pool.take(cell.suite, cell.task_id)
        try:
            trajectory = demonstrate(
                env,
                init_state=cell.init_state,
                seed=cell.seed,
                noise=part.noise,
                chunk=chunk,
                depth=depth,
            )
        except BaseException:
            self._pool.give_back(env, healthy=False)
            raise
        self._pool.give_back(env, healthy=trajectory.outcome != "fault")
        return episode_record(trajectory), trajectory

    async def _ask(
        self,
        policies: Sequence[Any],
        observation: Observation,
        *,
        seed: int,
        version: int,
        temperature: float,
    ) -> tuple[ActionSample, str]:
        """Ask a policy actor; while one restarts, wait for it or ask another, and end one that hangs. Asking twice is
        harmless: the seed fixes the answer."""
        deadline = time.monotonic() + self._answer_s
        while True:
            policy = policies[self._asked % len(policies)]
            self._asked += 1
            try:
                answer = policy.act.remote(observation, seed=seed, version=version, temperature=temperature)
                sample, content_hash = await asyncio.wait_for(answer, self._answer_s)
            except TimeoutError as error:
                ray.kill(policy, no_restart=False)
                raise NoAnswerError(
                    f"a policy actor hung for {self._answer_s:.0f} s, and is ended; raise deadlines.answer_s if it "
                    "takes longer to load"
                ) from error
            except RayActorError as error:
                if isinstance(
                    error, RayTaskError
                ):  # the policy actor lives; what it pulls weights from does not
                    raise
                if time.monotonic() > deadline:
                    raise NoAnswerError(f"no policy actor answered in {self._answer_s:.0f} s") from error
                await asyncio.sleep(0.5)
                continue
            if not np.isfinite(sample.logps).all():
                raise InvalidActionError("the policy's log-probabilities are not finite")
            return sample, content_hash


RolloutActor = ray.remote(Rollouts)
