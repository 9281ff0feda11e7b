"""Frames: `exact` is LIBERO's, `fast` looks alike and is upright; broken GL is named."""

import os
import subprocess
import sys

import mujoco
import numpy as np
import pytest

from pi0 import doctor
from pi0.base.paths import REPO_ROOT
from pi0.libero import gl
from pi0.libero.assets import resolve_assets, use_assets
from pi0.libero.rendering import CAMERAS, Renderer
from pi0.libero.stepping import SETTLE_ACTION, InitState, TaskSim
from pi0.libero.suites import suite_tasks

pytestmark = pytest.mark.engine

BALL = """
<mujoco>
  <worldbody>
    <light pos="0 0 2" dir="0 0 -1"/>
    <camera name="agentview" pos="0 0 1"/>
    <geom type="sphere" size="0.2" group="1" rgba="{} 0.2 0.2 1"/>
  </worldbody>
</mujoco>
"""


@pytest.fixture(scope="module")
def frames():
    """{source: {camera: uint8 [128, 128, 3]}} after the settling steps of one recorded state."""
    gl.select_backend()
    assets = resolve_assets("standins")
    use_assets(assets)
    from libero.libero.envs.env_wrapper import OffScreenRenderEnv

    task = suite_tasks("libero_spatial")[7]
    recorded = task.recorded_init_states()[0]
    theirs = OffScreenRenderEnv(bddl_file_name=task.bddl_file, camera_heights=128, camera_widths=128)
    theirs.seed(0)
    theirs.reset()
    theirs.set_init_state(recorded)
    for _ in range(10):
        observation, *_ = theirs.step(SETTLE_ACTION)
    drawn = {"libero": {name: observation[f"{camera}_image"][::-1] for name, camera in CAMERAS.items()}}
    theirs.close()
    for mode in ("exact", "fast"):
        sim = TaskSim(task, assets)
        np.random.seed(0)
        fixtures = sim.draw_init_state(resets=1).fixtures
        renderer = Renderer(sim.model, mode, 128)
        sim.reset(InitState(recorded, fixtures), settle_steps=9)
        drawn[mode] = {name: np.zeros((128, 128, 3), np.uint8) for name in CAMERAS}

        def look(sim=sim, renderer=renderer, mode=mode):
            for name, out in drawn[mode].items():
                renderer.render(sim.data, name, out)

        sim.step(SETTLE_ACTION, look)
        renderer.close()
    return drawn


@pytest.mark.parametrize("camera", CAMERAS)
def test_exact_frames_are_pixel_identical_to_liberos(frames, camera):
    assert np.array_equal(frames["exact"][camera], frames["libero"][camera])


def test_fast_frames_of_the_agents_view_look_like_exact_ones(frames):
    exact, fast = (frames[mode]["base_0_rgb"].astype(float) for mode in ("exact", "fast"))
    assert np.corrcoef(exact.ravel(), fast.ravel())[0, 1] > 0.9


def test_frames_are_upright(frames):
    # The agent's view has the dark wall and robot above, the bright table below.
    view = frames["fast"]["base_0_rgb"].astype(float).mean(axis=2)
    assert view[-20:].mean() != pytest.approx(view[:20].mean(), abs=5)
    upright = np.corrcoef(view.ravel(), frames["libero"]["base_0_rgb"].mean(axis=2).ravel())[0, 1]
    flipped = np.corrcoef(view[::-1].ravel(), frames["libero"]["base_0_rgb"].mean(axis=2).ravel())[0, 1]
    assert upright > flipped + 0.2


def test_an_unknown_mode_is_refused(frames):
    with pytest.raises(ValueError, match="use one of exact, fast"):
        Renderer(None, "pretty", 64)


