"""Draws the two cameras of a LIBERO scene, upright RGB.

Software rendering spends its time on the Panda's 140,000 triangles, most of which lie outside the pictures, so
whatever is wholly outside a camera's view is left out before drawing. No pixel changes by that.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import mujoco
import numpy as np

from envs.domain import RendererError

Geometry = Literal["visual", "collision"]

CAMERAS = ("agentview", "robot0_eye_in_hand")

_COLLISION, _VISUAL, _HIDDEN = 0, 1, 5
_ROBOT_PREFIXES = ("robot0_", "gripper0_", "mount0_")
_ROBOT_PALETTE = ((0.92, 0.92, 0.94), (0.72, 0.74, 0.78), (0.55, 0.57, 0.62), (0.25, 0.26, 0.30))
_OTHER_PALETTE = ((0.75, 0.60, 0.40), (0.45, 0.55, 0.40), (0.40, 0.45, 0.60), (0.60, 0.42, 0.42))
_CORNERS = np.array([(x, y, z) for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], dtype=np.float64)
_CULLING_MARGIN = 1e-3
"""Metres by which a geom must clear the view before it is left out."""


class CameraRenderer:
    """One GL context that draws one model's cameras at a fixed size. Several may live in one process.

    Letters: S image side in pixels; G geoms of the model.
    """

    def __init__(self, model: Any, data: Any, *, size: int, geometry: Geometry) -> None:
        """Upload the model to a new GL context.

        Args:
            model, data: mujoco.MjModel and its MjData.
            size: S.
            geometry: "visual" draws what LIBERO draws; "collision" draws the collision shapes, painted in the
                main colours of the visual ones, without mirror images or anti-aliasing.

        Raises:
            RendererError: the GL backend gives no context.
        """
        self._model, self._data, self._size = model, data, size
        self._groups = model.geom_group.copy()
        self._option = mujoco.MjvOption()
        self._option.geomgroup[:] = np.arange(mujoco.mjNGROUP) == _VISUAL
        model.vis.global_.offwidth = model.vis.global_.offheight = size
        self._drawn = np.isin(self._groups, (_VISUAL, 2))
        if geometry == "collision":
            self._drawn = paint_collision_geometry(model)
            model.vis.quality.offsamples = 0
        with _drawing():
            self._gl: Any = _gl_context(size)
            self._gl.make_current()
            self._context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_50)
            mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._context)
        self._scene = mujoco.MjvScene(model, maxgeom=model.ngeom + model.nsite + 64)
        if geometry == "collision":
            self._scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
            self._scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
        self._perturb = mujoco.MjvPerturb()
        self._viewport = mujoco.MjrRect(0, 0, size, size)
        self._views = [_View(model, data, name) for name in CAMERAS]
        self._culls = geometry == "collision" or not model.light_castshadow.any()
        mirrors = _is_mirror(model) & self._drawn if geometry == "visual" else ()
        self._mirrors = [int(geom) for geom in np.flatnonzero(mirrors)]
        self._poses = _Poses(data)

    def keep_poses(self) -> None:
        """Remember where everything is now: the next `render` draws this moment."""
        self._poses.keep()

    def render(self, *, depth_of: str | None = None) -> list[np.ndarray]:
        """Draw the last kept moment from each of `CAMERAS`: uint8 [S, S, 3], RGB, row 0 at the top; and, last, how far
        what the camera `depth_of` sees lies along its axis: float32 [S, S], metres. Raises RendererError."""
        with _drawing():
            return self._render(depth_of)

    def _render(self, depth_of: str | None) -> list[np.ndarray]:
        self._gl.make_current()
        images = []
        depth = None
        self._poses.swap()
        for name, view in zip(CAMERAS, self._views, strict=True):
            visible = self._drawn & view.sees(self._mirrors) if self._culls else self._drawn
            self._model.geom_group[:] = np.where(visible, _VISUAL, _HIDDEN)
            mujoco.mjv_updateScene(
                self._model,
                self._data,
                self._option,
                self._perturb,
                view.camera,
                mujoco.mjtCatBit.mjCAT_ALL,
                self._scene,
            )
            mujoco.mjr_render(self._viewport, self._scene, self._context)
            image = np.empty((self._size, self._size, 3), dtype=np.uint8)
            window = np.empty((self._size, self._size), dtype=np.float32) if name == depth_of else None
            mujoco.mjr_readPixels(image, window, self._viewport, self._context)
            images.append(np.ascontiguousarray(image[::-1]))
            depth = depth if window is None else self._metres(window[::-1])
        self._model.geom_group[:] = self._groups
        self._poses.swap()
        return images if depth is None else [*images, depth]

    def _metres(self, window: np.ndarray) -> np.ndarray:
        """OpenGL's window depth, 0 at the near plane and 1 at the far one, as distance along the camera's axis."""
        extent, planes = self._model.stat.extent, self._model.vis.map
        near, far = planes.znear * extent, planes.zfar * extent
        return (near / (1 - window * (1 - near / far))).astype(np.float32)

    def close(self) -> None:
        """Free the GL context. Safe to call twice."""
        if self._gl is not None:
            self._gl.make_current()
            self._context.free()
            self._gl.free()
            self._gl = None


@contextmanager
def _drawing() -> Iterator[None]:
    """Whatever goes wrong here is the renderer's doing: drivers raise many kinds of errors, none of them their own."""
    try:
        yield
    except Exception as error:
        backend = os.environ["MUJOCO_GL"]
        raise RendererError(f"{backend}: {type(error).__name__}: {error}") from error


