"""The learner of a run: policy, loss, optimizer, and the data of updates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from pi0 import PI0Policy, pick_device
from pi0.policy.acting import ActingPolicy, NoisyPolicy
from pi0.policy.critics import BestOfPolicy, load_critic
from pi0.ript.cfg_adapter import PI0_CFG_Adapter, WeightedChunks
from pi0.ript.config import Config
from pi0.ript.replay import Replay
from pi0.ript.rollout_generator import Collection
from pi0.training.ema import AveragedModule


class MoreChunks(Protocol):
    """Other chunks for the updates (`pi0.ript.cotraining`)."""

    def draw(self, generator: torch.Generator) -> WeightedChunks:
        """The chunks of an iteration; only `generator` decides them."""


def load_policy(config: Config) -> PI0Policy:
    """Load the configured policy, with an optimality condition if guidance needs one.

    Raises:
        CheckpointError, MissingFileError: `policy_path` is not a valid policy folder.
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
    """A policy in training, and all that its updates need.

    Attributes:
        adapter: the loss of the policy.
        optimizer: optimizer of the policy's weights.
        schedule: schedule of the learning rate; it steps after each iteration that has learned.
        average: the running average of the weights, which acts, is evaluated and is saved.
        replay: the chunks of the last iterations.
        generator: random generator of augmentation, of the flow's noise and times, and of the order of chunks.
        cotraining: demonstrations for co-training; None: none.
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
        """Weight the chunks of an iteration's episodes by their advantages, and keep those with a weight other than 0."""
        acted = self.average.module
        self.replay.add(self.adapter.weigh(collection.episodes, collection.advantages, acted))


def acting_policies(config: Config, learner: Learner) -> tuple[ActingPolicy, Callable[[int], ActingPolicy]]:
    """The averaged policy as it is scored, and as it practises in an iteration, given its number.

    If there is a critic it practises with the best of several chunks in the first `algo.critic_iterations`, and in mode
    ratio with noise in the flow's steps.

    Raises:
        CheckpointError, MissingFileError: `algo.critic_path` is no critic's folder, or of another robot.
    """
    algo, policy = config.algo, learner.average.module
    weight = algo.guidance_weight if algo.mode == "guidance" else None
    scored = ActingPolicy(policy, weight)
    if algo.mode == "ratio":
        noisy = NoisyPolicy(policy, algo.noise_level)
        return scored, lambda step: noisy
    if algo.critic_path is None:
        return scored, lambda step: scored
    critic = load_critic(algo.critic_path, policy.device)
    best = BestOfPolicy(policy, *critic, algo.num_action_samples, weight)
    until = algo.critic_iterations
    return scored, lambda step: best if until is None or step < until else scored
