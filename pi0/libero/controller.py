"""robosuite's arm controller and Panda gripper, compiled together with MuJoCo's steps.

A control step is 25 sub-steps of 2 ms, each of them MuJoCo's first half step, OSC_POSE, MuJoCo's second half
step. In Python the controller's small matrices cost as much as the physics; compiled they cost a tenth of it. The
arithmetic follows robosuite 1.4.0 (`controllers/osc.py`, `models/grippers/panda_gripper.py`) operation by operation
and calls its compiled matrix functions, so that torques are the same to the bit (`tests/test_stepping.py`).
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any, NamedTuple

import mujoco
import numpy as np
from llvmlite import binding
from numba import njit, types
from robosuite.utils.control_utils import (
    nullspace_torques,
    opspace_matrices,
    orientation_error,
    set_goal_orientation,
)

from pi0.libero.libero_import import load_blas_alone

load_blas_alone()  # before anything compiled is used


def _mujoco_function(name: str, *arguments: types.Type) -> types.ExternalFunction:
    """A function of MuJoCo's C library, for compiled code; models and data are passed by address."""
    library = ctypes.CDLL(str(next(Path(mujoco.__file__).parent.glob("libmujoco.*"))))
    binding.add_symbol(name, ctypes.cast(getattr(library, name), ctypes.c_void_p).value)
    return types.ExternalFunction(name, types.void(*arguments))


_ADDRESS = types.uintp
_step1 = _mujoco_function("mj_step1", _ADDRESS, _ADDRESS)
_step2 = _mujoco_function("mj_step2", _ADDRESS, _ADDRESS)
_jac_site = _mujoco_function("mj_jacSite", _ADDRESS, _ADDRESS, _ADDRESS, _ADDRESS, types.int32)
_full_m = _mujoco_function("mj_fullM", _ADDRESS, _ADDRESS, _ADDRESS)


class _Measured(NamedTuple):
    """The controller's measurement of the arm in a sub-step; written in place.

    Matrices have robosuite's memory order (its slicing makes columns contiguous), because LAPACK's rounding depends
    on it.
    """

    pos: np.ndarray  # [3] end effector, m
    ori: np.ndarray  # [3, 3]
    vel: np.ndarray  # [3] m/s
    ori_vel: np.ndarray  # [3] rad/s
    joint_pos: np.ndarray  # [7] rad
    joint_vel: np.ndarray  # [7] rad/s
    jac_pos: np.ndarray  # [3, 7]
    jac_ori: np.ndarray  # [3, 7]
    mass: np.ndarray  # [7, 7]


class _Simulation(NamedTuple):
    """Addresses and arrays of one scene; the arrays are views of MuJoCo's own memory."""

    model: int
    data: int
    site: int
    qpos: np.ndarray
    qvel: np.ndarray
    ctrl: np.ndarray
    bias: np.ndarray  # qfrc_bias [nv]
    inertia: np.ndarray  # qM, sparse
    site_pos: np.ndarray  # [3]
    site_ori: np.ndarray  # [9]
    jac_pos: np.ndarray  # scratch [3, nv]
    jac_ori: np.ndarray  # scratch [3, nv]
    mass: np.ndarray  # scratch [nv, nv]


class _Settings(NamedTuple):
    """Constants of controller and gripper."""

    qpos: np.ndarray  # indices of the arm's joints [7]
    qvel: np.ndarray
    arm_actuators: np.ndarray  # [7]
    torque_low: np.ndarray
    torque_high: np.ndarray
    initial_joint: np.ndarray
    kp: np.ndarray  # [6]
    kd: np.ndarray
    gripper_actuators: np.ndarray  # [2]
    grip_bias: np.ndarray
    grip_weight: np.ndarray
    grip_speed: float


