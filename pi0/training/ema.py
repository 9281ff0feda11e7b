"""A running average of a module's weights: what acts, is scored and is saved."""

from __future__ import annotations

from typing import Generic, TypeVar

import torch
from torch import nn

Module = TypeVar("Module", bound=nn.Module)


class AveragedModule(Generic[Module]):
    """Exponential moving average of a module's trained weights (Polyak and Juditsky 1992).

    Args:
        trained: the module in training; it may be sharded, its average stays whole.
        average: a copy of it, which becomes the average; weights that are not trained may be the same memory.
        decay: share of the average kept at each update, 0 to 1; 0 follows the module itself.
    """

    def __init__(self, trained: Module, average: Module, decay: float):
        self._trained = trained
        self.module = average
        self.decay = decay

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the module; to be called after each optimizer step, by all ranks."""
        pairs = [
            (average, weight)
            for average, weight in zip(self.module.parameters(), self._trained.parameters(), strict=True)
            if weight.requires_grad
        ]
        # A DTensor; to import it just to ask for it would take a second and a half.
        if hasattr(pairs[0][1], "full_tensor"):
            for average, weight in pairs:  # one after another: only one is whole at a time
                average.lerp_(weight.full_tensor(), 1.0 - self.decay)
        else:
            torch._foreach_lerp_(*map(list, zip(*pairs, strict=True)), 1.0 - self.decay)
