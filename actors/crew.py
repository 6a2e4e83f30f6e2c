"""The crew of a run: a handle on every actor, from its start to its end."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray

from actors.fleet import Fleet
from actors.learner import LearnerActor
from actors.monitor import MonitorActor
from actors.nodes import NodeWatch
from actors.parameter_server import ParameterServer
from actors.placement import learner_ask, on_node, rollout_ask, serving_ask, wait_until_placed
from actors.policy import PolicyActor
from actors.rollout import RolloutActor
from actors.store import StoreActor
from configs.policy import PolicyPart
from configs.preference import PreferencePart
from configs.schema import Recipe, ServingPart
from envs.assets import ResolvedAssets
from policies.published import located


class Crew:
    """Handles on every actor of a run. What starts actors that need CPUs or GPUs raises PlacementError when they find
    no place in PLACEMENT_DEADLINE_S."""

    def __init__(self) -> None:
        self._monitor_name = f"monitor-{uuid.uuid4().hex[:8]}"
        self.monitor: Any = MonitorActor.options(
            name=self._monitor_name,
            num_cpus=0,
            max_restarts=-1,
            max_task_retries=-1,
            scheduling_strategy=on_node(),
        ).remote()
        self.learner: Any = None
        self.policies: list[Any] = []
        self.fleet = Fleet([], slots=1, timeout_s=0.0, on_event=lambda event: None)
        self.nodes: NodeWatch | None = None
        self._others: list[Any] = [self.monitor]

    def start_fleet(
        self,
        recipe: Recipe,
        *,
        assets: ResolvedAssets,
        on_event: Callable[[dict[str, Any]], None],
    ) -> None:
        """Start the rollout actors that the run keeps; the fleet starts others while there is work for them."""
        part, environment = recipe.rollouts, recipe.environment

        def make(renderer: str | None) -> Any:
            drawn = environment if renderer is None else environment.model_copy(update={"renderer": renderer})
            return RolloutActor.options(
                num_cpus=part.cpus_per_actor, max_restarts=-1, max_concurrency=part.envs_per_actor + 1
            ).remote(
                environment=drawn, assets=assets, num_envs=part.envs_per_actor, deadlines=recipe.deadlines
            )

        actors = [make(None) for _ in range(part.kept)]
        self.nodes = NodeWatch(on_event)
        self.fleet = Fleet(
            actors,
            slots=part.envs_per_actor,
            timeout_s=part.episode_timeout_s,
            on_event=on_event,
            make=make,
            most=part.actors,
            nodes=self.nodes,
            release_after_s=part.release_after_s,
        )
        wait_until_placed(actors, rollout_ask(part))

    def start_learner(self, recipe: Recipe) -> None:
        """Start the learner actor."""
        part = recipe.learner
        init, vector = recipe.supervised.init, recipe.capability.vector
        self.learner = LearnerActor.options(num_cpus=part.cpus, num_gpus=part.gpus, max_restarts=-1).remote(
            policy=located(recipe.policy),
            supervised=recipe.supervised.model_copy(update={"init": _absolute(init)}),
            capability=recipe.capability.model_copy(update={"vector": _absolute(vector)}),
            adapter=recipe.adapter,
            preference=recipe.preference,
            guard=recipe.guard,
            image_size=recipe.environment.image_size,
            seed=recipe.seed,
            threads=part.threads,
            monitor=self._monitor_name,
        )
        self._others.append(self.learner)
        wait_until_placed([self.learner], learner_ask(part))

    def start_store(self, folder: str, *, preference: PreferencePart, seed: int) -> None:
        """Start the actor that owns the preference store."""
        self.store: Any = StoreActor.options(
            num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy=on_node()
        ).remote(folder=folder, preference=preference, seed=seed)
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
        # What they merge comes from the learner, whose node has the memory for it and stays.
        place = (
            None
            if self.learner is None
            else on_node(ray.get(self.learner.node.options(max_task_retries=-1).remote()))
        )
        self.server = ParameterServer(
            start_checkpoint=start_checkpoint, saved=saved, num_shards=num_shards, place=place
        )
        self.policies = [
            PolicyActor.options(
                num_cpus=part.cpus_per_actor,
                num_gpus=part.gpus_per_actor,
                max_restarts=-1,
                max_concurrency=1000,
            ).remote(
                policy=located(policy),
                serving=part,
                image_size=image_size,
                shards=self.server.names,
                index=index,
                monitor=self._monitor_name,
            )
            for index in range(part.actors)
        ]
        self._others += [*self.server.shards, *self.policies]
        wait_until_placed(self.policies, serving_ask(part))

    def tend(self) -> None:
        """What is due now and then while the driver waits for something else."""
        self.fleet.tend()

    def dismiss(self) -> None:
        """End every actor of this run."""
        fleet = [member.actor for member in self.fleet.members]
        for actor in [*self._others, *fleet]:
            ray.kill(actor)


def _absolute(path: str | None) -> str | None:
    """What an actor needs, whose working directory may be another."""
    return None if path is None else str(Path(path).resolve())
