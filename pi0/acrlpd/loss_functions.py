"""The formulas of ACRLPD as plain functions of tensors; none of them knows a network or a batch's layout.

Shapes: B windows, H control steps of a window, K critics, S action samples.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

Aggregation = Literal["min", "mean"]


def chunk_target(
    rewards: Tensor,
    masks: Tensor,
    valid: Tensor,
    next_values: Tensor,
    discount: float,
    value_range: tuple[float, float] | None = None,
) -> Tensor:
    """What a critic of chunks learns: sum over i < n of discount^i r_i, plus discount^n times the next value.

    n is the number of valid steps. The next value counts only if the last of them did not terminate the episode. qc
    multiplies the loss by `valid[-1]`, so a window in whose middle an episode ends is dropped; here it counts in full.

    Args:
        rewards: float [B, H], not discounted.
        masks: float [B, H], 0 from the step that terminated the episode, else 1.
        valid: float [B, H], 1 for steps that were carried out, which come first.
        next_values: float [B], value of the observation after the window; anything where it does not count.
        discount: per control step.
        value_range: lowest and highest value that the rewards allow; the target is clamped to it. None: it is not.

    Returns:
        Float [B]. A window without a valid step has the next value.
    """
    steps = torch.arange(rewards.shape[1], device=rewards.device)
    powers = torch.as_tensor(discount, dtype=rewards.dtype, device=rewards.device) ** steps
    collected = (rewards * valid * powers).sum(1)
    count = valid.sum(1)
    last = masks.gather(1, (count.long() - 1).clamp(min=0)[:, None]).squeeze(1)
    alive = torch.where(count > 0, last, torch.ones_like(last))
    after = discount**count * alive
    target = collected + torch.where(after > 0, after * next_values, torch.zeros_like(next_values))
    return target if value_range is None else target.clamp(*value_range)


def aggregate(values: Tensor, how: Aggregation) -> Tensor:
    """One value from those of all critics, [K, ...] to [...]: their minimum or their mean."""
    return values.amin(0) if how == "min" else values.mean(0)


def possible_values(lowest: float, highest: float, horizon: int, discount: float) -> tuple[float, float]:
    """Lowest and highest value if each reward is between `lowest` and `highest` and an episode has `horizon` steps.

    A reward of 0 may come at any step, so 0 is in the range.
    """
    total = horizon if discount == 1 else (1 - discount**horizon) / (1 - discount)
    return min(0.0, lowest * total), max(0.0, highest * total)


def advantage_weights(advantages: Tensor, temperature: Tensor | float) -> Tensor:
    """Weights exp(A / temperature) with mean 1 over the batch, [B]; the greatest advantage is subtracted first."""
    return torch.softmax(advantages / temperature, 0) * len(advantages)


def effective_sample_size(weights: Tensor) -> Tensor:
    """(sum w)^2 / sum w^2, from 1 to B: how many windows weights [B] really learn from (Kish 1965)."""
    return weights.sum() ** 2 / weights.square().sum()


def weights_divergence(advantages: Tensor, temperature: Tensor | float) -> Tensor:
    """KL divergence, nats, of the weighted from the uniform distribution over the batch."""
    log_shares = torch.log_softmax(advantages / temperature, 0)
    return (log_shares.exp() * log_shares).sum() + math.log(len(advantages))


def temperature_loss(advantages: Tensor, log_temperature: Tensor, divergence: float) -> Tensor:
    """Dual of the bound on `weights_divergence`: it is least where the divergence is `divergence`.

    With temperature b and N advantages A: b * divergence + b * log(1/N sum exp(A / b)) (Peters et al. 2010, relative
    entropy policy search, eq. 6; Abdolmaleki et al. 2018 learn b by gradient steps on it).
    """
    temperature = log_temperature.exp()
    scaled = advantages.detach() / temperature
    return temperature * (divergence + torch.logsumexp(scaled, 0) - math.log(len(advantages)))
