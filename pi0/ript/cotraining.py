"""Demonstrations that are learned from beside practice, so that what they taught is not unlearned."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pi0 import PI0Policy
from pi0.data import DataError, DemonstrationSet, open_demonstrations
from pi0.data.chunks import Chunks
from pi0.data.recorded_chunks import demonstrations_of_tasks, load_chunks
from pi0.libero.episodes import ROBOT
from pi0.libero.rendering import CAMERAS
from pi0.libero.suites import Task
from pi0.model.network import POSITIVE
from pi0.ript.cfg_adapter import WeightedChunks
from pi0.ript.config import Config


class Cotraining:
    """Chunks of demonstrations, some of which are added to what each iteration collected.

    Args:
        chunks: to draw from.
        count: drawn for an iteration, with replacement.
        weight: of each beside practised chunks, which weigh as much as their advantage.
    """

    def __init__(self, chunks: Chunks, count: int, weight: float):
        self._chunks = chunks
        self._count = count
        self._weight = weight

    def draw(self, generator: torch.Generator) -> WeightedChunks:
        """What this iteration learns of them; decided by `generator` alone."""
        index = torch.randint(len(self._chunks), (self._count,), generator=generator)
        weights = torch.full((self._count,), self._weight)
        return WeightedChunks(self._chunks[index], weights, torch.full((self._count,), POSITIVE))


def find_demonstrations(
    path: str, gripper: str | None, policy: PI0Policy, tasks: Sequence[Task]
) -> tuple[DemonstrationSet, list[int]]:
    """The data set at `path`, and which of its demonstrations are of `tasks`; `gripper` as for opening it.

    Raises:
        DataError: it cannot be read, or shows other tasks or cameras.
    """
    recorded = open_demonstrations(path, gripper=gripper)
    cameras = [name for name in policy.config.cameras if name in CAMERAS]
    if set(recorded.cameras) != set(cameras):
        raise DataError(
            f"algo.cotraining_path = {path!r} was seen by {', '.join(recorded.cameras)}; the policy "
            f"looks through {', '.join(cameras)}"
        )
    by_task = demonstrations_of_tasks(recorded, tasks, len(recorded))
    return recorded, [index for found in by_task.values() for index in found]


def load_cotraining(config: Config, policy: PI0Policy, tasks: Sequence[Task]) -> Cotraining | None:
    """The demonstrations of `tasks` that the configuration asks for, in memory; None where it asks for none.

    Raises:
        DataError: the data set cannot be read, or shows other tasks or cameras.
    """
    algo = config.algo
    if algo.cotraining_path is None:
        return None
    recorded, indices = find_demonstrations(algo.cotraining_path, algo.cotraining_gripper, policy, tasks)
    chunks = load_chunks(
        recorded,
        indices,
        robot=ROBOT,
        chunk=policy.config.action_horizon,
        frame_every=config.task.replan_steps,
        image_size=config.task.image_size or policy.config.image_size,
    )
    print(f"co-training: {len(chunks)} chunks of {len(indices)} demonstrations in {algo.cotraining_path}")
    return Cotraining(chunks, algo.cotraining_chunks, algo.cotraining_weight)
