"""The common form of demonstrations, for reading and writing files of every format."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np

from pi0.base.errors import InputError


@dataclass(frozen=True)
class Robot:
    """A robot that learns from demonstrations.

    Attributes:
        state_dim, action_dim: features of its state and action.
        largest_action: the largest action it takes, in either direction.
        hz: actions a second.
        names: words, in lower case, one of which its name in a data set holds.
    """

    state_dim: int
    action_dim: int
    largest_action: float
    hz: float
    names: tuple[str, ...]


@dataclass(frozen=True)
class Description:
    """What the files of a data set say of themselves; None where they say nothing.

    Attributes:
        fps: frames a second.
        robot: the robot's name.
        states, actions: names of the features.
    """

    fps: float | None = None
    robot: str | None = None
    states: tuple[str, ...] | None = None
    actions: tuple[str, ...] | None = None


class DataError(InputError, ValueError):
    """Demonstrations cannot be read or written; the message names the file and the fault."""


class Orientation(StrEnum):
    """Orientation of a file's images.

    LIBERO's images are OpenGL's, whose rows count from the bottom (robosuite 1.4, `macros.IMAGE_CONVENTION`).
    openpi (examples/libero/main.py) and LeRobot (processor/env_processor.py, `LiberoProcessorStep`) turn them
    by 180 degrees, so they are upright but mirrored.
    """

    UPRIGHT = "upright"
    FLIPPED = "flipped"  # upside down: LIBERO's own
    ROTATED = "rotated"  # LIBERO's turned by 180 degrees: left and right exchanged

    def convert(self, frames: np.ndarray) -> np.ndarray:
        """Stored frames [..., height, width, 3] to upright ones; the same conversion is its own inverse."""
        if self is Orientation.FLIPPED:
            return frames[..., ::-1, :, :]
        return frames[..., ::-1, :] if self is Orientation.ROTATED else frames


class Gripper(StrEnum):
    """What 1 means for the gripper, whose action is the last number of an action.

    LIBERO's -1 opens and 1 closes (robosuite 1.4, `PandaGripper.format_action`). Where 1 opens, 0 closes. OpenVLA
    trains so (prismatic/vla/datasets/rlds/oxe/transforms.py, `libero_dataset_transform`). IPEC-COMMUNITY's LIBERO
    sets are stored so by their converter (Tavish9/any4lerobot, libero2lerobot/libero_utils/libero_utils.py): it
    writes 1 - clip(a, 0, 1) for LIBERO's a.
    """

    CLOSE_IS_1 = "close-is-1"  # LIBERO's own
    OPEN_IS_1 = "open-is-1"

    def convert(self, actions: np.ndarray, where: str) -> np.ndarray:
        """Stored actions [T, A] as LIBERO's controller takes them; `where` names them in errors.

        Raises:
            DataError: values below 0 in a set where 0 closes.
        """
        if self is Gripper.CLOSE_IS_1:
            return actions
        gripper = actions[:, -1:]
        if gripper.min(initial=0) < 0:
            raise DataError(
                f"{where}: gripper actions down to {gripper.min():g}; where 1 opens they are 0 to 1. "
                f"Remove {Gripper.OPEN_IS_1}"
            )
        return np.concatenate([actions[:, :-1], 1 - 2 * gripper], axis=1)


@dataclass(frozen=True)
class Observation:
    """What the policy sees at one moment.

    Attributes:
        images: camera name to uint8 [height, width, 3], upright.
        state: float32 [S]; LIBERO's are as in `Demonstration`.
    """

    images: Mapping[str, np.ndarray]
    state: np.ndarray


@dataclass(frozen=True)
class Demonstration:
    """One episode of T control steps. The observation of step t was made before the action of step t.

    Attributes:
        prompt: the instruction.
        states: float32 [T, S]; LIBERO's are position 3 (m), axis-angle 3 (rad), gripper 2 (m).
        actions: float32 [T, A], the intended actions; LIBERO's are translation 3, rotation 3, gripper 1, in [-1, 1].
        image_steps: int64 [F], the steps that have images, in ascending order.
        images: policy camera name to uint8 [F, height, width, 3], upright.
        executed: float32 [T, A], the executed actions; they differ from `actions` if noise was added in the
            demonstration.
        rewards: float32 [T], reward of each step's action; None if the file does not hold it.
        dones: bool [T], whether the episode ended with the step; None if the file does not hold it.
        successes: bool [T], whether the task was solved at the step; None if the file does not hold it.
        truncated: bool [T], whether a limit of time ended the episode with the step; None if the file does not hold it.
        last: what was seen after the last action; None if the file does not hold it, or no images were asked for.

    Raises:
        DataError: the lengths differ, or the last observation is of other cameras or another state.
    """

    prompt: str
    states: np.ndarray
    actions: np.ndarray
    image_steps: np.ndarray
    images: Mapping[str, np.ndarray]
    executed: np.ndarray
    rewards: np.ndarray | None = None
    dones: np.ndarray | None = None
    successes: np.ndarray | None = None
    truncated: np.ndarray | None = None
    last: Observation | None = None

    def __post_init__(self) -> None:
        steps = {
            name: len(values)
            for name in ("states", "actions", "executed", "rewards", "dones", "successes", "truncated")
            if (values := getattr(self, name)) is not None
        }
        if len(set(steps.values())) > 1 or not len(self):
            raise DataError(f"a demonstration of {self.prompt!r} has {steps}; all must be equal and above 0")
        frames = {camera: len(images) for camera, images in self.images.items()}
        if any(count != len(self.image_steps) for count in frames.values()):
            raise DataError(
                f"a demonstration of {self.prompt!r} has {frames} frames at {len(self.image_steps)} steps"
            )
        if self.last is not None and (
            self.last.images.keys() != self.images.keys() or self.last.state.shape != self.states.shape[1:]
        ):
            raise DataError(
                f"a demonstration of {self.prompt!r} has {', '.join(self.images) or 'no camera'} and states of "
                f"{self.states.shape[1]} features, but its last observation has {', '.join(self.last.images)} and "
                f"{len(self.last.state)}"
            )

    def __len__(self) -> int:
        return len(self.actions)

    @property
    def failed(self) -> bool:
        """Whether the file says that the task was not solved: no success, or without such a feature no reward."""
        if self.successes is not None:
            return not self.successes.any()
        return self.rewards is not None and not (self.rewards > 0).any()

    def thinned(self, every: int) -> Demonstration:
        """The same episode with images of only the steps that are multiples of `every`."""
        kept = self.image_steps % every == 0
        images = {camera: frames[kept] for camera, frames in self.images.items()}
        return replace(self, image_steps=self.image_steps[kept], images=images)


class DemonstrationSet(ABC):
    """Demonstrations in files, read one at a time: memory holds one demonstration, not the set.

    Attributes:
        prompts: instruction of each demonstration.
        lengths: control steps of each.
        cameras: policy camera names that have images.
        description: what the files say of themselves.
    """

    cameras: Sequence[str]
    description: Description
    prompts: Sequence[str]
    lengths: Sequence[int]

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[Demonstration]:
        return (self.read(index) for index in range(len(self)))

    @abstractmethod
    def read(self, index: int, image_steps: Sequence[int] | None = None) -> Demonstration:
        """One demonstration.

        Args:
            index: in 0 .. len - 1.
            image_steps: the steps whose images to read, ascending; None for all, () for none. Images take nearly
                all of the time and memory, so a trainer that draws windows reads only those it uses.

        Raises:
            DataError: the files contradict each other or themselves.
            MissingFileError: a file is missing.
            IndexError: no such demonstration or step.
        """

    def _image_steps(self, index: int, wanted: Sequence[int] | None) -> np.ndarray:
        length = self.lengths[index]
        steps = np.arange(length) if wanted is None else np.asarray(wanted, np.int64)
        if steps.ndim != 1 or (np.diff(steps) <= 0).any() or (steps < 0).any() or (steps >= length).any():
            raise IndexError(
                f"image steps of demonstration {index} must ascend within 0 to {length - 1}: {wanted}"
            )
        return steps
