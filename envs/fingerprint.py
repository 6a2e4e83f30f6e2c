"""The stack an evaluation ran on: what has to be equal before two LIBERO numbers may be compared.

MuJoCo from 3.3.3 draws darker, from 3.4.0 some official initial states no longer fit, and software and hardware
renderers differ in the last bits, so versions, renderer, assets and first frames are written beside every result.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from configs.world import EnvironmentPart
from envs.assets import ResolvedAssets

PACKAGES = ("mujoco", "robosuite", "hf-libero", "bddl", "gymnasium", "numpy")
TESTED = {"mujoco": "3.3.2", "robosuite": "1.4.0"}
"""Versions under which LIBERO draws and moves as published."""
PUBLISHED_SETTLE_STEPS = 10
"""No-op steps after a reset in LIBERO's protocol."""


class FingerprintError(ValueError):
    """A fingerprint that cannot be read, or two that rule each other out."""


def first_frame_hash(observation: Mapping[str, np.ndarray]) -> str:
    """16 hex digits over the two images of an environment's first observation.

    Args:
        observation: `agentview` and `wrist`, uint8 [H, W, 3], as `LiberoEnv.reset` returns them. Proprioception is
            left out: its last bits vary between processors.
    """
    digest = hashlib.sha256()
    for camera in ("agentview", "wrist"):
        image = np.ascontiguousarray(observation[camera])
        digest.update(f"{image.dtype}{image.shape}".encode())
        digest.update(image.data)
    return digest.hexdigest()[:16]


def stack_fingerprint(
    *,
    assets: ResolvedAssets,
    environment: EnvironmentPart | None = None,
    first_frames: Mapping[str, str] | None = None,
    renderer: str | None = None,
) -> dict[str, Any]:
    """The fingerprint as JSON values.

    Args:
        assets: what the environments draw.
        environment: the recipe's part, where one is in force.
        first_frames: `suite/task_id` -> `first_frame_hash` of that task's initial state 0 with seed 0.
        renderer: what the simulators draw with; none: this process's `MUJOCO_GL`.

    Returns:
        `comparable_with_published` is false, and `differs_from_published` says why, when the assets are stand-ins,
        the geometry drawn is not the visual one, the step limit or the settling steps are not the published ones, or a
        version is not the tested one.
    """
    versions = {name: _installed(name) for name in PACKAGES}
    differs = [
        f"{name} is {versions[name]}, not {tested}"
        for name, tested in TESTED.items()
        if versions[name] != tested
    ]
    if assets.kind == "stand-in":
        differs.append("the assets are procedural stand-ins")
    if environment is not None and environment.geometry != "visual":
        differs.append("collision geometry is drawn")
    if environment is not None and environment.max_steps is not None:
        differs.append(f"episodes end after {environment.max_steps} steps, not at the suite's limit")
    if environment is not None and environment.settle_steps != PUBLISHED_SETTLE_STEPS:
        differs.append(f"{environment.settle_steps} settling steps, not {PUBLISHED_SETTLE_STEPS}")
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()}-{platform.machine()}",
        "versions": versions,
        "renderer": renderer or os.environ.get("MUJOCO_GL") or "unset",
        "assets": {"kind": assets.kind, "digest": assets.digest},
        "environment": environment.model_dump(mode="json", exclude={"assets", "renderer"})
        if environment
        else {},
        "first_frames": dict(first_frames or {}),
        "comparable_with_published": not differs,
        "differs_from_published": differs,
    }


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """One line for each thing that differs between two fingerprints; a part that either leaves empty is passed over."""
    lines = []
    derived = ("comparable_with_published", "differs_from_published")
    for key in sorted((before.keys() | after.keys()) - set(derived)):
        a, b = before.get(key), after.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            shared = a.keys() & b.keys() if key == "first_frames" else a.keys() | b.keys()
            names = sorted(shared) if a and b else []
            lines += [
                _line(f"{key}.{name}", a.get(name), b.get(name))
                for name in names
                if a.get(name) != b.get(name)
            ]
        elif a != b:
            lines.append(_line(key, a, b))
    return lines


def read_fingerprint(run: Path) -> dict[str, Any]:
    """The fingerprint in a run folder; empty where there is none. Raises FingerprintError when it is damaged."""
    path = run / "fingerprint.json"
    if not path.is_file():
        return {}
    try:
        stack: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise FingerprintError(f"{path} is not JSON ({error}); remove it to go on without it") from error
    return stack


def require_same_world(before: Mapping[str, Any], after: Mapping[str, Any], *, what: str) -> None:
    """Raise FingerprintError when one side simulates procedural stand-ins and the other does not.

    The same cells are different worlds then: other shapes, masses and frictions, not only other pictures. A side that
    does not say what it simulates is passed over.
    """
    old, new = (stack.get("assets", {}) for stack in (before, after))
    if not old or not new or old["digest"] == new["digest"]:
        return
    if (old["kind"] == "stand-in") != (new["kind"] == "stand-in"):
        raise FingerprintError(
            f"{what}: the assets are {old['kind']} (digest {old['digest']}) on one side and {new['kind']} (digest "
            f"{new['digest']}) on the other, so the same cells are not the same worlds; set environment.assets"
        )


def _line(name: str, before: object, after: object) -> str:
    return f"{name}: {before} before, {after} after"


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"
