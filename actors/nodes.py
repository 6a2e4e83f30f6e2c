"""The cluster's nodes, watched: which joined, which are about to go, which are gone."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import ray
from ray._private.state import state as cluster_state

LOOK_EVERY_S = 2.0


class NodeWatch:
    """Notes what changes among the nodes, and knows which are about to go."""

    def __init__(self, on_event: Callable[[dict[str, Any]], None]) -> None:
        self._on_event = on_event
        self._known: dict[str, dict[str, Any]] = {}
        self._draining: set[str] = set()
        self._looked = 0.0
        self._nodes: list[dict[str, Any]] = []

    def look(self) -> set[str]:
        """Ids of the nodes that a preemption notice, or the autoscaler, has told to end; at most LOOK_EVERY_S old."""
        if time.monotonic() - self._looked < LOOK_EVERY_S:
            return self._draining
        self._looked = time.monotonic()
        self._nodes = [node for node in ray.nodes() if node["Alive"]]
        alive = {node["NodeID"]: node for node in self._nodes}
        # Ray has no public call for this; its own libraries (Serve, Train) ask here.
        draining = set(cluster_state.get_draining_nodes()) & alive.keys()
        if self._known:
            for node in alive.keys() - self._known.keys():
                self._say("node_joined", node, alive[node])
        for node in draining - self._draining:
            self._say("node_draining", node, alive[node])
        for node in self._known.keys() - alive.keys():
            self._say("node_lost", node, self._known[node])
        self._known, self._draining = alive, draining
        return draining

    def is_gone(self, node: str) -> bool:
        """Whether a node, by its id, is not alive any more; asked anew."""
        return bool(node) and all(one["NodeID"] != node for one in ray.nodes() if one["Alive"])

    def status(self) -> list[dict[str, Any]]:
        """The nodes that were alive at the last look."""
        return [
            {
                "node": node["NodeID"][:8],
                "cpus": node["Resources"].get("CPU", 0.0),
                "gpus": node["Resources"].get("GPU", 0.0),
                "alive": True,
                "draining": node["NodeID"] in self._draining,
            }
            for node in self._nodes
        ]

    def _say(self, event: str, node: str, what: dict[str, Any]) -> None:
        self._on_event({"event": event, "node": node[:8], "cpus": what["Resources"].get("CPU", 0.0)})
