"""Whole episodes in memory, and the windows that are drawn from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pi0.acrlpd.episodes import RecordedEpisode
from pi0.base.errors import InputError


@dataclass(frozen=True)
class Windows:
    """W windows, each of the H steps of a chunk; what the columns mean is in docs/acrlpd.md, "Batch".

    Attributes:
        seen, then: int64 [W], rows of the observations at the window's beginning and after it; where there is none
            after it, `then` is `seen`.
        actions: float32 [W, H, A], in the robot's units.
        rewards, masks, valid: float32 [W, H].
        terminals: bool [W, H].
        next_terminal, sequence_mask, success: bool [W].
    """

    seen: Tensor
    then: Tensor
    actions: Tensor
    rewards: Tensor
    masks: Tensor
    valid: Tensor
    terminals: Tensor
    next_terminal: Tensor
    sequence_mask: Tensor
    success: Tensor

    def __len__(self) -> int:
        return len(self.seen)

    def __getitem__(self, rows: Tensor) -> Windows:
        return Windows(**{name: column[rows] for name, column in vars(self).items()})

    @staticmethod
    def cat(parts: Sequence[Windows]) -> Windows:
        """All windows of `parts`, in order."""
        return Windows(
            **{name: torch.cat([getattr(part, name) for part in parts]) for name in vars(parts[0])}
        )


def windows_of(episode: RecordedEpisode, first_row: int = 0) -> Windows:
    """The windows of an episode, one from each look.

    Args:
        episode: T looks.
        first_row: row of its first observation among all observations.
    """
    looks, horizon = episode.actions.shape[:2]
    steps = np.arange(horizon)
    valid = steps[None] < episode.executed[:, None]
    final = np.arange(looks) == looks - 1
    ends = final[:, None] & (
        steps[None] >= episode.executed[:, None] - 1
    )  # from the step that ended the episode
    then_there = ~final | episode.has_last
    seen = first_row + np.arange(looks)
    terminated = final & episode.terminated
    columns = {
        "seen": seen,
        "then": np.where(then_there, seen + 1, seen),
        "actions": episode.actions.astype(np.float32),
        "rewards": episode.rewards.astype(np.float32),
        "masks": 1 - (ends & episode.terminated).astype(np.float32),
        "valid": valid.astype(np.float32),
        "terminals": ends,
        "next_terminal": terminated,
        "sequence_mask": terminated | then_there,
        "success": np.full(looks, episode.success),
    }
    return Windows(
        **{name: torch.from_numpy(np.ascontiguousarray(column)) for name, column in columns.items()}
    )


class ReplayBuffer:
    """Whole episodes. When it is full the oldest ones leave, each as a whole, so windows of two never mix.

    Attributes:
        episodes: what is there, oldest first.
        windows: their windows.
        prompts: instruction of each observation.
        states: raw states of all observations, float32 [O, S].

    Args:
        capacity: most windows; an episode that is added may exceed it alone.

    Raises:
        InputError: the capacity is below 1.
    """

    def __init__(self, capacity: int):
        if capacity < 1:
            raise InputError(f"a buffer of {capacity} windows holds nothing")
        self.capacity = capacity
        self.episodes: list[RecordedEpisode] = []
        self.added = 0  # episodes ever
        self._lay_out()

    def __len__(self) -> int:
        """Windows."""
        return sum(map(len, self.episodes))

    def add(self, episodes: Sequence[RecordedEpisode]) -> int:
        """Add episodes; returns how many observations left with the oldest ones."""
        kept = [*self.episodes, *episodes]
        total = sum(map(len, kept))
        dropped, left = 0, 0
        while total > self.capacity and dropped < len(kept) - 1:
            total -= len(kept[dropped])
            if dropped < len(self.episodes):
                left += len(kept[dropped].states)
            dropped += 1
        self.episodes = kept[dropped:]
        self.added += len(episodes)
        self._lay_out()
        return left

    def images(self, rows: Tensor) -> dict[str, Tensor]:
        """Images of observations, camera name to uint8 [B, h, w, 3]."""
        cameras = self.episodes[0].images
        places = [self._place[row] for row in rows.tolist()]
        return {
            camera: torch.from_numpy(np.stack([self.episodes[e].images[camera][look] for e, look in places]))
            for camera in cameras
        }

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Rows of windows, drawn evenly with replacement.

        Raises:
            InputError: the buffer is empty.
        """
        if not len(self):
            raise InputError("the buffer holds no episode; record some first")
        return torch.randint(len(self), (count,), generator=generator)

    def state_dict(self) -> dict[str, Any]:
        """Episodes as tensors and plain values; they never change, so nothing is copied."""

        def plain(value: Any) -> Any:
            if isinstance(value, np.ndarray):
                return torch.from_numpy(value)
            return (
                {name: plain(each) for name, each in value.items()} if isinstance(value, Mapping) else value
            )

        return {
            "added": self.added,
            "episodes": [
                {name: plain(value) for name, value in vars(each).items()} for each in self.episodes
            ],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`."""

        def arrays(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                return value.numpy()
            return {name: arrays(each) for name, each in value.items()} if isinstance(value, dict) else value

        self.added = state["added"]
        self.episodes = [
            RecordedEpisode(**{name: arrays(value) for name, value in each.items()})
            for each in state["episodes"]
        ]
        self._lay_out()

    def statistics(self) -> dict[str, Any]:
        """Counts: episodes, solved ones, windows, control steps, and bytes."""
        return {
            "episodes": len(self.episodes),
            "solved": sum(episode.success for episode in self.episodes),
            "windows": len(self),
            "steps": int(sum(episode.executed.sum() for episode in self.episodes)),
            "bytes": sum(episode.nbytes for episode in self.episodes),
        }

    def _lay_out(self) -> None:
        parts, place, first = [], [], 0
        for number, episode in enumerate(self.episodes):
            parts.append(windows_of(episode, first))
            place += [(number, look) for look in range(len(episode.states))]
            first += len(episode.states)
        self._place = place
        if parts:
            self.windows = Windows.cat(parts)
            self.states = torch.from_numpy(np.concatenate([episode.states for episode in self.episodes]))
            self.prompts = [episode.prompt for episode in self.episodes for _ in range(len(episode.states))]
