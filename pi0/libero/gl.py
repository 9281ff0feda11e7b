"""The OpenGL back end: chosen once, tested with a rendered frame, then passed to every worker."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from dataclasses import dataclass

from pi0.base.errors import InputError

logger = logging.getLogger(__name__)

BACKENDS = ("egl", "osmesa")
DEVICE = "MUJOCO_EGL_DEVICE_ID"
INSTALL_HINT = "install software GL with: apt-get install -y libegl1 libgl1-mesa-dri libosmesa6"


class GLUnavailableError(InputError, RuntimeError):
    """No OpenGL back end on this machine can draw a frame."""


@dataclass(frozen=True)
class GLProbe:
    """Result of drawing one frame with a back end in a separate process."""

    backend: str
    device: str | None
    works: bool
    detail: str  # renderer's name and time per frame, or what went wrong


def environment(backend: str, device: str | None = None) -> dict[str, str]:
    """Environment variables that make MuJoCo, robosuite and PyOpenGL use `backend`, and EGL's device."""
    chosen = {} if device is None else {DEVICE: device}
    return {"MUJOCO_GL": backend, "PYOPENGL_PLATFORM": backend, **chosen}


def probe(backend: str, device: str | None = None, timeout: float = 60.0) -> GLProbe:
    """Draw one frame in a subprocess, because a broken driver may abort the process."""
    command = [sys.executable, "-c", _PROBE]
    try:
        done = subprocess.run(
            command,
            check=False,
            env={**os.environ, **environment(backend, device)},
            capture_output=True,
            text=True,
            timeout=timeout,
        )
    except subprocess.TimeoutExpired:
        return GLProbe(backend, device, False, f"no frame within {timeout:.0f} s")
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        return GLProbe(
            backend, device, False, lines[-1] if lines else f"process ended with {done.returncode}"
        )
    return GLProbe(backend, device, True, done.stdout.strip())


def wrong_device(outcome: GLProbe) -> str | None:
    """What is wrong with `MUJOCO_EGL_DEVICE_ID` and the mend, if EGL drew nothing because of its value; else None."""
    value = os.environ.get(DEVICE)
    if outcome.works or outcome.backend != "egl" or outcome.device is not None or value is None:
        return None
    if value.isdecimal() and not (there := re.search(rf"{DEVICE}.* between 0 and (\d+)", outcome.detail)):
        return None
    devices = f"0 to {there[1]}" if value.isdecimal() and there else "numbers from 0 on"
    return f"{DEVICE} = {value!r} is none of EGL's devices, which are {devices}; correct it or unset it"


def select_backend() -> str:
    """Choose the back end, and set it in this process's environment for every process that it starts.

    If `MUJOCO_GL` is set, it is the only candidate; otherwise EGL (on a GPU or in software), then OSMesa. Under
    torchrun, rank r of a machine draws on EGL's device r if there is one, unless `MUJOCO_EGL_DEVICE_ID` is set. EGL
    counts all devices, whatever `CUDA_VISIBLE_DEVICES` hides.

    Raises:
        GLUnavailableError: none can draw a frame; the message gives the error of each and what to install. Or the
            device that `MUJOCO_EGL_DEVICE_ID` chooses is not there: no other is taken in its place.
    """
    asked = os.environ.get("MUJOCO_GL", "").lower()
    if asked and os.environ.get("PI0_GL_PROVEN") == asked:
        return asked
    failures = []
    for backend in (asked,) if asked else BACKENDS:
        if backend not in BACKENDS:
            raise GLUnavailableError(
                f"MUJOCO_GL={backend} cannot draw without a screen; use one of {', '.join(BACKENDS)}"
            )
        for device in _devices(backend):
            outcome = probe(backend, device)
            if outcome.works:
                renderer = outcome.detail.rsplit(", ", 1)[0]
                os.environ.update(
                    environment(backend, device), PI0_GL_PROVEN=backend, PI0_GL_RENDERER=renderer
                )
                logger.info("frames are drawn by %s through %s", renderer, backend)
                return backend
            if wrong := wrong_device(outcome):
                raise GLUnavailableError(wrong)
        failures.append(f"{backend}: {outcome.detail}")
    raise GLUnavailableError(f"no OpenGL back end draws a frame ({'; '.join(failures)}); {INSTALL_HINT}")


def renderer() -> str:
    """Back end and name of the GL renderer, after `select_backend`."""
    return f"{os.environ.get('PI0_GL_PROVEN')}: {os.environ.get('PI0_GL_RENDERER')}"


def _devices(backend: str) -> tuple[str | None, ...]:
    """EGL devices to try; None means the back end's own choice."""
    rank = os.environ.get("LOCAL_RANK")
    if backend != "egl" or rank is None or DEVICE in os.environ:
        return (None,)
    return (rank, None)


_PROBE = """
import os, sys, time
import mujoco
import numpy as np
def fail(kind, error, _):
    print(f"{kind.__name__}: {error}", file=sys.stderr, flush=True)
    os._exit(1)  # else half-made contexts add errors of their own
sys.excepthook = fail
model = mujoco.MjModel.from_xml_string(
    '<mujoco><worldbody><light pos="0 0 3"/><geom size="1" rgba="1 0 0 1"/></worldbody></mujoco>')
data = mujoco.MjData(model)
mujoco.mj_forward(model, data)
with mujoco.Renderer(model, 64, 64) as renderer:
    renderer.update_scene(data)
    renderer.render()
    start = time.perf_counter()
    frame = renderer.render()
    milliseconds = 1e3 * (time.perf_counter() - start)
    from OpenGL import GL
    name = GL.glGetString(GL.GL_RENDERER).decode()
assert np.ptp(frame.reshape(-1, 3), axis=0)[0] > 50, "the frame is blank"
print(f"{name}, {milliseconds:.1f} ms a frame")
"""