class ArmController:
    """The arm of one scene: goal, gripper, and control steps.

    Attributes:
        goal_pos, goal_ori: goal of the end effector, [3] (m) and [3, 3].
        gripper_action: position of the fingers between closed and open, [2] in [-1, 1].
        fresh: nothing has moved since the last reset.
    """

    def __init__(self, libero: Any):
        robot, controller = libero.robots[0], libero.robots[0].controller
        model: mujoco.MjModel = libero.sim.model._model
        data: mujoco.MjData = libero.sim.data._data
        self.site = model.site(controller.eef_name).id
        self.hand_body = model.body(robot.robot_model.eef_name).id
        self.substeps = int(libero.control_timestep / libero.model_timestep)
        self.qpos = np.array(controller.qpos_index)
        self.gripper_qpos = np.array(robot._ref_gripper_joint_pos_indexes)
        self._scale = abs(controller.output_max - controller.output_min) / abs(
            controller.input_max - controller.input_min
        )
        self._input_min, self._input_max = controller.input_min, controller.input_max
        self._output_mid = (controller.output_max + controller.output_min) / 2.0
        self._input_mid = (controller.input_max + controller.input_min) / 2.0
        gripper = np.array([model.actuator(name).id for name in robot.gripper.actuators])
        ctrl_range = model.actuator_ctrlrange[gripper]
        self._settings = _Settings(
            qpos=self.qpos,
            qvel=np.array(controller.qvel_index),
            arm_actuators=np.array(robot._ref_joint_actuator_indexes),
            torque_low=np.array(robot.torque_limits[0], dtype=np.float64),
            torque_high=np.array(robot.torque_limits[1], dtype=np.float64),
            initial_joint=np.array(controller.initial_joint, dtype=np.float64),
            kp=np.array(controller.kp, dtype=np.float64),
            kd=np.array(controller.kd, dtype=np.float64),
            gripper_actuators=gripper,
            grip_bias=0.5 * (ctrl_range[:, 1] + ctrl_range[:, 0]),
            grip_weight=0.5 * (ctrl_range[:, 1] - ctrl_range[:, 0]),
            grip_speed=float(robot.gripper.speed),
        )
        nv = model.nv
        self._keep_alive = model, data  # the simulation holds their addresses
        self._simulation = _Simulation(
            model._address,
            data._address,
            self.site,
            data.qpos,
            data.qvel,
            data.ctrl,
            data.qfrc_bias,
            data.qM,
            data.site_xpos[self.site],
            data.site_xmat[self.site],
            np.zeros((3, nv)),
            np.zeros((3, nv)),
            np.zeros((nv, nv)),
        )
        measured = (
            controller.ee_pos,
            controller.ee_ori_mat,
            controller.ee_pos_vel,
            controller.ee_ori_vel,
            controller.joint_pos,
            controller.joint_vel,
            controller.J_pos,
            controller.J_ori,
            controller.mass_matrix,
        )
        self._measured_at_reset = _Measured(*(np.array(value, dtype=np.float64) for value in measured))
        self._measured = _Measured(*(np.array(value) for value in self._measured_at_reset))
        self._goal_at_reset = np.array(controller.goal_pos), np.array(controller.goal_ori)
        self.reset()

    def reset(self) -> None:
        """Return to the state after LIBERO's reset: the goal of the robot's initial joints, gripper half open."""
        self.goal_pos, self.goal_ori = self._goal_at_reset
        self.gripper_action = np.zeros(2)
        self.fresh = True

    def begin(self, action: np.ndarray) -> None:
        """Start a control step: the first half of its first sub-step, and the goal that `action` sets."""
        _measure(self._simulation, self._settings, self._measured)
        # robosuite's controller skips its first measurement after a reset. It uses the one at the robot's initial
        # joints, although the recorded state has put the arm elsewhere.
        if self.fresh:
            for now, reset in zip(self._measured, self._measured_at_reset, strict=True):
                now[:] = reset
            self.fresh = False
        clipped = np.clip(action[:6], self._input_min, self._input_max)
        delta = (clipped - self._input_mid) * self._scale + self._output_mid
        # robosuite keeps the old goal orientation if the action has no rotation.
        if any(element != 0.0 for element in delta[3:]):
            self.goal_ori = set_goal_orientation(delta[3:], self._measured.ori)
        self.goal_pos = self._measured.pos + delta[:3]

    def advance(self, action: np.ndarray, count: int, begun: bool) -> None:
        """Execute `count` sub-steps of a control step; `begun`: the first one is half done."""
        self.gripper_action = _advance(
            count,
            begun,
            self._simulation,
            self._settings,
            self._measured,
            self.goal_pos,
            self.goal_ori,
            self.gripper_action,
            np.sign(action[6]),
        )


