"""Draws the two cameras of a LIBERO scene, upright RGB."""

from __future__ import annotations

from typing import Any, Literal

import mujoco
import numpy as np

CAMERAS = ("agentview", "robot0_eye_in_hand")


class CameraRenderer:
    """One GL context drawing one model's cameras at a fixed size.

    Letters: S image side, pixels.
    """

    def __init__(self, model: Any, *, size: int, geometry: Literal["visual", "collision"]) -> None:
        """`model`: mujoco.MjModel. Geometry "visual" draws group 1, as LIBERO does; "collision" draws group 0."""
        self._model = model
        self._size = size
        model.vis.global_.offwidth = size
        model.vis.global_.offheight = size
        self._gl = mujoco.GLContext(size, size)
        self._gl.make_current()
        self._context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._context)
        self._scene = mujoco.MjvScene(model, maxgeom=model.ngeom + model.nsite + 64)
        self._option = mujoco.MjvOption()
        self._option.geomgroup[0] = geometry == "collision"
        self._option.geomgroup[1] = geometry == "visual"
        self._perturb = mujoco.MjvPerturb()
        self._viewport = mujoco.MjrRect(0, 0, size, size)
        self._cameras = []
        for name in CAMERAS:
            camera = mujoco.MjvCamera()
            camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
            camera.fixedcamid = model.camera(name).id
            self._cameras.append(camera)

    def render(self, data: Any) -> list[np.ndarray]:
        """Draw `data` (mujoco.MjData) from each of `CAMERAS`: uint8 [S, S, 3], RGB, row 0 at the top."""
        self._gl.make_current()
        images = []
        for camera in self._cameras:
            mujoco.mjv_updateScene(
                self._model,
                data,
                self._option,
                self._perturb,
                camera,
                mujoco.mjtCatBit.mjCAT_ALL,
                self._scene,
            )
            mujoco.mjr_render(self._viewport, self._scene, self._context)
            image = np.empty((self._size, self._size, 3), dtype=np.uint8)
            mujoco.mjr_readPixels(image, None, self._viewport, self._context)
            images.append(np.ascontiguousarray(image[::-1]))
        return images

    def close(self) -> None:
        """Free the GL context. Safe to call twice."""
        if self._gl is not None:
            self._gl.make_current()
            self._context.free()
            self._gl.free()
            self._gl = None
