"""Episodes made up for tests of what happens after the rollouts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pi0.libero.episodes import Episode, Rollout
from pi0.libero.init_states import InitStatePool
from pi0.libero.stepping import InitState
from pi0.libero.suites import Task

CAMERAS = ("base_0_rgb", "left_wrist_0_rgb")
TASK = Task("libero_spatial", 3, "pick_up_the_bowl", "pick up the black bowl", "", "")


def write_chunks(file: Path, episodes: Sequence[Episode]) -> None:
    """The states [N, 8] in which a policy was asked, and its chunks [N, H, 7], for policies that repeat them."""
    np.savez(
        file,
        states=np.concatenate([episode.states for episode in episodes]),
        actions=np.concatenate([episode.actions for episode in episodes]),
    )


def make_episode(success: bool, executed: list[int], seed: int, chunk: int = 10, index: int = 0) -> Episode:
    """An episode with random observations and actions."""
    random = np.random.default_rng(seed)
    count = len(executed)
    init = InitState(np.zeros(1), np.zeros((0, 7)))
    return Episode(
        rollout=Rollout(TASK, init, index, (seed,), horizon=220, settle_steps=0),
        images={camera: random.integers(0, 255, (count, 64, 64, 3), dtype=np.uint8) for camera in CAMERAS},
        states=random.standard_normal((count, 8)).astype(np.float32),
        actions=random.uniform(-1, 1, (count, chunk, 7)).astype(np.float32),
        executed=np.array(executed),
        success=success,
    )


def states_of(task, count: int) -> InitStatePool:
    """States told apart by their number."""
    return InitStatePool(
        task, "training", [InitState(np.array([float(n)]), np.zeros((0, 7))) for n in range(count)], {}
    )
