"""Frames on demand: only those that the policy or a video needs, all cameras from one simulation state.

`exact` draws the same pixels as LIBERO (robosuite's off-screen renderer: visual geometry, multisampling,
reflections). It leaves out only geometry outside the camera's view, which no pixel can show. `fast` draws the robot
by its collision hulls and leaves out multisampling, reflections and shadows. On a CPU, where the number of vertices
decides, this saves most of the time.
"""

from __future__ import annotations

import atexit
import os
import weakref

import mujoco
import numpy as np

from pi0.libero.gl import GLUnavailableError

# Policy camera names (openpi's) and the cameras of LIBERO's scenes behind them.
CAMERAS = {"base_0_rgb": "agentview", "left_wrist_0_rgb": "robot0_eye_in_hand"}
MODES = ("exact", "fast")
_COLLISION, _VISUAL, _HIDDEN = 0, 1, 5
_RENDERERS: weakref.WeakSet[Renderer] = weakref.WeakSet()  # that hold a GL context


class Renderer:
    """Draws one MuJoCo model; keeps its own GL context.

    Args:
        model: the compiled scene. `fast` changes its geom groups and multisampling, which only drawing reads.
        mode: `exact` or `fast`.
        max_size: the largest frame, pixels a side.
    """

    def __init__(self, model: mujoco.MjModel, mode: str, max_size: int):
        if mode not in MODES:
            raise ValueError(f"unknown render mode {mode!r}; use one of {', '.join(MODES)}")
        self._model = model
        model.vis.global_.offwidth = max(640, max_size) if mode == "exact" else max_size
        model.vis.global_.offheight = max(480, max_size) if mode == "exact" else max_size
        if mode == "fast":
            model.vis.quality.offsamples = 0
            _draw_robot_by_collision_geoms(model)
        self._context = _gl_context(model.vis.global_.offwidth, model.vis.global_.offheight)
        self._process = os.getpid()
        if not _RENDERERS:
            # After MuJoCo has registered the end of its GL display, so before that comes.
            atexit.unregister(_close_all)
            atexit.register(_close_all)
        _RENDERERS.add(self)
        self._context.make_current()
        self._mjr = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_150)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._mjr)
        self._scene = mujoco.MjvScene(model, maxgeom=1000)
        if mode == "fast":
            self._scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
            self._scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
        self._option = mujoco.MjvOption()
        self._option.geomgroup[_COLLISION] = 0
        self._option.geomgroup[_VISUAL] = 1
        # Nothing casts shadows in LIBERO's scenes; a caster out of view would have to be drawn all the same.
        casts = mode == "exact" and bool((model.light_castshadow & model.light_active).any())
        self._view = None if casts else _View(model)
        self._camera = mujoco.MjvCamera()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FIXED

    def render(self, data: mujoco.MjData, camera: str, out: np.ndarray) -> None:
        """Draw one frame, upright.

        Args:
            data: the state to draw.
            camera: a policy camera name (`CAMERAS`) or a camera of the scene.
            out: uint8 [height, width, 3], filled in place.
        """
        _refuse_fork(self._process)
        height, width, _ = out.shape
        self._context.make_current()
        self._camera.fixedcamid = self._model.camera(CAMERAS.get(camera, camera)).id
        if self._view is not None:
            self._view.hide_what_is_out_of(self._camera.fixedcamid, data)
        mujoco.mjv_updateScene(
            self._model, data, self._option, None, self._camera, mujoco.mjtCatBit.mjCAT_ALL, self._scene
        )
        viewport = mujoco.MjrRect(0, 0, width, height)
        mujoco.mjr_render(viewport, self._scene, self._mjr)
        frame = np.empty((height, width, 3), dtype=np.uint8)
        mujoco.mjr_readPixels(frame, None, viewport, self._mjr)
        out[:] = frame[::-1]  # OpenGL counts rows from the bottom

    def close(self) -> None:
        """Free the GL context; the renderer cannot be used afterwards."""
        _RENDERERS.discard(self)
        # What is freed belongs to the current context, and each one numbers its things from 1: without this, another
        # renderer would lose its own and draw black frames.
        self._context.make_current()
        self._mjr.free()
        self._context.free()


