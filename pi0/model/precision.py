"""What is computed in the types of its weights even where autocast would take lower ones."""

import torch


def without_autocast(device: torch.device) -> torch.autocast:
    """A context for what openpi keeps in float32: projections of state and actions, flow time, patches."""
    return torch.autocast(device.type, enabled=False)
