"""Connect to Ray, check that a recipe fits the cluster, and start and end the actors of a run."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import AuthenticationError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.autoscaler import grows
from configs.schema import LearnerPart, RolloutPart, ServingPart
from policies.decoding.vllm_build import check_build, installed_builds

log = logging.getLogger(__name__)

OBJECT_STORE_BYTES = 1 << 30
"""Size of a local cluster's object store: trajectories in flight and a few weight versions of a small policy."""
LIVE_VERSIONS = 3
"""Merged versions in the object store at once: the one in force, the candidate, and the next before one retires."""


PLACEMENT_DEADLINE_S = 600.0
"""How long actors may take to find a place and start."""
AUTH_MODES = ("token", "disabled")
NAMED_ADDRESSES = ("auto", "local")
LISTENER_S = 10.0
"""How long the head of a cluster may take to accept a connection."""
SAY_EVERY_S = 10.0
_ROUNDING = 1e-6


class PlacementError(RuntimeError):
    """The recipe asks for what the cluster has not."""


def cause_of(error: BaseException) -> BaseException:
    """The error itself: one that was raised in an actor comes with that actor's traceback in its text."""
    return error.cause if isinstance(error, RayTaskError) else error


def connect(*, weight_bytes: int = 0) -> None:
    """Join the cluster this process was submitted to, or start a local one whose object store has room for the versions
    of a policy of `weight_bytes` that exist at once.

    Raises PlacementError when there is none, it refuses the token, or the environment does not say how to join it.

    The working directory is not set here: under `ray job submit --working-dir .` Ray has set it, and setting it
    twice fails.
    """
    check_auth_mode(os.environ["RAY_AUTH_MODE"])
    if ray.is_initialized():
        return
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
    if not os.environ.get("RAY_ADDRESS"):
        options |= {
            "address": "local",
            "include_dashboard": False,
            "object_store_memory": OBJECT_STORE_BYTES + LIVE_VERSIONS * weight_bytes,
        }
    else:
        require_listener(os.environ["RAY_ADDRESS"])
    try:
        ray.init(**options)
    except (AuthenticationError, ConnectionError) as error:
        where = os.environ.get("RAY_ADDRESS") or "this machine"
        # Ray's own words on tokens go on with a page of advice.
        said = error.message if isinstance(error, AuthenticationError) else str(error)
        why = next((line for line in said.splitlines() if line.strip()), type(error).__name__)
        raise PlacementError(
            f"cannot join the Ray cluster on {where}: {why.rstrip('.')}; see that it is up (`ray status`), and that "
            "RAY_AUTH_MODE and the token in RAY_AUTH_TOKEN, or else in ~/.ray/auth_token, are its own"
        ) from error


def check_auth_mode(mode: str) -> None:
    """Raise PlacementError for a RAY_AUTH_MODE that Ray does not know: it would take no tokens, and say nothing."""
    if mode not in AUTH_MODES:
        raise PlacementError(
            f"RAY_AUTH_MODE is {mode!r}, expected {' or '.join(AUTH_MODES)}; set it to token, or unset it, which is "
            "the same"
        )


def require_listener(address: str) -> None:
    """Raise PlacementError for an address that is none, and where nothing listens at a host and port: Ray itself would
    try for minutes."""
    if address in NAMED_ADDRESSES:
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise PlacementError(
            f"RAY_ADDRESS is {address!r}, expected {' or '.join(NAMED_ADDRESSES)} or the host:port of a cluster's "
            "head, such as 10.0.0.1:6379; unset it to run on this machine alone"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=LISTENER_S).close()
    except OSError as error:
        raise PlacementError(
            f"no Ray answers at RAY_ADDRESS={address} ({error.strerror or error}); see that the cluster is up (`ray "
            "status`) and can be reached from here, or unset RAY_ADDRESS to run on this machine alone"
        ) from error


@dataclass(frozen=True, kw_only=True, slots=True)
class Ask:
    """What one kind of actor asks of the cluster."""

    what: str
    count: int
    cpus: float
    gpus: float = 0.0
    fields: str
    """The recipe's settings that it comes from."""

    def each(self) -> str:
        return f"{self.cpus:g} CPUs and {self.gpus:g} GPUs"


def rollout_ask(part: RolloutPart) -> Ask:
    """What the rollout actors that a run begins with ask for."""
    fields = "rollouts.actors, rollouts.least_actors or rollouts.cpus_per_actor"
    return Ask(what="rollout actor", count=part.kept, cpus=part.cpus_per_actor, fields=fields)


def serving_ask(part: ServingPart) -> Ask:
    """What the policy actors ask for."""
    return Ask(
        what="policy actor",
        count=part.actors,
        cpus=part.cpus_per_actor,
        gpus=part.gpus_per_actor,
        fields="serving.actors, serving.cpus_per_actor or serving.gpus_per_actor",
    )