def _gl_context(size: int) -> Any:
    """A context of the backend that `select_renderer` chose. `mujoco.GLContext` would be the one of MuJoCo's first
    import, which may have come before."""
    if os.environ["MUJOCO_GL"] == "egl":
        from mujoco.egl import GLContext  # either import fails under the other's platform
    else:
        from mujoco.osmesa import GLContext  # as above
    return GLContext(size, size)


class _Poses:
    """Everything of MjData that drawing reads, as it was at one moment."""

    def __init__(self, data: Any) -> None:
        self._live = [
            *(data.geom_xpos, data.geom_xmat, data.site_xpos, data.site_xmat),
            *(data.cam_xpos, data.cam_xmat, data.light_xpos, data.light_xdir),
        ]
        self._kept = [array.copy() for array in self._live]

    def keep(self) -> None:
        for live, kept in zip(self._live, self._kept, strict=True):
            np.copyto(kept, live)

    def swap(self) -> None:
        """Exchange the kept moment and the current one."""
        for live, kept in zip(self._live, self._kept, strict=True):
            current = live.copy()
            np.copyto(live, kept)
            np.copyto(kept, current)


class _View:
    """One camera, and which geoms can appear in its picture."""

    def __init__(self, model: Any, data: Any, name: str) -> None:
        self.camera = mujoco.MjvCamera()
        self.camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        self.camera.fixedcamid = index = model.camera(name).id
        self._slope = slope = np.tan(np.radians(model.cam_fovy[index]) / 2)
        # Inward normals of the four sides of the (square) view, camera frame: it looks along -z.
        normals = np.array([[1, 0, -slope], [-1, 0, -slope], [0, 1, -slope], [0, -1, -slope]])
        self._normals = normals / np.linalg.norm(normals, axis=1, keepdims=True)
        self._position, self._rotation = data.cam_xpos[index], data.cam_xmat[index]
        self._geom_pos, self._geom_mat = data.geom_xpos, data.geom_xmat
        self._centre, self._half = model.geom_aabb[:, :3].copy(), model.geom_aabb[:, 3:].copy()
        unbounded = (mujoco.mjtGeom.mjGEOM_PLANE, mujoco.mjtGeom.mjGEOM_HFIELD)
        self._always = np.isin(model.geom_type, unbounded)

    def sees(self, mirrors: Sequence[int]) -> np.ndarray:
        """bool [G]: false where the geom's bounding box lies wholly outside one side of the view, and so does its
        image in each of the geoms `mirrors` (which shows only within the mirror)."""
        rotation = self._geom_mat.reshape(-1, 3, 3)
        centre = self._geom_pos + np.einsum("gij,gj->gi", rotation, self._centre) - self._position
        half_edges = rotation * self._half[:, None, :]
        seen = self._always | _within(self._normals @ self._rotation.reshape(3, 3).T, centre, half_edges)
        for mirror in mirrors:
            if seen[mirror]:
                axis = rotation[mirror, :, 2]
                surface = (centre[mirror] + axis * self._half[mirror, 2]) @ axis
                reflection = np.eye(3) - 2 * np.outer(axis, axis)
                sides = self._sides_of(centre[mirror], half_edges[mirror])
                seen = seen | _within(
                    sides, centre @ reflection + 2 * surface * axis, reflection @ half_edges
                )
        return seen

    def _sides_of(self, centre: np.ndarray, half_edges: np.ndarray) -> np.ndarray:
        """Inward normals, world frame, of the view cut down to a box (its centre from the camera, and half its edge
        vectors in columns)."""
        rotation = self._rotation.reshape(3, 3)
        corners = (centre + _CORNERS @ half_edges.T) @ rotation
        depth = -corners[:, 2]
        if depth.min() <= _CULLING_MARGIN:
            return self._normals @ rotation.T
        slopes = corners[:, :2] / depth[:, None]
        low, high = slopes.min(axis=0), slopes.max(axis=0)
        low, high = np.maximum(low, -self._slope), np.minimum(high, self._slope)
        normals = np.array([[1, 0, low[0]], [-1, 0, -high[0]], [0, 1, low[1]], [0, -1, -high[1]]])
        normals /= np.linalg.norm(normals, axis=1, keepdims=True)
        return normals @ rotation.T


