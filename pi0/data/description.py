"""What a data set says of itself, compared with the robot that is to learn from it."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import Any, Literal

from pi0.data.demonstrations import DataError, Description, Robot

# What a user may accept although the data set says otherwise, as --dataset-accept or algo.cotraining_accept.
Contradiction = Literal["fps", "robot", "names", "failures"]
_JOINT = re.compile(r"joint|shoulder|elbow|forearm|waist")
_SAYS_NOTHING = ("", "unknown", "none")


def feature_names(names: Any) -> tuple[str, ...] | None:
    """Names of a feature's numbers in meta/info.json: a list, or lists under words such as "motors"."""
    lists = list(names.values()) if isinstance(names, dict) else [names]
    if not lists or not all(isinstance(part, list) for part in lists):
        return None
    return tuple(str(name) for part in lists for name in part)


def require_fit(description: Description, robot: Robot, source: str, accept: Collection[str] = ()) -> None:
    """Raise `DataError` where a data set contradicts the robot in something that is not in `accept`."""
    problems = [
        f"{problem}; if it fits all the same, accept it: --dataset-accept {kind}, algo.cotraining_accept=[{kind}], "
        f'data.skip_norm_stats=true (pi0.acrlpd), or accept=["{kind}"] in Python'
        for kind, problem in _contradictions(description, robot)
        if kind not in accept
    ]
    if problems:
        raise DataError("\n".join(f"{source}: {problem}" for problem in problems))


def _contradictions(description: Description, robot: Robot) -> Iterator[tuple[Contradiction, str]]:
    fps, name = description.fps, (description.robot or "").lower()
    if fps is not None and fps != robot.hz:
        rates = f"{fps:g} frames a second, but the robot acts {robot.hz:g} times a second"
        yield "fps", f"{rates} (openpi's LIBERO sets say 10, though each frame is a step of LIBERO)"
    if name not in _SAYS_NOTHING and not any(known in name for known in robot.names):
        yield "robot", f"the robot is {description.robot}, not {robot.names[0]}"
    for what, names, gripper in (
        ("state", description.states, robot.state_dim - 2),
        ("actions", description.actions, robot.action_dim - 1),
    ):
        if names and not _is_pose(names, gripper):
            expected = "position x, y, z, then a rotation in 3, then the gripper"
            yield "names", f"the features of {what} are {', '.join(names)}; the robot's are {expected}"


def _is_pose(names: tuple[str, ...], gripper: int) -> bool:
    """Whether names could be those of a pose and a gripper; names that tell nothing could.

    They are not if one is a joint's, or x, y, z or the gripper is elsewhere.
    """
    for index, name in enumerate(map(str.lower, names)):
        axis = re.fullmatch(r"(?:.*[_. ])?(?:delta_|d)?([xyz])", name)
        turns = re.search(r"rot|axis|ang|quat|theta|ori", name)
        if _JOINT.search(name) or (axis and not turns and index != "xyz".index(axis[1])):
            return False
        if "grip" in name and index < gripper:
            return False
    return True