def learner_ask(part: LearnerPart) -> Ask:
    """What the learner asks for."""
    return Ask(what="learner", count=1, cpus=part.cpus, gpus=part.gpus, fields="learner.cpus or learner.gpus")


def check_fits(*, rollouts: RolloutPart, serving: ServingPart, learner: LearnerPart) -> None:
    """Raise PlacementError when a recipe wants more than a cluster of fixed size has, all in all or on one node, or a
    serving engine that is not installed, or not for the policy actors' device."""
    check_engine(serving)
    asks = (rollout_ask(rollouts), serving_ask(serving), learner_ask(learner))
    gpus, cpus = sum(a.count * a.gpus for a in asks), sum(a.count * a.cpus for a in asks)
    wants = (
        ("GPU", gpus, "serving.gpus_per_actor or learner.gpus"),
        ("CPU", cpus, "rollouts.actors, rollouts.cpus_per_actor, serving.cpus_per_actor or learner.cpus"),
    )
    if grows():
        return  # what is not there yet is asked for, and waited for
    has = ray.cluster_resources()
    for name, amount, fields in wants:
        if amount > has.get(name, 0.0):
            raise PlacementError(
                f"the recipe asks for {amount:g} {name}s and the cluster has {has.get(name, 0.0):g}; "
                f"lower {fields}, or add nodes"
            )
    check_packs(asks, _nodes())


def check_engine(part: ServingPart) -> None:
    """Raise PlacementError when the policy actors' engine is not installed here, or is built for another device than
    theirs; the nodes of a cluster are taken to have the same environment."""
    if part.engine == "vllm":
        try:
            check_build(installed_builds(), gpus=part.gpus_per_actor)
        except ValueError as error:
            raise PlacementError(str(error)) from error


def check_packs(asks: Iterable[Ask], nodes: Sequence[Mapping[str, float]]) -> None:
    """Raise PlacementError naming the first kind of actor that no node has room for beside the others.

    The largest go first, each to the first node with room. Ray moves no actor once it is placed, so what does not
    fit this way would in all likelihood wait for ever.

    Args:
        asks: what the recipe wants.
        nodes: of each node, how much of `CPU` and `GPU` it has.
    """
    free = [[node.get("CPU", 0.0), node.get("GPU", 0.0)] for node in nodes]
    for ask in sorted(asks, key=lambda a: (-a.gpus, -a.cpus)):
        for _ in range(ask.count):
            room = (n for n in free if n[0] + _ROUNDING >= ask.cpus and n[1] + _ROUNDING >= ask.gpus)
            node = next(room, None)
            if node is None:
                raise PlacementError(
                    f"no node has room for a {ask.what} of {ask.each()} beside the rest of the recipe; the nodes have "
                    f"{_listed(nodes)}; lower {ask.fields}, or use larger nodes"
                )
            node[0] -= ask.cpus
            node[1] -= ask.gpus


def wait_until_placed(actors: Sequence[Any], ask: Ask, *, deadline_s: float = PLACEMENT_DEADLINE_S) -> None:
    """Wait until every actor has a place and has started. Raises PlacementError when that takes too long: what the
    cluster has may be in use by others."""
    started = [actor.__ray_ready__.remote() for actor in actors]
    there: list[ray.ObjectRef] = []
    late, deadline = started, time.monotonic() + deadline_s
    while late and time.monotonic() < deadline:
        there, late = ray.wait(started, num_returns=len(started), timeout=min(SAY_EVERY_S, deadline_s))
        if late:
            log.info(
                "waiting for %d %ss of %s; the nodes have %s",
                len(late),
                ask.what,
                ask.each(),
                _listed(_nodes()),
            )
    ray.get(there)  # one whose constructor failed says so here, not at its first use
    if late:
        unused = ray.available_resources()
        free = f"{unused.get('CPU', 0.0):g} CPUs and {unused.get('GPU', 0.0):g} GPUs"
        raise PlacementError(
            f"{len(late)} of {len(started)} {ask.what}s did not start in {deadline_s:.0f} s; each asks for "
            f"{ask.each()}, the nodes have {_listed(_nodes())}, of which {free} are free; lower {ask.fields}, or wait "
            "until other jobs end"
        )


def on_node(node_id: str | None = None) -> NodeAffinitySchedulingStrategy:
    """Where an actor without CPUs lies: on this node, the driver's own by default, or on another once it is gone. Ray
    would put it on any, and an elastic node that holds one is never idle."""
    node_id = ray.get_runtime_context().get_node_id() if node_id is None else node_id
    return NodeAffinitySchedulingStrategy(node_id, soft=True)


def _nodes() -> list[dict[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _listed(nodes: Iterable[Mapping[str, float]]) -> str:
    return ", ".join(f"{node.get('CPU', 0.0):g} CPUs and {node.get('GPU', 0.0):g} GPUs" for node in nodes)
