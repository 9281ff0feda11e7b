"""Videos of evaluated episodes. Rollouts are deterministic: a rollout recorded later is the evaluated one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from pi0.base.video import captioned, write_video
from pi0.libero.environments import Environments
from pi0.libero.episodes import Episode
from pi0.libero.evaluation import EvaluationResult
from pi0.libero.rollouts import Policy

VIDEO_EPISODES = 3  # in a video of before and after
VIDEO_EVERY = 4  # control steps from one frame to the next
VIDEO_FPS = 10  # twice real time


def write_films(result: EvaluationResult, folder: Path) -> None:
    """Write a video of each episode of `result` that was filmed.

    A video is `folder`/taskI-stateJ-success.mp4 or ...-failure.mp4. There is none of an episode that broke.

    Args:
        result: an evaluation with `record`.
        folder: folder for the videos.
    """
    for episode in result.episodes:
        write_film(episode, folder)


def write_film(episode: Episode, folder: Path) -> None:
    """Write the video of an episode, if it was filmed (`write_films`)."""
    if not episode.rollout.record:
        return
    if episode.failure is not None:
        print(f"not filmed: {episode.rollout}: {episode.failure}")
        return
    outcome = "success" if episode.success else "failure"
    name = f"task{episode.rollout.task.index}-state{episode.rollout.init_index}-{outcome}.mp4"
    write_video(folder / name, episode.video, VIDEO_FPS)


def film_before_after(
    run_dir: Path,
    environments: Environments,
    policy_before: Policy,
    policy_after: Policy,
    before: EvaluationResult,
    after: EvaluationResult,
) -> None:
    """Write before_after.mp4: both policies side by side on a few episodes. Those that training solved come first.

    Args:
        run_dir: folder for the video.
        environments: tasks and workers.
        policy_before, policy_after: the policies.
        before, after: their evaluations on the same states and noise.
    """
    pairs = [
        pair
        for pair in zip(before.episodes, after.episodes, strict=True)
        if pair[0].failure is pair[1].failure is None
    ]
    pairs.sort(key=lambda pair: pair[0].success - pair[1].success)
    pairs = pairs[:VIDEO_EPISODES]
    rollouts = [replace(pair[0].rollout, record=VIDEO_EVERY) for pair in pairs]
    films: list[list[list[np.ndarray]]] = []
    for number, (when, policy) in enumerate((("before", policy_before), ("after", policy_after))):
        episodes = dict(environments.run_policy(policy, rollouts))
        films.append([_titled(episodes[index], pair[number], when) for index, pair in enumerate(pairs)])
    frames: list[np.ndarray] = []
    for left, right in zip(*films, strict=True):
        if not left or not right:
            continue
        length = max(len(left), len(right))
        padded = [video + [video[-1]] * (length - len(video)) for video in (left, right)]
        gap = np.full((left[0].shape[0], 4, 3), 255, np.uint8)
        frames += [np.concatenate([a, gap, b], axis=1) for a, b in zip(*padded, strict=True)]
    if not frames:
        print("before_after.mp4 not written: no episode ran to its end both before and after")
        return
    write_video(run_dir / "before_after.mp4", frames, VIDEO_FPS)
    print(f"  {run_dir / 'before_after.mp4'}")


def _titled(episode: Episode, scored: Episode, when: str) -> list[np.ndarray]:
    """The film of an episode; empty if it broke this time, or does not show what was scored."""
    if episode.failure is not None:
        return []
    if (episode.success, episode.steps) != (scored.success, scored.steps):
        print(f"not filmed: {when}, {episode.rollout}: policy or machine are not those that were scored")
        return []
    solved = "solved" if episode.success else "not solved"
    return captioned(episode.video, f"{when}: {solved} in {episode.steps} steps")
