"""The independent reference for gradients."""

from collections.abc import Callable

import torch


def finite_difference(loss: Callable[[], torch.Tensor], weights: torch.Tensor, index: int) -> float:
    """Slope of the loss in one of `weights`, float64 [N], which the loss is computed from."""
    start, step = weights[index].item(), 1e-6
    with torch.no_grad():
        weights[index] = start + step
        above = loss()
        weights[index] = start - step
        below = loss()
        weights[index] = start
    return ((above - below) / (2 * step)).item()
