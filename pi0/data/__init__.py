"""Demonstrations in files: reads and writes LeRobot data sets, reads LIBERO's HDF5, one episode at a time."""

from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

from pi0.data.demonstrations import (
    DataError,
    Demonstration,
    DemonstrationSet,
    Gripper,
    Observation,
    Orientation,
    Robot,
)
from pi0.data.description import Contradiction, require_fit
from pi0.data.lerobot_layout import LEROBOT_NAMES, OPENPI_NAMES, FeatureNames

__all__ = [
    "LEROBOT_NAMES",
    "OPENPI_NAMES",
    "Contradiction",
    "DataError",
    "Demonstration",
    "DemonstrationSet",
    "FeatureNames",
    "Gripper",
    "Observation",
    "Orientation",
    "Robot",
    "open_demonstrations",
]


def open_demonstrations(
    path: str | Path,
    gripper: str | None = None,
    robot: Robot | None = None,
    accept: Collection[str] = (),
    **options: Any,
) -> DemonstrationSet:
    """Open the demonstrations at a path; the files decide the format.

    Args:
        path: a folder with meta/info.json (LeRobot), or an HDF5 file or a folder of such files (LIBERO).
        gripper: what 1 means for the gripper in this set, a `Gripper`; None: the same as in LIBERO, and some action
            must open it.
        robot: the robot that learns from them; None: whatever robot they are of.
        accept: contradictions between the files' description and the robot that are no error (`Contradiction`).
        options: those of `pi0.data.lerobot_reader.LeRobotDemonstrations` or
            `pi0.data.libero_hdf5.LiberoDemonstrations`.

    Raises:
        MissingFileError: there are no such files.
        DataError: the files cannot be read, or contradict the robot; or `gripper` is None, and no action opens LIBERO's
            gripper.
    """
    path = Path(path)
    # The libraries of both formats are large, so each is imported only for its own files.
    found: DemonstrationSet
    if (path / "meta").is_dir():
        from pi0.data.lerobot_reader import LeRobotDemonstrations

        found = LeRobotDemonstrations(path, gripper=gripper or Gripper.CLOSE_IS_1, **options)
    else:
        if unfit := options.keys() & {"names", "orientation", "tolerance_s"}:
            raise DataError(
                f"{path} has no folder meta, so it is no LeRobot data set; "
                f"{', '.join(sorted(unfit))} can be given only for one"
            )
        from pi0.data.libero_hdf5 import LiberoDemonstrations

        found = LiberoDemonstrations(path, gripper=gripper or Gripper.CLOSE_IS_1, **options)
    if robot is not None:
        require_fit(found.description, robot, str(path), accept)
    if gripper is None:
        _require_opening(found, path)
    return found


def _require_opening(demonstrations: DemonstrationSet, path: Path) -> None:
    """Refuse a set that never opens LIBERO's gripper: the policy would learn to close where it should open.

    Demonstrations begin with an open gripper, so usually the first one decides. One that never opens it proves
    nothing: a door may be shut with a closed gripper.
    """
    low, high = math.inf, -math.inf
    for index in range(len(demonstrations)):
        gripper = demonstrations.read(index, image_steps=()).actions[:, -1]
        low, high = min(low, gripper.min()), max(high, gripper.max())
        if low < 0:
            return
    raise DataError(
        f"{path}: gripper actions are {low:g} to {high:g}, but -1 opens LIBERO's gripper. Set "
        f"{Gripper.OPEN_IS_1} if 1 opens it in this set, as in IPEC-COMMUNITY's, or {Gripper.CLOSE_IS_1} if it is "
        "never opened: --dataset-gripper, algo.cotraining_gripper, data.gripper (pi0.acrlpd), or gripper= in Python"
    )
