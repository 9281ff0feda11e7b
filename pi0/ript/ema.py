"""A running average of a policy's weights: what acts, is scored and is saved."""

from __future__ import annotations

import copy

import torch

from pi0 import PI0Policy


class AveragedPolicy:
    """Exponential moving average of a policy (Polyak and Juditsky 1992).

    Args:
        policy: the policy in training.
        decay: share of the average kept at each update, 0 to 1; 0 follows the policy itself.
    """

    def __init__(self, policy: PI0Policy, decay: float):
        self._trained = policy
        self.decay = decay
        self.policy = copy.deepcopy(policy).eval()

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the policy; to be called after each optimizer step."""
        averages, weights = list(self.policy.parameters()), list(self._trained.parameters())
        torch._foreach_lerp_(averages, weights, 1.0 - self.decay)
