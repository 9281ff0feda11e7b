"""What learns in a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from pi0 import PI0Policy, pick_device
from pi0.ript.cfg_adapter import PI0_CFG_Adapter, WeightedChunks
from pi0.ript.config import Config
from pi0.ript.replay import Replay
from pi0.ript.rollout_generator import Collection
from pi0.training.ema import AveragedModule


class MoreChunks(Protocol):
    """Chunks that are learned from beside practice (`pi0.ript.cotraining`)."""

    def draw(self, generator: torch.Generator) -> WeightedChunks:
        """Those of an iteration, decided by `generator` alone."""


def load_policy(config: Config) -> PI0Policy:
    """The policy to improve, as configured, with an optimality condition if guidance needs one.

    Raises:
        CheckpointError, MissingFileError: `policy_path` is no policy folder that fits.
    """
    policy = PI0Policy.from_pretrained(
        config.policy_path,
        pick_device(config.device),
        getattr(torch, config.dtype),
        config.norm_stats_path,
        config.training.trainable,
    )
    policy.compiled = config.compile
    if config.algo.mode == "guidance":
        policy.enable_guidance()
    return policy


@dataclass(frozen=True)
class Learner:
    """A policy that learns, and all that its updates need.

    Attributes:
        adapter: the loss of the policy.
        optimizer: of the policy's weights.
        schedule: of the learning rate; a step for each iteration that has learned.
        average: the running average of the weights, which acts, is scored and is saved.
        replay: the chunks of the last iterations.
        generator: of augmentation, of the flow's noise and times, and of the order of chunks.
        cotraining: demonstrations that are learned from beside practice.
    """

    adapter: PI0_CFG_Adapter
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    average: AveragedModule[PI0Policy]
    replay: Replay
    generator: torch.Generator
    cotraining: MoreChunks | None = None

    @property
    def policy(self) -> PI0Policy:
        """The policy in training."""
        return self.adapter.policy

    @property
    def lr(self) -> float:
        """The learning rate of the next update."""
        return self.schedule.get_last_lr()[0]

    def take_in(self, collection: Collection) -> None:
        """Weigh the chunks of an iteration's episodes by their advantages, and keep those that teach something."""
        self.replay.add(self.adapter.weigh(collection.episodes, collection.advantages))
