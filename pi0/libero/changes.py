"""What LIBERO-plus changes of a task, as a value that scenes and frames apply: camera, robot, image noise."""

from __future__ import annotations

from dataclasses import dataclass

import mujoco
import numpy as np

# The seven kinds of LIBERO-plus (Fei et al. 2025), in the order of its table.
KINDS = {
    "camera": "the agent's camera stands elsewhere or looks elsewhere",
    "robot": "the arm's controller starts from other joints",
    "language": "the instruction is worded in another way",
    "light": "colour, direction and shadows of the lights",
    "background": "textures of table, floor and walls",
    "noise": "the agent's frames are blurred or foggy",
    "layout": "objects stand elsewhere, or there are more of them",
}
AGENT_CAMERA = "agentview"
UNMOVED = (0, 0, 100, 0, 0)
_PIVOT = np.array([0.0, 0.0, 0.8])  # what the camera is moved around, m
_DIGITS = 4  # LIBERO-plus rounds poses, after each of its steps


@dataclass(frozen=True)
class Change:
    """What a variant of LIBERO-plus changes of its task.

    Attributes:
        kind: a key of `KINDS`.
        base: name of LIBERO's task.
        view: the agent's camera: turned about the vertical and raised (degrees), its distance from the middle of the
            scene (percent), then turned on the spot about the vertical and tilted (degrees).
        joints: the arm's joints after a reset, 7 (rad); empty for the robot's own.
        noise: which image noise, 1 to 50 (`pi0.libero.corruptions`); 0 is none.
    """

    kind: str
    base: str
    view: tuple[int, ...] = UNMOVED
    joints: tuple[float, ...] = ()
    noise: int = 0

    def camera(self, position: np.ndarray, turn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Pose of the agent's camera, position [3] (m) and quaternion [4] (w, x, y, z), from LIBERO's own.

        It follows `_setup_camera` of LIBERO-plus's problem classes. They round every pose, so the camera of a variant
        that leaves it alone stands up to 0.05 mm from LIBERO's.
        """
        around, up, percent, aside, tilt = self.view
        position, turn = np.array(position, dtype=np.float64), np.array(turn, dtype=np.float64)
        if up:
            raising = _rotation((0, -1, 0), up)
            position = _rounded(_rotated(position - _PIVOT, raising) + _PIVOT)
            turn = _rounded(_product(raising, turn))
        turning = _rotation((0, 0, 1), around)
        position, turn = _rounded(_rotated(position, turning)), _rounded(_product(turning, turn))
        if percent != 100:
            position = _rounded(_PIVOT + (position - _PIVOT) * (percent / 100))
        for axis, degrees in (((0, 0, 1), aside), ((0, -1, 0), tilt)):
            if degrees:
                turn = _rounded(_product(_rotation(axis, degrees), turn))
        return position, turn / np.linalg.norm(turn)


def _rotation(axis: tuple[int, int, int], degrees: int) -> np.ndarray:
    half = np.radians(degrees) / 2
    return np.array([np.cos(half), *(np.sin(half) * np.array(axis))])


def _product(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    product = np.zeros(4)
    mujoco.mju_mulQuat(product, first, second / np.linalg.norm(second))
    return product


def _rotated(vector: np.ndarray, turn: np.ndarray) -> np.ndarray:
    rotated = np.zeros(3)
    mujoco.mju_rotVecQuat(rotated, vector, turn)
    return rotated


def _rounded(numbers: np.ndarray) -> np.ndarray:
    return np.array([round(float(number), _DIGITS) for number in numbers])
