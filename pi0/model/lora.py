"""Low-rank adaptation (Hu et al. 2021): a frozen matrix learns by a product of two thin ones added to it.

It acts on every matrix of a Gemma layer, attention and MLP. Ranks and scale are openpi's
(src/openpi/models/gemma.py: gemma_2b_lora has rank 16, gemma_300m_lora 32; lora.py: scale alpha / rank, which is
1 for both). Two things differ. openpi gives each attention head its own thin matrices; here a matrix has one
pair for all its heads. openpi draws both at random; here the second starts at zero, so that a policy acts as
before until it has learned something.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

A, B = "lora_a", "lora_b"  # last parts of parameter names
START_STD = 0.01  # standard deviation of the first matrix at the start, as in openpi
RANKS = (16, 32)  # openpi's ranks for the prefix's transformer and the action expert


class LoRALinear(nn.Linear):
    """A linear map without bias, plus `lora_b @ lora_a`.

    Args:
        linear: the map to adapt; its weight is shared, not copied.
        rank: rank of the product that is added.
    """

    def __init__(self, linear: nn.Linear, rank: int):
        weight = linear.weight
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight = weight
        # They are trained, so they are in float32; the frozen weight may be in bfloat16.
        options = {"device": weight.device, "dtype": torch.promote_types(weight.dtype, torch.float32)}
        self.lora_a = nn.Parameter(torch.empty(rank, linear.in_features, **options))
        self.lora_b = nn.Parameter(torch.empty(linear.out_features, rank, **options))
        nn.init.normal_(self.lora_a, std=START_STD)
        nn.init.zeros_(self.lora_b)

    def forward(self, x: Tensor) -> Tensor:
        low = F.linear(x, self.lora_a.to(x.dtype))
        return super().forward(x) + F.linear(low, self.lora_b.to(x.dtype))

    def merged(self) -> nn.Linear:
        """The same map as one matrix, in the type of the thin matrices."""
        result = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        with torch.no_grad():
            result.weight = nn.Parameter(self.weight.to(self.lora_a.dtype) + self.lora_b @ self.lora_a)
        return result


def is_lora(name: str) -> bool:
    """Whether a parameter of this name is one of the thin matrices."""
    return name.endswith((A, B))
