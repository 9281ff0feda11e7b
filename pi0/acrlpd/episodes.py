"""Recorded episodes, good and bad, in the form from which windows are cut; from rollouts, to files and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from pi0.data.demonstrations import DataError, Demonstration, Observation
from pi0.libero.episodes import ROBOT, Episode


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
        images = with_last(images, episode.last)
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


def demonstration_of(episode: Episode) -> Demonstration:
    """A rollout as a demonstration, with images of every control step; `of_demonstration` is its inverse.

    Of a chunk only the actions that were carried out are kept: as the policy chose them, and as the controller got them,
    which is clipped. Policies that clip by themselves have both alike.

    Args:
        episode: of a rollout with `keep_every`; with `keep_last` what was seen after its last action is kept, too.

    Raises:
        DataError: the simulation broke, or some steps were not looked at.
    """
    if episode.failure is not None:
        raise DataError(f"{episode.rollout}: {episode.failure}; it teaches nothing")
    steps = episode.steps
    if len(episode.every) != steps:
        raise DataError(f"{episode.rollout} has {len(episode.every)} observations of {steps} control steps")
    chosen = np.concatenate(
        [chunk[:count] for chunk, count in zip(episode.actions, episode.executed, strict=True)]
    ).astype(np.float32)
    last = np.arange(steps) == steps - 1
    return Demonstration(
        prompt=episode.prompt,
        states=np.stack([seen.state for seen in episode.every]),
        actions=chosen,
        image_steps=np.arange(steps),
        images={
            camera: np.stack([seen.images[camera] for seen in episode.every]) for camera in episode.images
        },
        executed=chosen.clip(-ROBOT.largest_action, ROBOT.largest_action),
        rewards=(last & episode.success).astype(np.float32),
        dones=last,
        successes=last & episode.success,
        truncated=last & episode.truncated,
        last=episode.last,
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

    Args:
        demonstration: of a data set.
        horizon: H.
        source: what errors call it.

    Raises:
        DataError: it holds no rewards, goes on after its end, or has no image where the policy would look.
    """
    length = len(demonstration)
    success, rewards = not demonstration.failed, rewards_of(demonstration, source)
    terminated = terminates(demonstration, source) is True
    starts = looked_steps(length, horizon)
    rows = np.searchsorted(demonstration.image_steps, starts)
    if (rows >= len(demonstration.image_steps)).any() or (demonstration.image_steps[rows] != starts).any():
        raise DataError(f"{source} has no images at every {horizon}th step")
    executed = np.array([min(horizon, length - start) for start in starts])
    held = np.minimum(
        np.arange(horizon)[None] + np.array(starts)[:, None], length - 1
    )  # the last action is held
    inside = np.arange(horizon)[None] < executed[:, None]
    images = {camera: frames[rows] for camera, frames in demonstration.images.items()}
    states, last = demonstration.states[starts], demonstration.last
    if last is not None:
        images = with_last(images, last)
        states = np.concatenate([states, last.state[None]])
    return RecordedEpisode(
        prompt=demonstration.prompt,
        images=images,
        states=states,
        actions=demonstration.executed[held],
        executed=executed,
        rewards=np.where(inside, rewards[held], 0).astype(np.float32),
        terminated=terminated,
        success=success,
    )


def rewards_of(demonstration: Demonstration, source: str) -> np.ndarray:
    """Reward of each step, float32 [T]; without rewards 1 where the task is solved.

    Raises:
        DataError: it holds neither.
    """
    if demonstration.rewards is not None:
        return demonstration.rewards
    if demonstration.successes is not None:
        return demonstration.successes.astype(np.float32)
    raise DataError(
        f"{source} holds neither rewards nor successes, so a critic cannot learn from it; leave its file out, or add "
        "next.reward (LeRobot) or rewards (HDF5)"
    )


def terminates(demonstration: Demonstration, source: str) -> bool | None:
    """Whether an episode ended by itself, not by a limit of time; None if the file does not tell.

    A solved episode whose last `dones` is true ended by itself; without that feature, every solved one. One that is not
    solved did if `dones` is true and `truncated` is not. Without `truncated` both ends look the same.

    Raises:
        DataError: the file says that it ended before its last step.
    """
    dones, truncated = demonstration.dones, demonstration.truncated
    for name, flags in (("done", dones), ("truncated", truncated)):
        if flags is not None and flags[:-1].any():
            raise DataError(
                f"{source} says at step {int(flags.argmax())} that it is {name}, but has {len(flags)} steps; end it there"
            )
    done = None if dones is None else bool(dones[-1])
    if not demonstration.failed:
        return done is not False
    if truncated is not None:
        return bool(done) and not truncated[-1]
    return None if done is not False else False


def with_last(images: Mapping[str, np.ndarray], last: Observation) -> dict[str, np.ndarray]:
    """Frames by camera [T, h, w, 3], with those of the last observation behind them."""
    return {camera: np.concatenate([frames, last.images[camera][None]]) for camera, frames in images.items()}
