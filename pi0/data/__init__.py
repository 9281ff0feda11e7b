"""Demonstrations in files: LeRobot data sets, read and written; LIBERO's HDF5, read. One episode at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pi0.data.demonstrations import (
    DataError,
    Demonstration,
    DemonstrationSet,
    Orientation,
    norm_stats_of,
)
from pi0.data.lerobot_layout import LEROBOT_NAMES, OPENPI_NAMES, FeatureNames

__all__ = [
    "LEROBOT_NAMES",
    "OPENPI_NAMES",
    "DataError",
    "Demonstration",
    "DemonstrationSet",
    "FeatureNames",
    "Orientation",
    "norm_stats_of",
    "open_demonstrations",
]


def open_demonstrations(path: str | Path, **options: Any) -> DemonstrationSet:
    """The demonstrations at a path, by what is there.

    Args:
        path: a folder with meta/info.json (LeRobot), or an HDF5 file or a folder of such files (LIBERO).
        options: as of `pi0.data.lerobot_reader.LeRobotDemonstrations` or
            `pi0.data.libero_hdf5.LiberoDemonstrations`.

    Raises:
        MissingFileError: neither is there.
        DataError: what is there cannot be read.
    """
    path = Path(path)
    # The libraries for the two are large; each is imported for its own files only.
    if (path / "meta").is_dir():
        from pi0.data.lerobot_reader import LeRobotDemonstrations

        return LeRobotDemonstrations(path, **options)
    if unfit := options.keys() & {"names", "orientation", "tolerance_s"}:
        raise DataError(
            f"{path} has no folder meta, so it is no LeRobot data set, of which alone "
            f"{', '.join(sorted(unfit))} can be said"
        )
    from pi0.data.libero_hdf5 import LiberoDemonstrations

    return LiberoDemonstrations(path, **options)