def test_a_renderer_that_is_closed_leaves_the_others_alone():
    gl.select_backend()
    models = [mujoco.MjModel.from_xml_string(BALL.format(red)) for red in (0.2, 0.9)]
    renderers = [Renderer(model, "fast", 32) for model in models]
    datas = [mujoco.MjData(model) for model in models]

    def drawn(which: int) -> np.ndarray:
        mujoco.mj_forward(models[which], datas[which])
        frame = np.zeros((32, 32, 3), np.uint8)
        renderers[which].render(datas[which], "agentview", frame)
        return frame

    drawn(1)
    before = drawn(0)
    assert before.max() > 0
    renderers[1].close()  # while the context of the other one is current
    assert np.array_equal(drawn(0), before)
    renderers[0].close()


def test_no_working_gl_says_what_each_back_end_answered_and_what_to_install(monkeypatch):
    monkeypatch.delenv("PI0_GL_PROVEN", raising=False)
    monkeypatch.setenv("MUJOCO_GL", "glfw")
    with pytest.raises(gl.GLUnavailableError, match="cannot draw without a screen"):
        gl.select_backend()
    monkeypatch.setenv("MUJOCO_GL", "egl")
    monkeypatch.setattr(gl, "_PROBE", "raise SystemExit('no EGL here')")
    with pytest.raises(gl.GLUnavailableError, match="egl: no EGL here.*apt-get install"):
        gl.select_backend()


@pytest.mark.parametrize(
    ("backend", "device", "there"),
    [
        ("egl", "97", r"0 to \d+"),
        ("", "97", r"0 to \d+"),  # no other back end in its place
        ("egl", "gpu", "numbers from 0 on"),
        ("egl", "-1", "numbers from 0 on"),
        ("egl", "", "numbers from 0 on"),
    ],
)
@pytest.mark.usefixtures("fresh_python")
@pytest.mark.tried(
    "MUJOCO_EGL_DEVICE_ID names a device that is not there", "One line with the devices that are"
)
def test_a_device_that_is_not_there_is_named_with_those_that_are(monkeypatch, backend, device, there):
    monkeypatch.delenv("PI0_GL_PROVEN", raising=False)
    monkeypatch.setenv("MUJOCO_GL", backend)
    monkeypatch.setenv("MUJOCO_EGL_DEVICE_ID", device)
    said = f"^MUJOCO_EGL_DEVICE_ID = '{device}' is none of EGL's devices, which are {there}; correct it or unset it$"
    with pytest.raises(gl.GLUnavailableError, match=said):
        gl.select_backend()
    stop = [str(finding) for finding in doctor.check_gl() if finding.status == doctor.STOP]
    assert len(stop) == 1 and f"MUJOCO_EGL_DEVICE_ID = '{device}'" in stop[0]


@pytest.mark.usefixtures("fresh_python")
def test_a_device_that_cuda_does_not_see_can_draw():
    """robosuite takes the numbers of CUDA_VISIBLE_DEVICES for those of EGL, and refuses the others at its import."""
    code = "from pi0.libero.libero_import import no_cuda_devices\n"
    code += "with no_cuda_devices():\n import robosuite.utils.binding_utils\nimport os; print(os.environ['CUDA_VISIBLE_DEVICES'])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO_ROOT, capture_output=True, text=True, check=False, timeout=60,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "2", "MUJOCO_EGL_DEVICE_ID": "0"},
    )  # fmt: skip
    assert (done.returncode, done.stdout.splitlines()[-1:]) == (0, ["2"]), done.stderr


def test_a_rank_without_a_device_of_its_own_draws_on_the_default_one(monkeypatch):
    for variable in (
        "MUJOCO_GL",
        "PI0_GL_PROVEN",
        "MUJOCO_EGL_DEVICE_ID",
        "PYOPENGL_PLATFORM",
        "PI0_GL_RENDERER",
    ):
        monkeypatch.setenv(variable, "")  # so that what is set here is undone
        monkeypatch.delenv(variable)
    monkeypatch.setenv("LOCAL_RANK", "97")
    backend = gl.select_backend()
    assert "MUJOCO_EGL_DEVICE_ID" not in os.environ
    assert gl.renderer().startswith(f"{backend}: ")
    assert "None" not in gl.renderer()
