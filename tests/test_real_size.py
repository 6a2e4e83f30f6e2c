"""What published sizes take: the memory table's numbers, and the measuring of real-size networks, at tiny size."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import memory, real_size
from benchmarks.published_sizes import openvla_7b
from configs.loader import load_recipe
from policies.openvla.layout import openvla_layout
from policies.pi0.sizes import PI05 as PI05_CONFIG
from tests import openvla_tiny
from tests.published_tiny import PI0

ROOT = Path(__file__).parents[1]
ROWS = {row["recipe"]: row for row in map(memory.measure, map(load_recipe, memory.RECIPES))}
OPENVLA, PI0_SIZE, PI05 = 7_541_237_184, 3_238_048_528, 3_353_433_872


def test_the_table_is_of_the_published_networks() -> None:
    assert {name: row["parameters"] for name, row in ROWS.items()} == {
        "openvla_libero": OPENVLA,
        "openvla_oft_libero": OPENVLA,
        "pi0_libero": PI0_SIZE,
        "pi05_libero": PI05,
        "ddvla_libero": OPENVLA,
    }


def test_bytes_follow_from_the_recipe() -> None:
    openvla, oft, pi05, ddvla = (
        ROWS[f"{name}_libero"] for name in ("openvla", "openvla_oft", "pi05", "ddvla")
    )
    assert openvla["weights"] == 2 * OPENVLA
    assert openvla["policy_actor"] == 4 * OPENVLA
    assert openvla["shards"] == 8 * OPENVLA
    assert openvla["supervised"] == 0
    assert ddvla["supervised"] == 16 * OPENVLA
    assert openvla["context"] == 256 * 4096 * 2
    assert pi05["context"] == 2 * 256 * 2048 * 2
    # Images of 224 pixels, of one camera and of two, and the mean of the context beside 8 of proprioception.
    assert openvla["kept"] == 224 * 224 * 3 + 4 * (4096 + 8)
    assert pi05["kept"] == 2 * 224 * 224 * 3 + 4 * (2048 + 8)
    # Three versions of ten tasks, ten states and four samples, and of a canary of 40, to 280 steps of libero_object.
    assert openvla["decisions"] == 3 * 440 * 280
    assert oft["decisions"] == 3 * 440 * 35
    assert pi05["decisions"] == 3 * 440 * 104
    assert ddvla["decisions"] == (3 * 440 + 100) * 35
    assert openvla["held"] == openvla["decisions"] * (openvla["kept"] + 2 * 256 * 256 * 3)
    assert max(row["held"] for row in ROWS.values()) < 256 * memory.GIB
    # LoRA of rank 32 on the seven linears of 32 Llama layers: attention 4096 to 4096, MLP 4096 to 11008.
    rank, width, mlp = 32, 4096, 11008
    factors = 32 * rank * (4 * 2 * width + 3 * (width + mlp))
    adapted = 32 * (4 * width * width + 3 * width * mlp)
    assert openvla["adapter_parameters"] == factors
    assert openvla["update"] == 2 * OPENVLA + 7 * 4 * factors + 2 * 2 * adapted
    assert openvla["supervised"] == 0
    through_adapter = load_recipe(
        ROOT / "configs/openvla_libero.yaml", ["supervised.trains=adapter", "supervised.steps=1"]
    )
    started = memory.measure(through_adapter)["supervised"]
    assert started == 2 * OPENVLA + 4 * 4 * factors + 2 * 2 * adapted
    assert f"{started / 2**30:.1f} GiB for `openvla_libero`" in (ROOT / "README.md").read_text()


def test_the_recorded_table_is_what_the_recipes_give() -> None:
    recorded = json.loads((ROOT / "docs/benchmarks/memory.json").read_text())
    assert recorded["rows"] == list(ROWS.values())


def test_the_readme_quotes_the_recorded_table() -> None:
    readme = (ROOT / "README.md").read_text()
    for row in ROWS.values():
        name, _, *cells = memory.shown(row)
        assert f"| `{name}` | {' | '.join(cells)} |" in readme


def test_the_results_quote_the_recorded_real_sizes() -> None:
    recorded = json.loads((ROOT / "docs/benchmarks/real_size.json").read_text())
    results = (ROOT / "docs/results.md").read_text()
    networks = [recorded[name] for name in ("openvla", "pi05", "ddvla")]
    assert [network.pop("parameters") for network in networks] == [OPENVLA, PI05, OPENVLA]
    for key in networks[0]:
        cells = [real_size.shown(network[key]) for network in networks]
        assert f"| `{key}` | {' | '.join(cells)} |" in results


def test_without_a_cuda_device_it_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.real_size"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr == "pairloom: benchmarks.real_size needs a CUDA device, and torch finds none here\n"


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="needs a CUDA device: real-size OpenVLA-7B and pi-0.5 not measured",
)
@pytest.mark.parametrize(("name", "parameters"), [("openvla", OPENVLA), ("pi05", PI05)])
def test_real_sizes_act_score_and_learn_on_a_gpu(name: str, parameters: int) -> None:
    device, dtype = torch.device("cuda"), torch.bfloat16
    build = {
        "openvla": lambda: real_size.openvla(openvla_7b(), device, dtype),
        "pi05": lambda: real_size.pi05(PI05_CONFIG, device, dtype),
    }[name]
    found = real_size.measure(build, image_size=224, batches=[1], methods=["lora"], micro_batch=2, repeats=1)
    assert found.pop("parameters") == parameters
    assert set(found) == {"act_1", "score_1", "step_lora"}
    for one in found.values():
        assert one["ms"] > 0
        assert one["peak_bytes"] > 2 * parameters  # bfloat16 weights, and what a pass adds


@pytest.mark.parametrize("name", ["openvla", "pi05", "ddvla"])
def test_what_is_measured_runs_at_tiny_size(name: str) -> None:
    cpu, dtype = torch.device("cpu"), torch.bfloat16
    layout = openvla_layout(openvla_tiny.CONFIG, where="test")
    build = {
        "openvla": lambda: real_size.openvla(layout, cpu, dtype),
        "pi05": lambda: real_size.pi05(replace(PI0, adaptive=True), cpu, dtype),
        "ddvla": lambda: real_size.ddvla(layout, cpu, dtype),
    }[name]
    network = build().module
    assert {p.dtype for p in network.parameters()} == {torch.bfloat16}
    found = real_size.measure(
        build,
        image_size=28,
        batches=[1, 2],
        methods=["lora", "lora-apart", "dora"],
        micro_batch=2,
        repeats=1,
    )
    assert found["parameters"] == sum(p.numel() for p in network.parameters())
    steps = {"step_lora", "step_lora-apart", "penalty_lora-apart", "step_dora"}
    assert set(found) == {"parameters", "act_1", "score_1", "act_2", "score_2", *steps}
    assert all(found[key]["ms"] > 0 for key in found if key != "parameters")
