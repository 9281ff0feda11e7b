"""LIBERO's dynamics, goals and proprioception for one task, without unnecessary work.

LIBERO (through robosuite) evaluates the dynamics three times in each of the 25 sub-steps of a control
step, recomputes every observable in each of them and rebuilds the scene at each reset. Here a sub-step
is `mj_step1`, the operational-space controller, `mj_step2`, all in compiled code (`controller.py`); a reset
sets the state. The numbers are the same to the last bit: `tests/test_stepping.py` compares both over whole episodes.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import mujoco
import numpy as np

from pi0.base.errors import InputError
from pi0.libero.added_objects import add_objects
from pi0.libero.assets import Assets, use_assets
from pi0.libero.changes import AGENT_CAMERA, Change
from pi0.libero.libero_import import no_cuda_devices, prepare_libero
from pi0.libero.scenes import compile_scene
from pi0.libero.suites import Task

if TYPE_CHECKING:
    from pi0.libero.controller import ArmController

logger = logging.getLogger(__name__)

CONTROL_HZ = 20
# MuJoCo resets a simulation that has diverged, and counts the cause here.
_DIVERGED = (
    mujoco.mjtWarning.mjWARN_BADQPOS,
    mujoco.mjtWarning.mjWARN_BADQVEL,
    mujoco.mjtWarning.mjWARN_BADQACC,
)
# What a simulation that breaks raises: it has diverged, or what it is given does not fit.
BROKEN = (FloatingPointError, ValueError)
# The action of LIBERO's evaluation scripts while objects settle: stand still, gripper open.
SETTLE_ACTION = np.array([0, 0, 0, 0, 0, 0, -1], dtype=np.float64)


@dataclass
class InitState:
    """The start of an episode.

    Attributes:
        state: float64 [state size], time, qpos, qvel as LIBERO records them.
        fixtures: float64 [number of fixtures, 7], position (m) and quaternion (w, x, y, z) of cabinet, stove and the
            like, which are in the model and not in `state`.
    """

    state: np.ndarray
    fixtures: np.ndarray

    @property
    def name(self) -> str:
        """16 hexadecimal digits that identify the state (its recorded part) in all runs."""
        return state_hash(self.state)


def state_hash(state: np.ndarray) -> str:
    """Name of an initial state in all runs: 16 hexadecimal digits of a hash of its recorded part."""
    return hashlib.sha256(np.ascontiguousarray(state, dtype=np.float64).tobytes()).hexdigest()[:16]


@dataclass
class Snapshot:
    """Everything that `TaskSim.restore` needs to continue to the bit (see `TaskSim.snapshot`)."""

    physics: np.ndarray
    fixtures: np.ndarray
    goal_pos: np.ndarray
    goal_ori: np.ndarray
    gripper: np.ndarray
    success: bool
    fresh: bool
    clock: tuple[float, bool]


class TaskSim:
    """One LIBERO task in MuJoCo: reset, control steps, success, proprioception. It draws no images.

    Raises:
        InputError: the BDDL file of a folder's task cannot be built.
    """

    def __init__(self, task: Task, assets: Assets):
        prepare_libero()
        use_assets(assets)
        # MuJoCo would write its warnings to a file in the working directory; `step` raises instead.
        mujoco.set_mju_user_warning(logger.debug)
        with no_cuda_devices():
            import libero.libero.envs.problems  # noqa: F401 they add themselves to TASK_MAPPING
            import robosuite
        from pi0.libero.controller import ArmController

        add_objects()
        self.task = task
        try:
            self.libero: Any = _built(task, robosuite.load_controller_config(default_controller="OSC_POSE"))
        except Exception as error:  # LIBERO checks nothing of what it reads
            if task.has_recorded_states:
                raise
            raise InputError(
                f"{task.bddl_file}: LIBERO cannot build this task ({type(error).__name__}: {error}); "
                "correct the file, see docs/suites.md"
            ) from error
        # LIBERO's reset hides the markers of gripper and goal regions; they would show in every frame.
        self.libero.visualize(vis_settings={marker: False for marker in self.libero._visualizations})
        self.model: mujoco.MjModel = self.libero.sim.model._model
        self.data: mujoco.MjData = self.libero.sim.data._data
        fixtures = self.libero.fixtures_dict.values()
        self._fixture_names = [fixture.root_body for fixture in fixtures]
        self._fixture_bodies = [self.model.body(name).id for name in self._fixture_names]
        # Placements before the first reset: a rebuilt scene starts from them, so every draw must, too.
        self._compiled_fixtures = np.array(
            [_xml_placement(fixture.get_obj()) for fixture in fixtures]
        ).reshape(-1, 7)
        self._initializers = list(self.libero.object_property_initializers)
        self._arm = ArmController(self.libero)
        self._arms: dict[tuple[float, ...], ArmController] = {(): self._arm}  # by the joints after a reset
        camera = self.model.camera(AGENT_CAMERA)
        self._camera = camera.id, camera.pos.copy(), camera.quat.copy()
        self._change: Change | None = None
        self._clock = _ObservationClock(self.libero.model_timestep)
        self._contact_geoms: dict[int, np.ndarray] = {}
        self.libero.check_contact = self._check_contact
        self.success = False
        self.change_to(task.change)

    def change_to(self, change: Change | None) -> None:
        """Make this the scene of a variant, or with None LIBERO's own; `reset` or `restore` must follow.

        Camera and joints are changed. What else a variant changes lies in its task and in its frames.
        """
        if change == self._change:
            return
        camera, position, turn = self._camera
        moved = (position, turn) if change is None else change.camera(position, turn)
        self.model.cam_pos[camera], self.model.cam_quat[camera] = moved
        joints = () if change is None else change.joints
        if joints not in self._arms:
            self._arms[joints] = self._arm_reset_to(joints)
        self._arm = self._arms[joints]
        self._change = change

    # Reset ---------------------------------------------------------------------------------------

    def reset(self, init: InitState, settle_steps: int = 0) -> None:
        """Start an episode at `init`, like LIBERO's reset followed by `set_init_state`.

        Args:
            init: the initial state.
            settle_steps: control steps with `SETTLE_ACTION` before the episode begins.
        Raises:
            ValueError: the state does not fit this task's model.
        """
        size = 1 + self.model.nq + self.model.nv
        if init.state.shape != (size,):
            raise ValueError(
                f"initial state of {self.task.name} has shape {init.state.shape}, the model needs ({size},)"
            )
        mujoco.mj_resetData(self.model, self.data)
        self._set_fixtures(init.fixtures)
        self.data.time = init.state[0]
        self.data.qpos[:] = init.state[1 : 1 + self.model.nq]
        self.data.qvel[:] = init.state[1 + self.model.nq :]
        self._arm.reset()
        self._clock.reset()
        mujoco.mj_forward(self.model, self.data)
        self.success = self._evaluate()
        for _ in range(settle_steps):
            self.step(SETTLE_ACTION)

    def draw_init_state(self, resets: int = 1) -> InitState:
        """Draw a state from LIBERO's own placement distribution, with NumPy's global random stream.

        Args:
            resets: how many resets LIBERO would have done by now. Its list of joint initialisers (open drawers and
                the like) grows by one copy with every rebuild, and each copy draws again.
        """
        self.libero.object_property_initializers = self._initializers * (resets + 1)
        self._set_fixtures(self._compiled_fixtures)
        self.libero.sim.reset()
        self.libero._reset_internal()
        self.libero.sim.forward()
        state = self.libero.sim.get_state().flatten()
        return InitState(state=np.array(state), fixtures=self.fixtures())

    @property
    def arm_qpos(self) -> np.ndarray:
        """Indices of the arm's seven joints in qpos."""
        return self._arm.qpos

    @property
    def hand_site(self) -> int:
        """Id of the site between the fingertips."""
        return self._arm.site

    def fixtures_in(self, scene: str) -> np.ndarray:
        """Placement of each fixture in a scene's MJCF, float64 [number of fixtures, 7]; ValueError without them."""
        bodies = {body.get("name"): body for body in ElementTree.fromstring(scene).iter("body")}
        if missing := [name for name in self._fixture_names if name not in bodies]:
            raise ValueError(f"the scene has no {', '.join(missing)}")
        return np.array([_xml_placement(bodies[name]) for name in self._fixture_names]).reshape(-1, 7)

    def fixtures(self) -> np.ndarray:
        """Placement of each fixture, float64 [number of fixtures, 7]."""
        ids = self._fixture_bodies
        return np.concatenate([self.model.body_pos[ids], self.model.body_quat[ids]], axis=1)

    # Stepping ------------------------------------------------------------------------------------

    def step(self, action: np.ndarray, observe: Callable[[], None] | None = None) -> bool:
        """One control step (50 ms).

        Args:
            action: float [7] in [-1, 1]: end-effector translation 3 (5 cm at 1), rotation 3 (0.5 rad at
                1, axis-angle), gripper (-1 opens, 1 closes).
            observe: called at the moment when LIBERO would measure this step's observation (a sub-step or two
                before the end); images and `proprioception` must be read there.
        Returns:
            Whether LIBERO's goal holds after the step.
        Raises:
            ValueError: the action is not finite; MuJoCo would go on without any torque.
            FloatingPointError: the simulation diverged.
        """
        action = np.asarray(action, dtype=np.float64)
        if not np.isfinite(action).all():
            raise ValueError(f"an action for {self.task.name} is not finite")
        self._arm.begin(action)
        done = 0
        for substep in range(1, self._arm.substeps + 1):
            measured = self._clock.tick()
            if measured or substep == self._arm.substeps:
                self._arm.advance(action, substep - done, begun=done == 0)
                done = substep
            if measured and observe is not None:
                observe()
        if any(self.data.warning[warning].number for warning in _DIVERGED):
            mujoco.mj_resetData(self.model, self.data)  # clears the warning for other episodes of this scene
            raise FloatingPointError(f"simulation of {self.task.name} diverged")
        self.success = self._evaluate()
        return self.success

    def proprioception(self) -> np.ndarray:
        """The policy's state, float32 [8]: end-effector position 3 (m), axis-angle 3 (rad), gripper 2 (m)."""
        from robosuite.utils.transform_utils import convert_quat

        quat = convert_quat(self.data.xquat[self._arm.hand_body], to="xyzw")
        return np.concatenate(
            [
                self.data.site_xpos[self._arm.site],
                quat_to_axis_angle(quat),
                self.data.qpos[self._arm.gripper_qpos],
            ]
        ).astype(np.float32)

    def conditions(self) -> dict[str, bool]:
        """Which conditions of LIBERO's goal hold now, by their words: "in butter_1 basket_1_contain_region"."""
        goals = self.libero.parsed_problem["goal_state"]
        return {" ".join(goal): bool(self.libero._eval_predicate(goal)) for goal in goals}

    # Snapshots -----------------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """State between two control steps. Images and proprioception must be read before `restore`."""
        spec = mujoco.mjtState.mjSTATE_INTEGRATION
        physics = np.empty(mujoco.mj_stateSize(self.model, spec))
        mujoco.mj_getState(self.model, self.data, physics, spec)
        return Snapshot(
            physics,
            self.fixtures(),
            self._arm.goal_pos,
            self._arm.goal_ori,
            self._arm.gripper_action,
            self.success,
            self._arm.fresh,
            (self._clock.elapsed, self._clock.sampled),
        )

    def restore(self, snapshot: Snapshot) -> None:
        """Return to a snapshot of this task; the next `step` continues from it to the bit."""
        mujoco.mj_setState(self.model, self.data, snapshot.physics, mujoco.mjtState.mjSTATE_INTEGRATION)
        self._set_fixtures(snapshot.fixtures)
        self._arm.goal_pos, self._arm.goal_ori = snapshot.goal_pos, snapshot.goal_ori
        self._arm.gripper_action = snapshot.gripper
        self.success, self._arm.fresh = snapshot.success, snapshot.fresh
        self._clock.elapsed, self._clock.sampled = snapshot.clock

    # Internals -----------------------------------------------------------------------------------

    def _arm_reset_to(self, joints: tuple[float, ...]) -> ArmController:
        """The controller of a robot that a reset puts elsewhere.

        The recorded state then sets the arm's joints, as always. But the controller's first goal and the posture that
        it prefers all through the episode are those of the reset, which is LIBERO-plus's change of the robot.
        """
        from pi0.libero.controller import ArmController

        robot = self.libero.robots[0]
        usual, robot.init_qpos = robot.init_qpos, np.array(joints)
        self.libero.sim.reset()
        robot.reset(deterministic=True)  # without drawing from NumPy's global random stream
        robot.init_qpos = usual
        return ArmController(self.libero)

    def _set_fixtures(self, placements: np.ndarray) -> None:
        self.model.body_pos[self._fixture_bodies] = placements[:, :3]
        self.model.body_quat[self._fixture_bodies] = placements[:, 3:]

    def _evaluate(self) -> bool:
        success = bool(self.libero._check_success())
        self.libero._post_process()
        return success

    def _check_contact(self, geoms_1: Any, geoms_2: Any = None) -> bool:
        """robosuite's `check_contact` by geom id instead of by name, for the two object models that LIBERO passes."""
        contacts = self.data.contact.geom  # [number of contacts, 2]
        first, second = self._geom_mask(geoms_1), self._geom_mask(geoms_2)
        a, b = contacts[:, 0], contacts[:, 1]
        return bool(((first[a] & second[b]) | (first[b] & second[a])).any())

    def _geom_mask(self, model: Any) -> np.ndarray:
        if id(model) not in self._contact_geoms:
            mask = np.zeros(self.model.ngeom, dtype=bool)
            mask[[self.model.geom(name).id for name in model.contact_geoms]] = True
            self._contact_geoms[id(model)] = mask
        return self._contact_geoms[id(model)]


