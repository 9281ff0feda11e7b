"""Euler steps of the flow with noise, each a Gaussian with a log-probability: what a policy gradient needs.

The flow from noise to actions is deterministic once its first noise is drawn, so its actions have no density that is
cheap to compute. Flow-GRPO (Liu et al. 2025, arXiv 2505.05470) replaces the flow's differential equation by a stochastic
one that has the same marginal distributions at every time; Flow-SDE of piRL (Chen et al. 2025, arXiv 2510.25889) does so
for pi0. This module follows them. In openpi's direction of time (t = 1 is noise, t = 0 actions) a step of length d from
t with velocity v is

    x' = x - v d - sigma^2 / (2 t) (x + (1 - t) v) d + sigma sqrt(d) e,    sigma = level sqrt(t / (1 - t))

with e standard normal. x + (1 - t) v is the noise that the policy finds in x. At t = 1, where sigma has no bound, the
denominator is d, as if the step began at its end; so it is in both papers' code. With K steps, of which k lie behind,
t = 1 - k/K and d = 1/K: then the factor of that noise is level^2 / (2 k), and the deviation level sqrt((K - k) / (k K)),
with 1 for k = 0 in both denominators.
"""

from __future__ import annotations

import math

from torch import Tensor


def step_mean(x: Tensor, velocity: Tensor, step: int | Tensor, steps: int, level: float) -> Tensor:
    """Mean of x' in one of `steps` equal Euler steps; at level 0 it is the plain Euler step, to the bit.

    Args:
        x: the step's beginning, float [..., H, A].
        velocity: the policy's velocity there, in the same shape.
        step: number of the step, from 0 at t = 1; a tensor must be broadcast with x.
        steps: how many there are.
        level: of the noise, 0 or more.
    """
    mean = x - velocity / steps
    return mean if level == 0 else mean - level**2 / (2 * _at_least_1(step)) * (x + step / steps * velocity)


def step_std(step: int | Tensor, steps: int, level: float) -> float | Tensor:
    """Standard deviation of x' in a step, of each element."""
    return level * ((steps - step) / (_at_least_1(step) * steps)) ** 0.5


def log_prob(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Log-density of each element of x under independent Gaussians."""
    return -0.5 * ((x - mean) / std).square() - std.log() - 0.5 * math.log(2 * math.pi)


def _at_least_1(step: int | Tensor) -> int | Tensor:
    return step.clamp(min=1) if isinstance(step, Tensor) else max(step, 1)