def _close_all() -> None:
    """At the end of a program, for environments that nobody has closed; a fork has no right to its parent's contexts."""
    for renderer in [*_RENDERERS]:
        if renderer._process == os.getpid():
            renderer.close()


def _refuse_fork(process: int | None) -> None:
    """Raise in a fork of the process that made a context: OpenGL would wait there for threads that it has not."""
    if process not in (None, os.getpid()):
        raise GLUnavailableError(
            f"this process was forked from process {process}, which holds an OpenGL context, so it can draw nothing; "
            "start it by spawn: multiprocessing.set_start_method('spawn'), or with gymnasium "
            "make_vec(..., vectorization_mode='async', vector_kwargs={'context': 'spawn'})"
        )


class _View:
    """Hides geometry outside a camera's view from drawing; what is hidden could not colour any pixel.

    A geom is kept if the ball around it, or the ball's mirror image in a reflecting face, reaches into the pyramid of
    view (MuJoCo mirrors the scene in planes and in the upper faces of boxes).
    """

    def __init__(self, model: mujoco.MjModel):
        self._model = model
        self._groups = model.geom_group.copy()
        endless = model.geom_rbound == 0  # planes
        self._radii = np.where(endless, np.inf, 1.001 * model.geom_rbound + 1e-4)
        reflectance = np.append(model.mat_reflectance, 0.0)[model.geom_matid]  # material -1 is none
        is_box = model.geom_type == mujoco.mjtGeom.mjGEOM_BOX
        flat = is_box | (model.geom_type == mujoco.mjtGeom.mjGEOM_PLANE)
        self._mirrors = np.flatnonzero(flat & (self._groups == _VISUAL) & (reflectance > 0))
        self._heights = np.where(is_box, model.geom_size[:, 2], 0.0)

    def hide_what_is_out_of(self, camera: int, data: mujoco.MjData) -> None:
        """Set the groups of all geoms for one frame."""
        turn = data.cam_xmat[camera].reshape(3, 3)
        half_angle = np.deg2rad(self._model.cam_fovy[camera]) / 2
        cosine, sine = np.cos(half_angle), np.sin(half_angle)

        def seen(centres: np.ndarray) -> np.ndarray:
            right, up, back = ((centres - data.cam_xpos[camera]) @ turn).T
            # Distance beyond the nearest side of the pyramid, which is as wide as high: frames are square.
            outside = np.maximum(np.abs(right), np.abs(up)) * cosine + back * sine
            return (outside <= self._radii) & (back <= self._radii)

        kept = seen(data.geom_xpos)
        for mirror in self._mirrors:
            if kept[mirror]:
                normal = data.geom_xmat[mirror].reshape(3, 3)[:, 2]
                above = (data.geom_xpos - data.geom_xpos[mirror]) @ normal - self._heights[mirror]
                kept |= seen(data.geom_xpos - 2 * above[:, None] * normal)
        self._model.geom_group[:] = np.where(kept, self._groups, _HIDDEN)


_process_of_contexts: int | None = None  # in which the first one was made


def _gl_context(width: int, height: int):
    global _process_of_contexts
    _refuse_fork(_process_of_contexts)
    _process_of_contexts = os.getpid()
    if os.environ.get("MUJOCO_GL") == "osmesa":
        from mujoco.osmesa import GLContext
    else:
        from mujoco.egl import GLContext
    return GLContext(width, height)


def _draw_robot_by_collision_geoms(model: mujoco.MjModel) -> None:
    """Draw robot, mount and gripper by their collision hulls: at 64 pixels they look like the meshes of 200,000 faces."""
    for geom in range(model.ngeom):
        body = model.body(model.geom_bodyid[geom]).name
        if body.startswith(("robot0", "gripper0", "mount0")):
            drawn = model.geom_group[geom] == _COLLISION
            model.geom_group[geom] = _VISUAL if drawn else _HIDDEN
            if drawn:
                model.geom_matid[geom] = -1
                model.geom_rgba[geom] = _hull_colour(body)


def _hull_colour(body: str) -> tuple[float, float, float, float]:
    return (0.35, 0.35, 0.38, 1.0) if body.startswith("gripper0") else (0.92, 0.92, 0.92, 1.0)
