"""Leave-one-out advantages (RLOO: Kool et al. 2019; in RIPT: Tan et al. 2025, eq. 3)."""

from __future__ import annotations

from collections.abc import Sequence


def leave_one_out_advantages(rewards: Sequence[float]) -> list[float]:
    """Each reward minus the mean of the other rewards in its group.

    Args:
        rewards: one score for each rollout of a group, in the order of the rollouts.
    Returns:
        r_i - mean(r_j, j != i); exactly 0.0 for every member of a unanimous group of zeros or ones.
    Raises:
        ValueError: there are fewer than two rewards.
    """
    if len(rewards) < 2:
        raise ValueError(f"a group needs at least 2 rollouts to compare, it has {len(rewards)}")
    return [
        reward - sum(others) / len(others)
        for index, reward in enumerate(rewards)
        for others in [[*rewards[:index], *rewards[index + 1 :]]]
    ]
