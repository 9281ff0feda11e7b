"""For debugging: every rollout's video and the policy's observations, written when a rollout finishes.

Environment variables switch it on: `PI0_DEBUG_SAVE_VIDEO=true` for videos, `DEBUG_SAVE_PROCESSED=1` for
observations, `PI0_DEBUG_DIR` for the folder (outputs/debug by default).

A file NAME.npz holds the environment's observations (`images/CAMERA` uint8 [T, h, w, 3], `states`, `prompt`), the
network's inputs made of them (`network/...`: `PI0Policy.prepare`), and `actions` and `executed`. NAME.png shows the
network's images, a row for each camera.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from pi0.base.paths import INSTALLED, REPO_ROOT
from pi0.base.video import write_video
from pi0.libero.episodes import Episode, Rollout

if TYPE_CHECKING:
    from pi0.libero.rollouts import Policy

VIDEO_EVERY = 2  # control steps from one frame to the next
VIDEO_FPS = 10  # real time: 20 control steps a second


class DebugOutput:
    """Writes what the environment variables ask for; without them it does nothing."""

    def __init__(self) -> None:
        self.videos = _is_on("PI0_DEBUG_SAVE_VIDEO")
        self.observations = _is_on("DEBUG_SAVE_PROCESSED")
        here = Path.cwd() if INSTALLED else REPO_ROOT
        self.folder = Path(os.environ.get("PI0_DEBUG_DIR") or here / "outputs" / "debug")

    def prepare(self, rollout: Rollout) -> Rollout:
        """The rollout, with recording on if videos are requested."""
        return replace(rollout, record=rollout.record or VIDEO_EVERY) if self.videos else rollout

    def save(self, episode: Episode, policy: Policy) -> None:
        """Write the requested files of an episode of `policy`; their name identifies the episode."""
        if not (self.videos or self.observations):
            return
        rollout = episode.rollout
        key = "-".join(str(number) for number in rollout.noise_key)
        outcome = "failed" if episode.failure else "success" if episode.success else "failure"
        name = (
            f"{rollout.task.suite_label}-task{rollout.task.index}-state{rollout.init_index}-{key}-{outcome}"
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.videos and episode.video:
            write_video(self.folder / f"{name}.mp4", episode.video, VIDEO_FPS)
        if self.observations and len(episode.states):
            images = {f"images/{camera}": frames for camera, frames in episode.images.items()}
            prompt = rollout.task.prompt
            given = policy.prepared(episode.images, episode.states, [prompt] * len(episode.states))
            np.savez_compressed(
                self.folder / f"{name}.npz",
                allow_pickle=False,
                prompt=np.array(prompt),
                states=episode.states,
                actions=episode.actions,
                executed=episode.executed,
                **images,
                **{f"network/{key}": array for key, array in given.items()},
            )
            rows = [
                np.concatenate(list(frames.transpose(0, 2, 3, 1)), axis=1)
                for key, frames in given.items()
                if key.startswith("images/")
            ]
            picture = np.round(127.5 * (np.concatenate(rows) + 1)).astype(np.uint8)
            Image.fromarray(picture).save(self.folder / f"{name}.png")


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "").strip().lower() in ("1", "true", "yes", "on")
