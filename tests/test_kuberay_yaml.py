"""kuberay.yaml is valid by KubeRay's own schema and as Ray's autoscaler reads it, and demands tokens."""

from __future__ import annotations

import copy
import gzip
import json
import shlex
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import validate_config
from ray.scripts.scripts import cli

from actors.placement import PlacementError, check_packs, learner_ask, rollout_ask, serving_ask
from configs.loader import load_recipe

ROOT = Path(__file__).parents[1]
SCHEMA = Path(__file__).parent / "data" / "kuberay-raycluster-v1.7.0.json.gz"
"""The openAPIV3Schema of version v1 in ray-operator/config/crd/bases/ray.io_rayclusters.yaml of KubeRay 1.7.0, which is
under Apache-2.0 and in no package on PyPI."""
GPU_RECIPES = ("openvla_libero", "openvla_oft_libero", "pi0_libero", "pi05_libero", "ddvla_libero")


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    return strict(json.loads(gzip.decompress(SCHEMA.read_bytes())))


@pytest.fixture
def documents() -> dict[str, dict[str, Any]]:
    return {
        document["kind"]: document for document in yaml.safe_load_all((ROOT / "kuberay.yaml").read_text())
    }


@pytest.fixture
def cluster(documents: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return documents["RayCluster"]


def strict(part: Any) -> Any:
    """A schema that refuses unknown fields, as `kubectl apply` does; alone it would pass over them."""
    if isinstance(part, list):
        return [strict(item) for item in part]
    if not isinstance(part, dict):
        return part
    part = {key: strict(value) for key, value in part.items()}
    # `metadata` is Kubernetes' own and has no schema in here.
    if isinstance(part.get("properties"), dict) and "x-kubernetes-preserve-unknown-fields" not in part:
        part.setdefault("additionalProperties", False)
    return part


def groups(cluster: dict[str, Any]) -> dict[str, dict[str, Any]]:
    spec = cluster["spec"]
    return {
        "head": spec["headGroupSpec"],
        **{group["groupName"]: group for group in spec["workerGroupSpecs"]},
    }


def pod(group: dict[str, Any]) -> dict[str, Any]:
    return group["template"]["spec"]


def container(group: dict[str, Any]) -> dict[str, Any]:
    (only,) = pod(group)["containers"]
    return only


def as_ray_reads_it(cluster: dict[str, Any]) -> dict[str, Any]:
    """The autoscaler's configuration, by the code that the autoscaler's container runs."""
    with_namespace = copy.deepcopy(cluster)
    with_namespace["metadata"]["namespace"] = "default"
    return _derive_autoscaling_config_from_ray_cr(with_namespace)


def test_it_meets_kuberays_schema(cluster: dict[str, Any], schema: dict[str, Any]) -> None:
    assert cluster["apiVersion"] == "ray.io/v1"
    jsonschema.validate(cluster, schema)


@pytest.mark.parametrize(
    ("where", "key", "value", "message"),
    [
        (("spec",), "enableIntreeAutoscaling", True, "'enableIntreeAutoscaling' was unexpected"),
        (("spec", "authOptions"), "mode", "tokens", "'tokens' is not one of"),
        (("spec", "workerGroupSpecs", 0), "maxReplica", 3, "'maxReplica' was unexpected"),
        (
            ("spec", "workerGroupSpecs", 0, "template", "spec"),
            "toleration",
            [],
            "'toleration' was unexpected",
        ),
        (("spec", "headGroupSpec", "rayStartParams"), "num-cpus", 0, "0 is not of type 'string'"),
    ],
)
def test_a_mistake_is_refused(
    cluster: dict[str, Any],
    schema: dict[str, Any],
    where: tuple[str | int, ...],
    key: str,
    value: object,
    message: str,
) -> None:
    part: Any = cluster
    for name in where:
        part = part[name]
    part[key] = value
    with pytest.raises(jsonschema.ValidationError, match=message):
        jsonschema.validate(cluster, schema)


def test_rays_autoscaler_reads_it(cluster: dict[str, Any]) -> None:
    config = as_ray_reads_it(cluster)
    validate_config(config)
    kinds = config["available_node_types"]
    limits = {name: (kind["min_workers"], kind["max_workers"]) for name, kind in kinds.items()}
    assert limits == {"headgroup": (0, 0), "simulators": (1, 16), "gpu": (0, 1)}
    assert config["idle_timeout_minutes"] == 10
    assert kinds["headgroup"]["resources"]["CPU"] == 0
    assert kinds["gpu"]["resources"]["GPU"] == 2


def test_autoscaling_is_on_and_the_ray_version_is_the_pinned_one(cluster: dict[str, Any]) -> None:
    spec = cluster["spec"]
    assert spec["enableInTreeAutoscaling"] is True
    assert spec["autoscalerOptions"]["version"] == "v2"
    assert spec["rayVersion"] == version("ray")
    # The operator refuses any other policy under the second autoscaler.
    assert all("restartPolicy" not in pod(group) for group in groups(cluster).values())


def test_a_token_from_a_secret_is_demanded_and_nobody_turns_it_off(cluster: dict[str, Any]) -> None:
    assert cluster["spec"]["authOptions"] == {"mode": "token", "secretName": "pairloom-token"}
    for group in groups(cluster).values():
        assert {entry["name"] for entry in container(group)["env"]} == {"OMP_NUM_THREADS"}
    text = (ROOT / "kuberay.yaml").read_text()
    assert "secret generic pairloom-token --from-file=auth_token=" in text
    assert not any(document["kind"] == "Secret" for document in yaml.safe_load_all(text))


def test_nothing_is_bound_to_every_address_or_published(cluster: dict[str, Any]) -> None:
    head = cluster["spec"]["headGroupSpec"]
    assert head["rayStartParams"]["dashboard-host"] == "127.0.0.1"
    assert head["serviceType"] == "ClusterIP"
    assert not head.get("enableIngress", False)
    assert "0.0.0.0" not in json.dumps(cluster)
    for group in groups(cluster).values():
        assert not pod(group).get("hostNetwork", False)
        assert not any("hostPort" in port for port in container(group).get("ports", []))


def test_every_pod_shares_the_runs_and_keeps_to_its_memory(documents: dict[str, dict[str, Any]]) -> None:
    claim = documents["PersistentVolumeClaim"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for name, group in groups(documents["RayCluster"]).items():
        (volume,) = pod(group)["volumes"]
        assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        assert container(group)["volumeMounts"] == [{"name": volume["name"], "mountPath": "/runs"}]
        resources = container(group)["resources"]
        assert resources["requests"] == resources["limits"], name
        assert {"cpu", "memory"} <= resources["limits"].keys()
        assert {"name": "OMP_NUM_THREADS", "value": "1"} in container(group)["env"]
        assert pod(group)["terminationGracePeriodSeconds"] >= 25


def test_simulators_run_on_spot_nodes_and_the_learner_does_not(cluster: dict[str, Any]) -> None:
    tolerated = {
        name: {t["key"] for t in pod(group).get("tolerations", [])} for name, group in groups(cluster).items()
    }
    assert tolerated["simulators"] == {"cloud.google.com/gke-spot", "kubernetes.azure.com/scalesetpriority"}
    assert tolerated["gpu"] == {"nvidia.com/gpu"}
    assert tolerated["head"] == set()


def test_simulators_prefer_spot_nodes_and_do_without(cluster: dict[str, Any]) -> None:
    affinity = {name: pod(group).get("affinity") for name, group in groups(cluster).items()}
    assert (affinity["head"], affinity["gpu"]) == (None, None)
    (rule,) = affinity["simulators"]["nodeAffinity"].items()
    assert rule[0] == "preferredDuringSchedulingIgnoredDuringExecution"
    wanted = [entry["preference"]["matchExpressions"] for entry in rule[1]]
    assert {(e["key"], e["operator"], *e["values"]) for (e,) in wanted} == {
        ("cloud.google.com/gke-spot", "In", "true"),
        ("kubernetes.azure.com/scalesetpriority", "In", "spot"),
        ("eks.amazonaws.com/capacityType", "In", "SPOT"),
        ("karpenter.sh/capacity-type", "In", "spot"),
    }


def test_a_simulator_pod_tells_ray_before_it_ends(cluster: dict[str, Any]) -> None:
    hooks = {name: container(group).get("lifecycle") for name, group in groups(cluster).items()}
    assert (hooks["head"], hooks["gpu"]) == (None, None)
    *shell, script = hooks["simulators"]["preStop"]["exec"]["command"]
    assert shell == ["/bin/sh", "-c"]
    subprocess.run(["/bin/sh", "-n", "-c", script], check=True)
    notice, _, wait = script.partition(" > /dev/null 2>&1; ")
    timeout, seconds, ray, command, *options = shlex.split(notice)
    assert (timeout, ray, command) == ("timeout", "ray", "drain-node")
    # What this Ray does not know is refused when it is parsed.
    asked = cli.commands[command].make_context(command, options).params
    assert asked["reason"] == "DRAIN_NODE_REASON_PREEMPTION"
    assert asked["node_id"] is None
    grace = pod(groups(cluster)["simulators"])["terminationGracePeriodSeconds"]
    assert asked["deadline_remaining_seconds"] <= grace
    assert int(seconds) < grace
    assert wait == "sleep 20"


def nodes(cluster: dict[str, Any], *, up: dict[str, int]) -> list[dict[str, float]]:
    """What the pods of these groups offer, `up` of each, as Ray counts it."""
    kinds = as_ray_reads_it(cluster)["available_node_types"]
    return [
        {name: float(kinds[group]["resources"].get(name, 0)) for name in ("CPU", "GPU")}
        for group, count in up.items()
        for _ in range(count)
    ]


def test_the_quoted_job_fits_the_pods_that_are_always_up(cluster: dict[str, Any]) -> None:
    recipe = load_recipe(ROOT / "configs" / "quickstart.yaml", ["rollouts.actors=16"])
    asks = (rollout_ask(recipe.rollouts), serving_ask(recipe.serving), learner_ask(recipe.learner))
    always = {"headgroup": 1} | {
        g["groupName"]: g["minReplicas"] for g in cluster["spec"]["workerGroupSpecs"]
    }
    check_packs(asks, nodes(cluster, up=always))
    with pytest.raises(PlacementError):
        check_packs(asks, nodes(cluster, up={"headgroup": 1}))


@pytest.mark.parametrize("name", GPU_RECIPES)
def test_a_recipe_with_gpus_fits_one_pod_of_each_group(cluster: dict[str, Any], name: str) -> None:
    recipe = load_recipe(ROOT / "configs" / f"{name}.yaml")
    asks = (rollout_ask(recipe.rollouts), serving_ask(recipe.serving), learner_ask(recipe.learner))
    check_packs(asks, nodes(cluster, up={"headgroup": 1, "simulators": 1, "gpu": 1}))
    with pytest.raises(PlacementError):
        check_packs(asks, nodes(cluster, up={"headgroup": 1, "simulators": 16}))
