"""Advantages and value targets of a slice: generalised advantage estimation, and V-trace."""

from __future__ import annotations

import numpy as np


def gae(
    rewards: np.ndarray,
    values: np.ndarray,
    ended: np.ndarray,
    bootstraps: np.ndarray,
    last_value: float,
    gamma: float,
    gae_lambda: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Generalised advantage estimation (Schulman et al. 2016).

    An episode that was truncated goes on beyond its end with the value of its last observation; a terminated one is
    worth nothing more.

    Args:
        rewards, values: float32 [T].
        ended: whether an episode ended with a step, bool or uint8 [T].
        bootstraps: value of the observation after an episode's last step where it was truncated, else 0, float32 [T].
        last_value: value of the observation after the slice.

    Returns:
        Advantages and returns (advantages + values), float32 [T].
    """
    goes_on = 1.0 - ended.astype(np.float32)
    following = np.append(values[1:], np.float32(last_value)) * goes_on + bootstraps * ended
    deltas = rewards + gamma * following - values
    advantages, running = np.empty_like(deltas), 0.0
    for step in range(len(deltas) - 1, -1, -1):
        running = advantages[step] = deltas[step] + gamma * gae_lambda * goes_on[step] * running
    return advantages, advantages + values


def vtrace(
    rewards: np.ndarray,
    values: np.ndarray,
    ended: np.ndarray,
    bootstraps: np.ndarray,
    last_value: float,
    log_ratios: np.ndarray,
    gamma: float,
    gae_lambda: float = 1.0,
    rho_limit: float = 1.0,
    c_limit: float = 1.0,
) -> tuple[np.ndarray, np.ndarray]:
    """V-trace (Espeholt et al. 2018, equation 1, remark 2 for lambda), for slices that an older policy collected.

    Args:
        values: under the current value function.
        log_ratios: log-probability of each action under the current policy, less that under the one that acted.
        Others as for `gae`.

    Returns:
        Advantages (with the importance weight) and value targets, float32 [T]. On-policy and with lambda 1 a target
        is the n-step return to the slice's end.
    """
    goes_on = 1.0 - ended.astype(np.float32)
    ratios = np.exp(log_ratios.astype(np.float64))
    rho, c = np.minimum(ratios, rho_limit), gae_lambda * np.minimum(ratios, c_limit)
    after = np.append(values[1:], np.float32(last_value)) * goes_on + bootstraps * ended
    deltas = rho * (rewards + gamma * after - values)
    targets, running = np.empty(len(values)), 0.0
    for step in range(len(values) - 1, -1, -1):
        running = deltas[step] + gamma * c[step] * goes_on[step] * running
        targets[step] = values[step] + running
    following = np.append(targets[1:], last_value) * goes_on + bootstraps * ended
    advantages = rho * (rewards + gamma * following - values)
    return advantages.astype(np.float32), targets.astype(np.float32)
