"""Demonstrations in files: LeRobot data sets, read and written; LIBERO's HDF5, read. One episode at a time."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from pi0.data.demonstrations import (
    DataError,
    Demonstration,
    DemonstrationSet,
    Gripper,
    Orientation,
    Robot,
)
from pi0.data.lerobot_layout import LEROBOT_NAMES, OPENPI_NAMES, FeatureNames

__all__ = [
    "LEROBOT_NAMES",
    "OPENPI_NAMES",
    "DataError",
    "Demonstration",
    "DemonstrationSet",
    "FeatureNames",
    "Gripper",
    "Orientation",
    "Robot",
    "open_demonstrations",
]


def open_demonstrations(path: str | Path, gripper: str | None = None, **options: Any) -> DemonstrationSet:
    """The demonstrations at a path, by what is there.

    Args:
        path: a folder with meta/info.json (LeRobot), or an HDF5 file or a folder of such files (LIBERO).
        gripper: what 1 means to the gripper there, a `Gripper`; None: as to LIBERO's, which some action must open.
        options: as of `pi0.data.lerobot_reader.LeRobotDemonstrations` or
            `pi0.data.libero_hdf5.LiberoDemonstrations`.

    Raises:
        MissingFileError: neither is there.
        DataError: what is there cannot be read; or `gripper` is None, and no action opens LIBERO's.
    """
    path = Path(path)
    # The libraries for the two are large; each is imported for its own files only.
    found: DemonstrationSet
    if (path / "meta").is_dir():
        from pi0.data.lerobot_reader import LeRobotDemonstrations

        found = LeRobotDemonstrations(path, gripper=gripper or Gripper.CLOSE_IS_1, **options)
    else:
        if unfit := options.keys() & {"names", "orientation", "tolerance_s"}:
            raise DataError(
                f"{path} has no folder meta, so it is no LeRobot data set, of which alone "
                f"{', '.join(sorted(unfit))} can be said"
            )
        from pi0.data.libero_hdf5 import LiberoDemonstrations

        found = LiberoDemonstrations(path, gripper=gripper or Gripper.CLOSE_IS_1, **options)
    if gripper is None:
        _require_opening(found, path)
    return found


def _require_opening(demonstrations: DemonstrationSet, path: Path) -> None:
    """Refuse a set that never opens LIBERO's gripper: learned from, it would close where it should open.

    Demonstrations begin with an open gripper, so one of them is read as a rule. One alone does not tell: a
    door may be shut with the gripper closed throughout.
    """
    low, high = math.inf, -math.inf
    for index in range(len(demonstrations)):
        gripper = demonstrations.read(index, image_steps=()).actions[:, -1]
        low, high = min(low, gripper.min()), max(high, gripper.max())
        if low < 0:
            return
    raise DataError(
        f"{path}: gripper actions are {low:g} to {high:g}, and -1 is what opens LIBERO's gripper. Say "
        f"{Gripper.OPEN_IS_1} if 1 opens it in this set, as in IPEC-COMMUNITY's, or {Gripper.CLOSE_IS_1} if it is "
        "never opened: --dataset-gripper, algo.cotraining_gripper, or gripper= in Python"
    )
