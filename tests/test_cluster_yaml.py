"""cluster.yaml is valid by Ray's own schema, and starts Ray behind a token and on loopback."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray.autoscaler
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from actors.placement import PlacementError, check_packs, learner_ask, rollout_ask, serving_ask
from configs.loader import load_recipe

ROOT = Path(__file__).parents[1]
SCHEMA = Path(ray.autoscaler.__file__).parent / "ray-schema.json"


@pytest.fixture
def cluster() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


def test_cluster_yaml_meets_rays_schema(cluster: dict[str, Any]) -> None:
    jsonschema.validate(cluster, json.loads(SCHEMA.read_text()))
    validate_config(cluster)


def test_cluster_yaml_is_valid_after_ray_fills_in_defaults(cluster: dict[str, Any]) -> None:
    prepared = prepare_config(cluster)
    validate_config(prepared)
    assert set(prepared["available_node_types"]) == {"head", "simulators", "gpu"}
    assert prepared["available_node_types"]["simulators"]["max_workers"] == 16


@pytest.mark.parametrize(
    ("where", "key", "message"),
    [
        ((), "max_worker", "'max_worker' was unexpected"),
        (("available_node_types", "gpu"), "min_worker", "'min_worker' was unexpected"),
        (("auth",), "ssh_usr", "'ssh_usr' was unexpected"),
    ],
)
def test_a_misspelt_key_is_refused(
    cluster: dict[str, Any], where: tuple[str, ...], key: str, message: str
) -> None:
    part = cluster
    for name in where:
        part = part[name]
    part[key] = 1
    with pytest.raises(jsonschema.ValidationError, match=message):
        validate_config(cluster)


def test_a_fraction_of_a_cpu_is_refused(cluster: dict[str, Any]) -> None:
    cluster["available_node_types"]["gpu"]["resources"]["CPU"] = 0.5
    with pytest.raises(jsonschema.ValidationError, match="is not of type 'integer'"):
        validate_config(cluster)


def test_ray_starts_in_the_repository_behind_a_token_on_loopback(cluster: dict[str, Any]) -> None:
    mount = next(remote for remote, local in cluster["file_mounts"].items() if local == ".")
    assert cluster["file_mounts"]["/home/ubuntu/.ray/auth_token"] == "~/.ray/auth_token"
    head, worker = (cluster[f"{kind}_start_ray_commands"][-1] for kind in ("head", "worker"))
    for command in (head, worker):
        assert command.startswith(f"cd {mount} && ")
        assert "RAY_AUTH_MODE=token .venv/bin/ray start" in command
    assert "--dashboard-host=127.0.0.1" in head


def test_the_quoted_job_fits_the_nodes_that_are_always_up(cluster: dict[str, Any]) -> None:
    nodes = [
        {name: float(amount) for name, amount in kind["resources"].items()}
        for kind in cluster["available_node_types"].values()
        for _ in range(kind.get("min_workers", 0))
    ]
    recipe = load_recipe(ROOT / "configs" / "quickstart.yaml", ["rollouts.actors=16"])
    asks = (rollout_ask(recipe.rollouts), serving_ask(recipe.serving), learner_ask(recipe.learner))
    check_packs(asks, nodes)
    with pytest.raises(PlacementError):
        check_packs(asks, [])


@pytest.mark.parametrize(
    "name", ["openvla_libero", "openvla_oft_libero", "pi0_libero", "pi05_libero", "ddvla_libero"]
)
def test_the_recipes_for_gpus_fit_the_nodes_that_it_may_grow_to(cluster: dict[str, Any], name: str) -> None:
    nodes = [
        {resource: float(amount) for resource, amount in kind["resources"].items()}
        for kind in cluster["available_node_types"].values()
        for _ in range(kind.get("max_workers", 1))
    ]
    recipe = load_recipe(ROOT / "configs" / f"{name}.yaml", ["policy.checkpoint=somewhere"])
    check_packs(
        (rollout_ask(recipe.rollouts), serving_ask(recipe.serving), learner_ask(recipe.learner)), nodes
    )
