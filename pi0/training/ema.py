"""A running average of a policy's weights: what acts, is scored and is saved."""

from __future__ import annotations

import torch

from pi0 import PI0Policy


class AveragedPolicy:
    """Exponential moving average of a policy (Polyak and Juditsky 1992).

    Args:
        policy: the policy in training, whole; it may be sharded afterwards, the average stays whole.
        decay: share of the average kept at each update, 0 to 1; 0 follows the policy itself.
    """

    def __init__(self, policy: PI0Policy, decay: float):
        self._trained = policy
        self.decay = decay
        self.policy = policy.copy().eval()

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the policy; to be called after each optimizer step, by all ranks."""
        pairs = [
            (average, weight)
            for average, weight in zip(self.policy.parameters(), self._trained.parameters(), strict=True)
            if weight.requires_grad
        ]
        # A DTensor; to import it just to ask for it would take a second and a half.
        if hasattr(pairs[0][1], "full_tensor"):
            for average, weight in pairs:  # one after another: only one is whole at a time
                average.lerp_(weight.full_tensor(), 1.0 - self.decay)
        else:
            torch._foreach_lerp_(*map(list, zip(*pairs, strict=True)), 1.0 - self.decay)
