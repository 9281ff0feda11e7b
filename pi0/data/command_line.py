"""The options of commands that read demonstrations from files, and the demonstrations that they choose."""

from __future__ import annotations

import argparse
from typing import Any, get_args

from pi0.base.arguments import Collect
from pi0.data import (
    Contradiction,
    DemonstrationSet,
    FeatureNames,
    Gripper,
    Orientation,
    Robot,
    open_demonstrations,
)


def add_dataset_options(parser: argparse.ArgumentParser, failures: str, images: bool) -> None:
    """The options that `open_dataset` reads; `--dataset` is the command's own.

    Args:
        parser: of the command.
        failures: what the command does with episodes without success if they are accepted: "learn", "count".
        images: whether it reads images.
    """
    parser.add_argument(
        "--dataset-features",
        action=Collect,
        nargs="+",
        metavar="NAME=FEATURE",
        help="names of state, actions and each camera in a LeRobot data set, if they are not known",
    )
    if images:
        parser.add_argument(
            "--dataset-images",
            choices=list(Orientation),
            help="orientation of images in a LeRobot data set; openpi's and LeRobot's LIBERO sets have rotated",
        )
    parser.add_argument(
        "--dataset-gripper",
        choices=list(Gripper),
        help="what 1 means for the gripper of a data set; IPEC-COMMUNITY's LIBERO sets have open-is-1",
    )
    parser.add_argument(
        "--dataset-accept",
        action=Collect,
        nargs="+",
        default=[],
        choices=get_args(Contradiction),
        help="what may contradict LIBERO's robot in a data set: frames a second (fps), robot, names of features; "
        f"failures: {failures} episodes without reward or success, too",
    )


def open_dataset(options: argparse.Namespace, robot: Robot) -> DemonstrationSet:
    """The demonstrations of `--dataset`, for a robot.

    Raises:
        InputError: as `open_demonstrations`, or names of features cannot be read.
    """
    how: dict[str, Any] = {}
    if options.dataset_features:
        how["names"] = FeatureNames.parse(options.dataset_features)
    if getattr(options, "dataset_images", None):
        how["orientation"] = Orientation(options.dataset_images)
    return open_demonstrations(options.dataset, options.dataset_gripper, robot, options.dataset_accept, **how)
