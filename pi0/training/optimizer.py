"""The optimizer of a policy's weights and the schedule of its learning rate, as configured."""

from __future__ import annotations

import torch

from pi0 import PI0Policy
from pi0.ript.config import OptimizerConfig


def make_optimizer(policy: PI0Policy, lr: float, optimizer: OptimizerConfig) -> torch.optim.Optimizer:
    """An optimizer over all trainable weights."""
    weights = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    if optimizer.type == "sgd":
        return torch.optim.SGD(
            weights, lr, momentum=optimizer.beta1, weight_decay=optimizer.weight_decay, fused=True
        )
    kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[optimizer.type]
    return kind(
        weights, lr, (optimizer.beta1, optimizer.beta2), weight_decay=optimizer.weight_decay, fused=True
    )


def make_schedule(
    optimizer: torch.optim.Optimizer, final_share: float, iterations: int
) -> torch.optim.lr_scheduler.LinearLR:
    """A learning rate that falls in equal steps to `final_share` of itself in the last of `iterations`.

    `step()` is to be called after each iteration that has learned; those that had nothing to learn from do not count.
    """
    return torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, final_share, max(1, iterations - 1))