def _within(normals: np.ndarray, centre: np.ndarray, half_edges: np.ndarray) -> np.ndarray:
    """bool [G]: which boxes reach inside every plane through the camera with these inward normals [P, 3]."""
    reach = np.abs(np.einsum("pi,gij->gpj", normals, half_edges)).sum(axis=2)
    return (centre @ normals.T + reach > -_CULLING_MARGIN).all(axis=1)


def _is_mirror(model: Any) -> np.ndarray:
    """bool [G]: MuJoCo draws mirror images in planes and boxes whose material reflects."""
    flat = np.isin(model.geom_type, (mujoco.mjtGeom.mjGEOM_PLANE, mujoco.mjtGeom.mjGEOM_BOX))
    reflectance = np.append(model.mat_reflectance, 0.0)
    return flat & (reflectance[model.geom_matid] > 0)


def paint_collision_geometry(model: Any) -> np.ndarray:
    """Give every collision geom the look of its body's first visual geom, each texture flattened to its mean colour
    (a picture has no place on another shape, but lighting treats textures apart); returns bool [G], what to draw.

    The arm and bodies without visual geometry take a fixed palette. Unbounded planes (floors) are drawn too. Call
    before the model is uploaded to a GL context.
    """
    planes = (model.geom_type == mujoco.mjtGeom.mjGEOM_PLANE) & (model.geom_group == _VISUAL)
    drawn = (model.geom_group == _COLLISION) | planes
    for texture in np.unique(model.mat_texid[model.mat_texid >= 0]):
        channels = model.tex_nchannel[texture]
        size = model.tex_width[texture] * model.tex_height[texture] * channels
        start = model.tex_adr[texture]
        pixels = model.tex_data[start : start + size].reshape(-1, channels)
        pixels[:] = pixels.mean(axis=0)
    for geom in np.flatnonzero(drawn & ~planes):
        body = model.geom_bodyid[geom]
        robot = model.body(body).name.startswith(_ROBOT_PREFIXES)
        visual = np.flatnonzero((model.geom_bodyid == body) & (model.geom_group == _VISUAL))
        if robot or len(visual) == 0:
            palette = _ROBOT_PALETTE if robot else _OTHER_PALETTE
            model.geom_rgba[geom] = (*palette[body % len(palette)], 1.0)
            model.geom_matid[geom] = -1
        else:
            model.geom_rgba[geom] = model.geom_rgba[visual[0]]
            model.geom_matid[geom] = model.geom_matid[visual[0]]
    return drawn