@njit(cache=True)
def _measure(simulation: _Simulation, settings: _Settings, out: _Measured) -> None:
    """Do MuJoCo's first half step, and measure the arm."""
    s = simulation
    _step1(s.model, s.data)
    _jac_site(s.model, s.data, s.jac_pos.ctypes.data, s.jac_ori.ctypes.data, s.site)
    _full_m(s.model, s.mass.ctypes.data, s.inertia.ctypes.data)
    out.pos[:] = s.site_pos
    out.ori[:] = s.site_ori.reshape(3, 3)
    out.vel[:] = np.dot(s.jac_pos, s.qvel)
    out.ori_vel[:] = np.dot(s.jac_ori, s.qvel)
    for i in range(len(settings.qpos)):
        out.joint_pos[i] = s.qpos[settings.qpos[i]]
        out.joint_vel[i] = s.qvel[settings.qvel[i]]
        for j in range(3):
            out.jac_pos[j, i] = s.jac_pos[j, settings.qvel[i]]
            out.jac_ori[j, i] = s.jac_ori[j, settings.qvel[i]]
        for j in range(len(settings.qpos)):
            out.mass[j, i] = s.mass[settings.qvel[j], settings.qvel[i]]


@njit(cache=True)
def _advance(
    count: int,
    begun: bool,
    simulation: _Simulation,
    settings: _Settings,
    arm: _Measured,
    goal_pos: np.ndarray,
    goal_ori: np.ndarray,
    gripper_action: np.ndarray,
    grip: float,
) -> np.ndarray:
    """Execute `count` sub-steps; returns the new position of the gripper's fingers [2]."""
    s, c = simulation, settings
    jac = np.empty((len(c.qvel), 6)).T
    wrench = np.empty(6)
    for substep in range(count):
        if substep > 0 or not begun:
            _measure(simulation, settings, arm)
        force = (goal_pos - arm.pos) * c.kp[0:3] + -arm.vel * c.kd[0:3]
        torque = orientation_error(goal_ori, arm.ori) * c.kp[3:6] + -arm.ori_vel * c.kd[3:6]
        jac[:3], jac[3:] = arm.jac_pos, arm.jac_ori
        _, lambda_pos, lambda_ori, nullspace = opspace_matrices(arm.mass, jac, arm.jac_pos, arm.jac_ori)
        wrench[:3], wrench[3:] = np.dot(lambda_pos, force), np.dot(lambda_ori, torque)
        torques = np.dot(jac.T, wrench)
        for i in range(len(torques)):
            torques[i] += s.bias[c.qvel[i]]
        torques += nullspace_torques(arm.mass, nullspace, c.initial_joint, arm.joint_pos, arm.joint_vel)
        for i in range(len(torques)):
            s.ctrl[c.arm_actuators[i]] = min(max(torques[i], c.torque_low[i]), c.torque_high[i])
        moved = gripper_action + np.array([-1.0, 1.0]) * c.grip_speed * grip
        gripper_action = np.minimum(np.maximum(moved, -1.0), 1.0)
        for i in range(len(gripper_action)):
            s.ctrl[c.gripper_actuators[i]] = c.grip_bias[i] + c.grip_weight[i] * gripper_action[i]
        _step2(s.model, s.data)
    return gripper_action
