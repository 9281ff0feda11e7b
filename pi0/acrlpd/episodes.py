"""Recorded episodes, good and bad, in the form from which windows are cut; from rollouts and from demonstrations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from pi0.data.demonstrations import DataError, Demonstration
from pi0.libero.episodes import Episode


@dataclass(frozen=True)
class RecordedEpisode:
    """An episode in which the policy looked T times and each time chose a chunk.

    Attributes:
        prompt: the instruction.
        images: camera name to uint8 [T or T + 1, height, width, 3], upright; the last one is what was seen after the
            last action, if that was recorded.
        states: float32 [T or T + 1, S], as the robot measured them.
        actions: float32 [T, H, A] in the robot's units, as carried out; beyond `executed` the rest of the chosen chunk.
        executed: int64 [T], how many actions of each chunk were carried out, 1 to H.
        rewards: float32 [T, H], of each step; 0 beyond `executed`.
        terminated: whether the episode ended by itself (LIBERO: by success), not by a limit of time.
        success: whether the task was solved.

    Raises:
        DataError: the lengths contradict each other.
    """

    prompt: str
    images: Mapping[str, np.ndarray]
    states: np.ndarray
    actions: np.ndarray
    executed: np.ndarray
    rewards: np.ndarray
    terminated: bool
    success: bool

    def __post_init__(self) -> None:
        looks, horizon = self.actions.shape[:2]
        seen = {len(self.states), *(len(frames) for frames in self.images.values())}
        if not looks or len(seen) > 1 or not seen <= {looks, looks + 1}:
            raise DataError(
                f"an episode of {self.prompt!r} has {looks} chunks, but {sorted(seen)} states and images"
            )
        if self.rewards.shape != (looks, horizon) or self.executed.shape != (looks,):
            raise DataError(
                f"an episode of {self.prompt!r} has {looks} chunks of {horizon} actions, but rewards "
                f"{list(self.rewards.shape)} and {len(self.executed)} counts of executed actions"
            )
        if self.executed.min() < 1 or self.executed.max() > horizon:
            raise DataError(
                f"an episode of {self.prompt!r} executed {self.executed.min()} to {self.executed.max()} actions of "
                f"chunks of {horizon}"
            )

    def __len__(self) -> int:
        """T."""
        return len(self.actions)

    @property
    def has_last(self) -> bool:
        """Whether what was seen after the last action is there."""
        return len(self.states) > len(self)

    @property
    def nbytes(self) -> int:
        """Memory of its arrays."""
        arrays = (self.states, self.actions, self.executed, self.rewards, *self.images.values())
        return sum(array.nbytes for array in arrays)


def of_rollout(episode: Episode, horizon: int) -> RecordedEpisode:
    """A rollout's episode; its reward is 1 with the step that solved the task.

    Args:
        episode: of `pi0.libero.rollouts`.
        horizon: H; of longer chunks the rest, which was never carried out, is left out.

    Raises:
        DataError: the simulation broke, or a chunk was carried out for more than H steps.
    """
    if episode.failure is not None:
        raise DataError(f"{episode.rollout}: {episode.failure}; it teaches nothing")
    if episode.executed.max() > horizon:
        raise DataError(
            f"{episode.rollout} carried out {episode.executed.max()} actions of a chunk, more than {horizon}"
        )
    rewards = np.zeros((len(episode.executed), horizon), np.float32)
    if episode.success:
        rewards[-1, episode.executed[-1] - 1] = 1
    images, states = episode.images, episode.states
    if episode.last is not None:
        images = {
            camera: np.concatenate([frames, episode.last.images[camera][None]])
            for camera, frames in images.items()
        }
        states = np.concatenate([states, episode.last.state[None]])
    return RecordedEpisode(
        prompt=episode.prompt,
        images=images,
        states=states,
        actions=episode.actions[:, :horizon],
        executed=episode.executed,
        rewards=rewards,
        terminated=episode.terminated,
        success=episode.success,
    )


def with_outcome(episode: RecordedEpisode, success: bool) -> RecordedEpisode:
    """The same episode, as if it had ended so: with the reward of its last step, or cut off without one."""
    rewards = np.zeros_like(episode.rewards)
    if success:
        rewards[-1, episode.executed[-1] - 1] = 1
    return replace(episode, rewards=rewards, terminated=success, success=success)


def shuffled_outcomes(
    episodes: Sequence[RecordedEpisode], random: np.random.Generator
) -> list[RecordedEpisode]:
    """A control: success and failure are exchanged at random between the episodes of each task."""
    tasks: dict[str, list[int]] = {}
    for number, episode in enumerate(episodes):
        tasks.setdefault(episode.prompt, []).append(number)
    found = list(episodes)
    for numbers in tasks.values():
        for number, other in zip(numbers, random.permutation(numbers), strict=True):
            found[number] = with_outcome(episodes[number], episodes[other].success)
    return found


def ended_at_horizon(episode: RecordedEpisode) -> RecordedEpisode:
    """An ablation: what reached its horizon has ended, without a reward."""
    return replace(episode, terminated=True)


def looked_steps(length: int, horizon: int) -> list[int]:
    """Steps of an episode of `length` steps at which a policy that carries out whole chunks looks."""
    return list(range(0, length, horizon))


def of_demonstration(demonstration: Demonstration, horizon: int, source: str) -> RecordedEpisode:
    """A demonstration, cut into chunks of H actions; it needs images at `looked_steps`.

    An episode ends by itself where its last `dones` is true or, without that feature, where it was solved.

    Args:
        demonstration: of a data set.
        horizon: H.
        source: what errors call it.

    Raises:
        DataError: it holds no rewards, or does not say how it ended.
    """
    if demonstration.rewards is None and demonstration.successes is None:
        raise DataError(f"{source} holds neither rewards nor successes, so a critic cannot learn from it")
    length = len(demonstration)
    success = not demonstration.failed
    rewards = demonstration.rewards
    if rewards is None:
        rewards = np.asarray(demonstration.successes, np.float32)
    ended = success if demonstration.dones is None else bool(demonstration.dones[-1])
    starts = looked_steps(length, horizon)
    rows = np.searchsorted(demonstration.image_steps, starts)
    if (rows >= len(demonstration.image_steps)).any() or (demonstration.image_steps[rows] != starts).any():
        raise DataError(f"{source} has no images at every {horizon}th step")
    executed = np.array([min(horizon, length - start) for start in starts])
    held = np.minimum(
        np.arange(horizon)[None] + np.array(starts)[:, None], length - 1
    )  # the last action is held
    inside = np.arange(horizon)[None] < executed[:, None]
    return RecordedEpisode(
        prompt=demonstration.prompt,
        images={camera: frames[rows] for camera, frames in demonstration.images.items()},
        states=demonstration.states[starts],
        actions=demonstration.executed[held],
        executed=executed,
        rewards=np.where(inside, rewards[held], 0).astype(np.float32),
        terminated=ended and success,
        success=success,
    )