class _ObservationClock:
    """Decides when robosuite measures, with the arithmetic and rounding of its `Observable.update`."""

    def __init__(self, timestep: float):
        self._timestep, self._period = timestep, 1.0 / CONTROL_HZ
        self.reset()

    def reset(self) -> None:
        """LIBERO's reset and `set_init_state` each force a measurement, which advances the clock."""
        self.elapsed, self.sampled = self._timestep + self._timestep, True

    def tick(self) -> bool:
        """Advance by a physics step; returns whether an observation is measured now."""
        self.elapsed += self._timestep
        measure = not self.sampled and self._period >= self.elapsed
        self.sampled |= measure
        if self.elapsed >= self._period:
            self.elapsed %= self._period
            self.sampled = False
        return measure


def _built(task: Task, controller: dict[str, Any]) -> Any:
    """LIBERO's environment of a task, with the arguments of its ControlEnv, without cameras and renderers."""
    from libero.libero.envs.bddl_base_domain import TASK_MAPPING
    from libero.libero.envs.bddl_utils import get_problem_info

    problem = get_problem_info(task.bddl_file)["problem_name"]
    return _with_cached_scene(TASK_MAPPING[problem])(
        task.bddl_file,
        robots=["Panda"],
        controller_configs=controller,
        gripper_types="default",
        initialization_noise=None,
        use_camera_obs=False,
        has_renderer=False,
        has_offscreen_renderer=False,
        control_freq=CONTROL_HZ,
        horizon=1000,
        ignore_done=True,
        hard_reset=False,
    )


def _with_cached_scene(environment: type) -> type:
    """LIBERO's environment class, but with a scene that is compiled only once on this machine."""
    from robosuite.utils.binding_utils import MjSim

    def _initialize_sim(self: Any, xml_string: str | None = None) -> None:
        self.sim = MjSim(compile_scene(xml_string or self.model.get_xml()))
        self.sim.forward()
        self.initialize_time(self.control_freq)

    # LIBERO compares the name of the class with that of the problem.
    return type(environment.__name__, (environment,), {"_initialize_sim": _initialize_sim})


def _xml_placement(body: Any) -> np.ndarray:
    pos, quat = body.get("pos", "0 0 0"), body.get("quat", "1 0 0 0")
    return np.array([float(number) for number in f"{pos} {quat}".split()])


def quat_to_axis_angle(quat: np.ndarray) -> np.ndarray:
    """Quaternion (x, y, z, w) to axis-angle [3] (rad), as LIBERO evaluation scripts compute it (robosuite 1.4)."""
    w = np.clip(quat[3], -1.0, 1.0)
    sine = np.sqrt(1.0 - w * w)
    if np.isclose(sine, 0.0):
        return np.zeros(3)
    return quat[:3] * 2.0 * np.arccos(w) / sine
