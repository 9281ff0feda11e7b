"""Action chunks as training data: observations, the actions that followed, and which of them count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from pi0.data import Demonstration, Robot


class ActedEpisode(Protocol):
    """Observations and action chunks of an episode in which the policy was called T times."""

    @property
    def prompt(self) -> str:
        """The instruction."""

    images: dict[str, np.ndarray]  # camera name to uint8 [T, height, width, 3]
    states: np.ndarray  # float32 [T, state features]
    actions: np.ndarray  # float32 [T, C, action features]
    executed: np.ndarray  # int [T]: how many actions of each chunk were executed


@dataclass
class Chunks:
    """N observations, each with the chunk of C actions that followed it.

    Attributes:
        images: camera name to uint8 [N, height, width, 3].
        states: float32 [N, state features].
        prompts: N instructions.
        actions: float32 [N, C, action features], as the robot takes them.
        valid: bool [N, C]; False for actions of a chunk that were never executed.
    """

    images: dict[str, Tensor]
    states: Tensor
    prompts: list[str]
    actions: Tensor
    valid: Tensor

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: Tensor) -> Chunks:
        return Chunks(
            {name: frames[index] for name, frames in self.images.items()},
            self.states[index],
            [self.prompts[i] for i in index.tolist()],
            self.actions[index],
            self.valid[index],
        )

    @staticmethod
    def cat(parts: Sequence[Chunks]) -> Chunks:
        """All chunks of `parts`, in order."""
        return Chunks(
            {name: torch.cat([part.images[name] for part in parts]) for name in parts[0].images},
            torch.cat([part.states for part in parts]),
            [prompt for part in parts for prompt in part.prompts],
            torch.cat([part.actions for part in parts]),
            torch.cat([part.valid for part in parts]),
        )

    @staticmethod
    def empty(cameras: Sequence[str], image_size: int, chunk: int, robot: Robot) -> Chunks:
        """No chunks, in the right shapes: the training data of a rank that collected nothing."""
        return Chunks(
            {name: torch.zeros(0, image_size, image_size, 3, dtype=torch.uint8) for name in cameras},
            torch.zeros(0, robot.state_dim),
            [],
            torch.zeros(0, chunk, robot.action_dim),
            torch.zeros(0, chunk, dtype=torch.bool),
        )

    def blank(self) -> Chunks:
        """One empty chunk in these shapes, with no valid action."""
        return Chunks(
            {name: frames.new_zeros(1, *frames.shape[1:]) for name, frames in self.images.items()},
            self.states.new_zeros(1, *self.states.shape[1:]),
            [""],
            self.actions.new_zeros(1, *self.actions.shape[1:]),
            self.valid.new_zeros(1, *self.valid.shape[1:]),
        )

    @staticmethod
    def of(episode: ActedEpisode) -> Chunks:
        """The chunks of one episode; actions that were not executed are not valid."""
        length, chunk = episode.actions.shape[:2]
        return Chunks(
            {name: torch.from_numpy(frames) for name, frames in episode.images.items()},
            torch.from_numpy(episode.states),
            [episode.prompt] * length,
            torch.from_numpy(episode.actions),
            torch.from_numpy(np.arange(chunk) < episode.executed[:, None]),
        )

    @staticmethod
    def of_demonstration(demonstration: Demonstration, chunk: int) -> Chunks:
        """A chunk of `chunk` actions from each step that has images; actions after the end are not valid."""
        steps, length = demonstration.image_steps, len(demonstration)
        following = steps[:, None] + np.arange(chunk)  # [N, C]
        valid = following < length
        actions = demonstration.actions[np.minimum(following, length - 1)]
        actions[~valid] = 0
        return Chunks(
            {name: torch.from_numpy(frames) for name, frames in demonstration.images.items()},
            torch.from_numpy(demonstration.states[steps]),
            [demonstration.prompt] * len(steps),
            torch.from_numpy(actions),
            torch.from_numpy(valid),
        )
