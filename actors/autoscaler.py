"""What Ray's autoscaler is doing: whether there is one, what it starts, what it could not start, what it never can."""

from __future__ import annotations

from collections import Counter
from typing import Any

import ray
from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply  # type: ignore[attr-defined]
from ray.exceptions import RayError

_DEADLINE_S = 10.0
FAILED_SHOWN = 3
"""Latest failures that are told of."""


def grows() -> bool:
    """Whether Ray's autoscaler adds nodes to this cluster; it alone knows how many."""
    return bool(_status().HasField("autoscaling_state"))


def autoscaler_state() -> dict[str, Any]:
    """`starting`: how many nodes of each kind are asked for or starting; `failed`: the latest that did not start, each
    with its `kind` and `reason`; `infeasible`: requests that no kind of node can meet. Empty without an autoscaler, and
    while it cannot be asked."""
    try:
        status = _status()
    except RayError:
        return {}
    if not status.HasField("autoscaling_state"):
        return {}
    state = status.autoscaling_state
    starting = Counter[str]()
    for request in state.pending_instance_requests:
        starting[request.ray_node_type_name] += request.count
    for instance in state.pending_instances:
        starting[instance.ray_node_type_name] += 1
    failed = sorted(state.failed_instance_requests, key=lambda request: -request.failed_ts)[:FAILED_SHOWN]
    return {
        "starting": dict(starting),
        "failed": [{"kind": one.ray_node_type_name, "reason": one.reason[:200]} for one in failed],
        "infeasible": len(state.infeasible_resource_requests),
    }


def _status() -> GetClusterStatusReply:
    # What `ray status` asks; ray.autoscaler.sdk has no call for it.
    client = GcsClient(address=ray.get_runtime_context().gcs_address)
    reply = GetClusterStatusReply()
    reply.ParseFromString(client.get_cluster_status(timeout_s=_DEADLINE_S))
    return reply
