"""For debugging: every rollout's video, and exactly what the policy saw, written as rollouts finish.

Environment variables switch it on: `PI0_DEBUG_SAVE_VIDEO=true` for videos, `DEBUG_SAVE_PROCESSED=1` for
observations, `PI0_DEBUG_DIR` for the folder (outputs/debug by default).
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from pi0.paths import REPO_ROOT
from pi0.ript.env.episodes import Episode, Rollout
from pi0.video import write_video

VIDEO_EVERY = 2  # control steps from one frame to the next
VIDEO_FPS = 10  # real time: 20 control steps a second


class DebugOutput:
    """What the environment variables ask for; does nothing when they ask for nothing."""

    def __init__(self) -> None:
        self.videos = _is_on("PI0_DEBUG_SAVE_VIDEO")
        self.observations = _is_on("DEBUG_SAVE_PROCESSED")
        self.folder = Path(os.environ.get("PI0_DEBUG_DIR") or REPO_ROOT / "outputs" / "debug")

    def prepare(self, rollout: Rollout) -> Rollout:
        """The rollout, filmed if videos are wanted."""
        return replace(rollout, record=rollout.record or VIDEO_EVERY) if self.videos else rollout

    def save(self, episode: Episode) -> None:
        """Write what is wanted of a finished episode, under a name that says which it was."""
        if not (self.videos or self.observations):
            return
        rollout = episode.rollout
        key = "-".join(str(number) for number in rollout.noise_key)
        outcome = "failed" if episode.failure else "success" if episode.success else "failure"
        name = f"{rollout.task.suite}-task{rollout.task.index}-state{rollout.init_index}-{key}-{outcome}"
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.videos and episode.video:
            write_video(self.folder / f"{name}.mp4", episode.video, VIDEO_FPS)
        if self.observations and len(episode.states):
            images = {f"images/{camera}": frames for camera, frames in episode.images.items()}
            np.savez_compressed(
                self.folder / f"{name}.npz",
                allow_pickle=False,
                prompt=np.array(rollout.task.prompt),
                states=episode.states,
                actions=episode.actions,
                executed=episode.executed,
                **images,
            )
            rows = [np.concatenate(list(frames), axis=1) for frames in episode.images.values()]
            Image.fromarray(np.concatenate(rows)).save(self.folder / f"{name}.png")


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "").strip().lower() in ("1", "true", "yes", "on")
