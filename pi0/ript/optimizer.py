"""The optimizer of a policy's weights, as configured."""

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
