"""Co-training: the policy also learns from demonstrations, so that it does not forget what they taught."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pi0 import PI0Policy
from pi0.data import DataError, DemonstrationSet, FeatureNames, open_demonstrations
from pi0.data.chunks import Chunks
from pi0.data.recorded_chunks import demonstrations_of_tasks, load_chunks
from pi0.libero.episodes import ROBOT
from pi0.libero.rendering import CAMERAS
from pi0.libero.suites import Task
from pi0.model.network import POSITIVE
from pi0.ript.cfg_adapter import WeightedChunks
from pi0.ript.config import AlgoConfig, Config


class Cotraining:
    """Chunks of demonstrations; each iteration adds some of them to its own chunks.

    Args:
        chunks: all chunks.
        count: chunks drawn in an iteration, with replacement.
        weight: weight of each; the weight of practised chunks is their advantage.
    """

    def __init__(self, chunks: Chunks, count: int, weight: float):
        self._chunks = chunks
        self._count = count
        self._weight = weight

    def draw(self, generator: torch.Generator) -> WeightedChunks:
        """The chunks of this iteration; only `generator` decides them."""
        index = torch.randint(len(self._chunks), (self._count,), generator=generator)
        weights = torch.full((self._count,), self._weight)
        return WeightedChunks(self._chunks[index], weights, torch.full((self._count,), POSITIVE))


def find_demonstrations(
    algo: AlgoConfig, policy: PI0Policy, tasks: Sequence[Task]
) -> tuple[DemonstrationSet, list[int]]:
    """The data set of the configuration, and indices of its demonstrations of `tasks`.

    Raises:
        DataError: it cannot be read, contradicts LIBERO's robot, or has other tasks or cameras.
    """
    assert algo.cotraining_path is not None
    names = {"names": FeatureNames.parse(algo.cotraining_features)} if algo.cotraining_features else {}
    recorded = open_demonstrations(
        algo.cotraining_path, algo.cotraining_gripper, ROBOT, algo.cotraining_accept, **names
    )
    cameras = [name for name in policy.config.cameras if name in CAMERAS]
    if set(recorded.cameras) != set(cameras):
        raise DataError(
            f"algo.cotraining_path = {algo.cotraining_path!r} has images of {', '.join(recorded.cameras)}; the policy "
            f"uses {', '.join(cameras)}"
        )
    by_task = demonstrations_of_tasks(
        recorded, tasks, len(recorded), failures="failures" in algo.cotraining_accept
    )
    return recorded, [index for found in by_task.values() for index in found]


def load_cotraining(config: Config, policy: PI0Policy, tasks: Sequence[Task]) -> Cotraining | None:
    """Load the configured demonstrations of `tasks` into memory; None if the configuration has none.

    Raises:
        DataError: the data set cannot be read, or has other tasks or cameras.
    """
    algo = config.algo
    if algo.cotraining_path is None:
        return None
    recorded, indices = find_demonstrations(algo, policy, tasks)
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
