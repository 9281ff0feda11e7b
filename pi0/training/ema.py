"""A running average of a module's weights; the average acts, is evaluated and is saved."""

from __future__ import annotations

from typing import Generic, TypeVar

import torch
from torch import nn

Module = TypeVar("Module", bound=nn.Module)


class AveragedModule(Generic[Module]):
    """Exponential moving average of a module's trained weights (Polyak and Juditsky 1992).

    Args:
        trained: the module in training; it may be sharded.
        average: a whole copy of it, which becomes the average; frozen weights may share memory with it. Its weights
            may have a wider type: bfloat16 is too coarse for an average that moves by a thousandth of a difference.
        decay: share of the average that an update keeps, 0 to 1; at 0 it equals the module.
    """

    def __init__(self, trained: Module, average: Module, decay: float):
        self._trained = trained
        self.module = average
        self.decay = decay

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the module; all ranks call it after each optimizer step."""
        pairs = [
            (average, weight)
            for average, weight in zip(self.module.parameters(), self._trained.parameters(), strict=True)
            if weight.requires_grad
        ]
        # This is a DTensor; to import that class only for this test would take a second and a half.
        if hasattr(pairs[0][1], "full_tensor"):
            for average, weight in pairs:  # one after another, so that only one is whole at a time
                average.lerp_(weight.full_tensor().to(average.dtype), 1.0 - self.decay)
        else:
            averages = [average for average, _ in pairs]
            torch._foreach_lerp_(averages, [w.to(a.dtype) for a, w in pairs], 1.0 - self.decay)
