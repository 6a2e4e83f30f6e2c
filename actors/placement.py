"""Connect to Ray, check that a recipe fits the cluster, and start and end the actors of a run."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayTaskError

from actors.fleet import Fleet
from actors.learner import LearnerActor, MonitorActor, StoreActor
from actors.parameter_server import ParameterServer
from actors.policy import PolicyActor
from actors.rollout import RolloutActor
from configs.schema import (
    AdapterPart,
    EnvironmentPart,
    GuardPart,
    LearnerPart,
    PolicyPart,
    PreferencePart,
    RolloutPart,
    ServingPart,
    SupervisedPart,
)
from envs.assets import ResolvedAssets

log = logging.getLogger(__name__)

OBJECT_STORE_BYTES = 1 << 30
"""Size of a local cluster's object store: trajectories in flight and a few weight versions."""


class PlacementError(RuntimeError):
    """The recipe asks for more than the cluster has."""


def cause_of(error: BaseException) -> BaseException:
    """The error itself: one that was raised in an actor comes with that actor's traceback in its text."""
    return error.cause if isinstance(error, RayTaskError) else error


def connect() -> None:
    """Join the cluster this process was submitted to, or start a local one.

    The working directory is not set here: under `ray job submit --working-dir .` Ray has set it, and setting it
    twice fails.
    """
    if ray.is_initialized():
        return
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
    if "RAY_ADDRESS" not in os.environ:
        options |= {
            "address": "local",
            "include_dashboard": False,
            "object_store_memory": OBJECT_STORE_BYTES,
        }
    ray.init(**options)


def check_fits(*, rollouts: RolloutPart, serving: ServingPart, learner: LearnerPart) -> None:
    """Raise PlacementError naming the first resource of which a recipe wants more than the cluster has."""
    gpus = serving.actors * serving.gpus_per_actor + learner.gpus
    cpus = serving.actors * serving.cpus_per_actor + rollouts.actors * rollouts.cpus_per_actor + learner.cpus
    wants = (
        ("GPU", gpus, "serving.gpus_per_actor or learner.gpus"),
        ("CPU", cpus, "rollouts.actors, rollouts.cpus_per_actor, serving.cpus_per_actor or learner.cpus"),
    )
    has = ray.cluster_resources()
    for name, amount, fields in wants:
        if amount > has.get(name, 0.0):
            raise PlacementError(
                f"the recipe asks for {amount:g} {name}s and the cluster has {has.get(name, 0.0):g}; "
                f"lower {fields}, or add nodes"
            )


class Crew:
    """Handles on every actor of a run."""

    def __init__(self) -> None:
        self.monitor: Any = MonitorActor.options(num_cpus=0).remote()
        self.policies: list[Any] = []
        self._others: list[Any] = [self.monitor]

    def start_fleet(
        self,
        part: RolloutPart,
        *,
        environment: EnvironmentPart,
        assets: ResolvedAssets,
        on_event: Callable[[dict[str, Any]], None],
    ) -> None:
        """Start the rollout actors."""
        actors = [
            RolloutActor.options(
                num_cpus=part.cpus_per_actor, max_restarts=-1, max_concurrency=part.envs_per_actor
            ).remote(environment=environment, assets=assets, num_envs=part.envs_per_actor)
            for _ in range(part.actors)
        ]
        self._others += actors
        self.fleet = Fleet(
            actors, slots=part.envs_per_actor, timeout_s=part.episode_timeout_s, on_event=on_event
        )

    def start_learner(
        self,
        part: LearnerPart,
        *,
        policy: PolicyPart,
        supervised: SupervisedPart,
        adapter: AdapterPart,
        preference: PreferencePart,
        guard: GuardPart,
        image_size: int,
        seed: int,
    ) -> None:
        """Start the learner actor."""
        self.learner: Any = LearnerActor.options(num_cpus=part.cpus, num_gpus=part.gpus).remote(
            policy=policy,
            supervised=supervised,
            adapter=adapter,
            preference=preference,
            guard=guard,
            image_size=image_size,
            seed=seed,
            threads=part.threads,
            monitor=self.monitor,
        )
        self._others.append(self.learner)

    def start_store(self, folder: str, *, preference: PreferencePart, seed: int) -> None:
        """Start the actor that owns the preference store."""
        self.store: Any = StoreActor.options(num_cpus=0).remote(
            folder=folder, preference=preference, seed=seed
        )
        self._others.append(self.store)

    def start_serving(
        self,
        part: ServingPart,
        *,
        policy: PolicyPart,
        image_size: int,
        start_checkpoint: str,
        saved: str,
        num_shards: int,
    ) -> None:
        """Start the parameter-server shards on a start checkpoint, and the policy actors that pull from them. `saved`
        holds, or will hold, the adapters of the versions published."""
        self.server = ParameterServer(start_checkpoint=start_checkpoint, saved=saved, num_shards=num_shards)
        self.policies = [
            PolicyActor.options(
                num_cpus=part.cpus_per_actor,
                num_gpus=part.gpus_per_actor,
                max_restarts=-1,
                max_concurrency=1000,
            ).remote(policy=policy, serving=part, image_size=image_size, shards=self.server.names)
            for _ in range(part.actors)
        ]
        self._others += [*self.server.shards, *self.policies]

    def dismiss(self) -> None:
        """End every actor of this run."""
        for actor in self._others:
            ray.kill(actor)
