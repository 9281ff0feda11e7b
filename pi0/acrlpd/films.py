"""A film of evaluated episodes in which the value that the critics expect runs beside the robot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from pi0.base.video import captioned, write_video
from pi0.libero.environments import Environments
from pi0.libero.episodes import Episode
from pi0.libero.evaluation import EvaluationResult
from pi0.libero.films import VIDEO_EPISODES, VIDEO_EVERY, VIDEO_FPS
from pi0.policy.critics import BestOfPolicy
from pi0.report.figures import COLORS, STYLE, new_figure


def film_values(
    run_dir: Path, environments: Environments, policy: BestOfPolicy, result: EvaluationResult
) -> None:
    """Write values.mp4: a few episodes of an evaluation, failures first, each beside the value of the chunks it chose.

    Args:
        run_dir: folder for the video.
        environments: tasks and workers.
        policy: the policy that was evaluated.
        result: the evaluation.
    """
    ran = [episode for episode in result.episodes if episode.failure is None]
    ran.sort(key=lambda episode: episode.success)
    # One failure at most: what goes wrong is seen best beside what goes well.
    scored = [*ran[:1], *[episode for episode in ran[1:] if episode.success]][:VIDEO_EPISODES]
    rollouts = [replace(episode.rollout, record=VIDEO_EVERY) for episode in scored]
    again = dict(environments.run_policy(policy, rollouts))
    frames: list[np.ndarray] = []
    for number, first in enumerate(scored):
        episode = again[number]
        if episode.failure is not None or (episode.success, episode.steps) != (first.success, first.steps):
            print(
                f"not filmed: {episode.rollout}: it broke, or policy or machine are not those that were scored"
            )
            continue
        prompts = [episode.prompt] * len(episode.states)
        values = policy.value(episode.images, episode.states, prompts, episode.actions)
        solved = "solved" if episode.success else "not solved"
        frames += captioned(beside(episode, values), f"{solved} in {episode.steps} steps")
    if not frames:
        print("values.mp4 not written: no episode ran to its end")
        return
    write_video(run_dir / "values.mp4", frames, VIDEO_FPS)
    print(f"  {run_dir / 'values.mp4'}")


def beside(episode: Episode, values: Sequence[float]) -> list[np.ndarray]:
    """The film of an episode with, at its right, the values [T] of the T chunks until each moment."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    looks = np.concatenate([[0], np.cumsum(episode.executed)[:-1]])  # step of each look
    height, width = episode.video[0].shape[:2]
    shown = []
    with mpl.rc_context(STYLE):
        figure = new_figure(1.0)
        figure.set_size_inches(width / 100, height / 100)
        figure.set_dpi(100)
        canvas = FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        axes.set_xlim(0, episode.steps)
        axes.set_ylim(min(0.0, *values), max(1.0, *values))
        axes.set_xlabel("control step")
        axes.set_ylabel("value of the chosen chunk")
        (line,) = axes.step([], [], where="post", color=COLORS["blue"])
        for number, frame in enumerate(episode.video):
            step = min(number * VIDEO_EVERY, episode.steps)
            until = int(np.searchsorted(looks, step, side="right"))
            line.set_data([*looks[:until], step], [*values[:until], values[until - 1]])
            canvas.draw()
            panel = np.asarray(canvas.buffer_rgba())[..., :3]
            shown.append(np.concatenate([frame, panel], axis=1))
    return shown
