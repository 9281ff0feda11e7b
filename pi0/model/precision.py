"""Computations that keep the types of their weights, even under autocast."""

import torch


def without_autocast(device: torch.device) -> torch.autocast:
    """A context for what openpi computes in float32: projections of state and actions, flow time, patches."""
    return torch.autocast(device.type, enabled=False)
