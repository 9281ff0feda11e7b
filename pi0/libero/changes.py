"""What LIBERO-plus changes of a task, as a value that scenes and frames apply: camera, robot, image noise."""

from __future__ import annotations

from dataclasses import dataclass

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
        from scipy.spatial.transform import (
            Rotation,  # as LIBERO-plus: a pose between two roundings falls to the same side
        )

        def around_z(degrees: int) -> Rotation:
            return Rotation.from_euler("z", degrees, degrees=True)

        def around_y(degrees: int) -> Rotation:
            return Rotation.from_rotvec(np.radians(-degrees) * np.array([0, 1, 0]))

        def turned(turn: np.ndarray, rotation: Rotation) -> np.ndarray:
            return _rounded(
                (rotation * Rotation.from_quat(turn, scalar_first=True)).as_quat(scalar_first=True)
            )

        around, up, percent, aside, tilt = self.view
        if up:
            raising = around_y(up)
            position, turn = _rounded(raising.apply(position - _PIVOT) + _PIVOT), turned(turn, raising)
        turning = around_z(around)
        position, turn = _rounded(turning.apply(position)), turned(turn, turning)
        if percent != 100:
            position = _rounded(_PIVOT + (position - _PIVOT) * (percent / 100))
        if aside:
            turn = turned(turn, around_z(aside))
        if tilt:
            turn = turned(turn, around_y(tilt))
        return position, turn / np.linalg.norm(turn)


def _rounded(numbers: np.ndarray) -> np.ndarray:
    return np.array([round(float(number), _DIGITS) for number in numbers])
