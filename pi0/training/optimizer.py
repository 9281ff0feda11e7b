"""The configured optimizer of a module's weights, and the schedule of its learning rate."""

from __future__ import annotations

import torch
from torch import nn

from pi0.training.settings import OptimizerConfig


def make_optimizer(module: nn.Module, lr: float, optimizer: OptimizerConfig) -> torch.optim.Optimizer:
    """An optimizer of a module's trained weights (`requires_grad`); the module may be sharded."""
    weights = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if optimizer.type == "sgd":
        sharded = any(hasattr(weight, "full_tensor") for weight in weights)
        return torch.optim.SGD(
            weights,
            lr,
            momentum=optimizer.beta1,
            weight_decay=optimizer.weight_decay,
            fused=not sharded,  # PyTorch 2.13 has no fused SGD of shards
        )
    kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[optimizer.type]
    return kind(
        weights, lr, (optimizer.beta1, optimizer.beta2), weight_decay=optimizer.weight_decay, fused=True
    )


def make_schedule(
    optimizer: torch.optim.Optimizer, final_share: float, iterations: int
) -> torch.optim.lr_scheduler.LinearLR:
    """A learning rate that falls in equal steps to `final_share` of itself in the last of `iterations`.

    Call `step()` after each iteration that has learned; iterations without an update do not count.
    """
    return torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, final_share, max(1, iterations - 1))
