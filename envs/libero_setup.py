"""Prepares the `libero` and `robosuite` packages so that importing them asks nothing, prints nothing and leaves
the user's own settings alone."""

from __future__ import annotations

import contextlib
import ctypes.util
import importlib.util
import io
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Literal

import yaml

from envs.assets import ResolvedAssets, cache_folder

logger = logging.getLogger(__name__)

Renderer = Literal["auto", "osmesa", "egl"]

_EGL_PROBE = "import mujoco; c = mujoco.GLContext(16, 16); c.make_current(); c.free()"


def libero_folder() -> Path:
    """The installed `libero/libero` package folder, found without importing it.

    Raises:
        ModuleNotFoundError: LIBERO is not installed.
    """
    spec = importlib.util.find_spec("libero")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            "LIBERO is not installed; expected the package `hf-libero` (pip install --no-deps hf-libero==0.1.4)"
        )
    return Path(spec.submodule_search_locations[0]) / "libero"


def prepare_libero(assets: ResolvedAssets, *, renderer: Renderer = "auto") -> None:
    """Make `import libero` safe and point it at `assets`. Call before building any LIBERO environment.

    May be called again, also with other assets: environments built afterwards use the last ones. Sets
    `MUJOCO_GL` for this process and its children on the first call.

    Raises:
        ModuleNotFoundError: LIBERO is not installed.
        RuntimeError: OpenGL was already loaded with another backend, or none is installed.
    """
    select_renderer(renderer)
    config_folder = _write_libero_config()
    # LIBERO reads this at import and calls input() when there is no config.yaml in it.
    os.environ["LIBERO_CONFIG_PATH"] = str(config_folder)
    _load_robosuite_settings()
    with contextlib.redirect_stdout(io.StringIO()):
        # Only now: at its import LIBERO reads the folder named above.
        import libero.libero
        import libero.libero.envs
    libero.libero._assets_path_cache = str(assets.path)


def select_renderer(renderer: Renderer) -> str:
    """Choose the GL backend for this process and its children; returns "osmesa" or "egl".

    "auto" keeps an existing `MUJOCO_GL`, else takes EGL when it can make a context on an NVIDIA device, else
    software rendering: OSMesa, or EGL where OSMesa is not installed.

    Raises:
        RuntimeError: OpenGL was already loaded with another backend, or none is installed.
    """
    current = os.environ.get("MUJOCO_GL", "").strip().lower()
    chosen: str = renderer
    if renderer == "auto":
        chosen = current if current in ("osmesa", "egl") else _detect_renderer()
    loaded = os.environ.get("PYOPENGL_PLATFORM", "")
    if "OpenGL" in sys.modules and loaded != chosen:
        raise RuntimeError(
            f"environment.renderer={renderer!r} needs PyOpenGL on {chosen}, but it was already imported on "
            f"{loaded or 'its default'!r}; set MUJOCO_GL={chosen} PYOPENGL_PLATFORM={chosen} before starting Python"
        )
    os.environ["MUJOCO_GL"] = chosen
    os.environ["PYOPENGL_PLATFORM"] = chosen
    return chosen


def _detect_renderer() -> Literal["osmesa", "egl"]:
    if Path("/dev/nvidia0").exists():
        # In a process of its own: PyOpenGL cannot change its platform once it is loaded.
        environ = os.environ | {"MUJOCO_GL": "egl", "PYOPENGL_PLATFORM": "egl"}
        command = [sys.executable, "-c", _EGL_PROBE]
        if subprocess.run(command, env=environ, capture_output=True, check=False).returncode == 0:
            return "egl"
        logger.warning("an NVIDIA device is present but EGL made no context on it; rendering in software")
    if ctypes.util.find_library("OSMesa"):
        return "osmesa"
    if ctypes.util.find_library("EGL"):
        return "egl"
    raise RuntimeError(
        "no OpenGL library to render with; expected libOSMesa or libEGL (Debian: libosmesa6, libegl1)"
    )


def _write_libero_config() -> Path:
    """Write LIBERO's config.yaml into the cache (atomically: many processes start at once)."""
    package = libero_folder()
    paths = {
        "benchmark_root": str(package),
        "bddl_files": str(package / "bddl_files"),
        "init_states": str(package / "init_files"),
        "datasets": str(package.parent / "datasets"),
        "assets": str(package / "assets"),
    }
    folder = cache_folder() / "libero"
    folder.mkdir(parents=True, exist_ok=True)
    scratch = folder / f".config.{os.getpid()}.yaml"
    scratch.write_text(yaml.safe_dump(paths))
    scratch.replace(folder / "config.yaml")
    return folder


def _load_robosuite_settings() -> None:
    """Load robosuite's settings module ahead of robosuite itself, with its loggers off.

    robosuite 1.4 warns about its settings file on import, and opens /tmp/robosuite.log, which fails on a shared
    machine where another user owns that file.
    """
    if "robosuite" in sys.modules:
        return
    spec = importlib.util.find_spec("robosuite")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("robosuite is not installed; expected robosuite==1.4.0")
    path = Path(spec.submodule_search_locations[0]) / "macros.py"
    macros_spec = importlib.util.spec_from_file_location("robosuite.macros", path)
    if macros_spec is None or macros_spec.loader is None:
        raise ModuleNotFoundError(f"robosuite has no {path}; expected robosuite==1.4.0")
    macros = importlib.util.module_from_spec(macros_spec)
    macros_spec.loader.exec_module(macros)
    macros.FILE_LOGGING_LEVEL = None  # type: ignore[attr-defined]
    sys.modules["robosuite.macros"] = macros
    logging.getLogger("robosuite_logs").setLevel(logging.ERROR)
