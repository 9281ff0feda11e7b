"""How many steps each worker collects, where better workers collect more."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

LEAST, MOST = 0.5, 2.0  # times the mean


def priorities(scores: Sequence[tuple[int, float]], workers: int) -> np.ndarray:
    """Share of the steps of each worker, with mean 1: by its mean score in the last episodes, from 0.5 to 2."""
    means = np.array(
        [
            np.mean([score for number, score in scores if number == worker] or [np.nan])
            for worker in range(workers)
        ]
    )
    if np.isnan(means).all():
        return np.ones(workers)
    means = np.where(np.isnan(means), np.nanmean(means), means)
    spread = means.max() - means.min()
    if spread == 0:
        return np.ones(workers)
    shares = LEAST + (MOST - LEAST) * (means - means.min()) / spread
    return _with_mean_one(shares)


def _with_mean_one(shares: np.ndarray) -> np.ndarray:
    """Scale shares to a mean of 1, and keep each from 0.5 to 2."""
    low, high = 0.0, 4.0
    for _ in range(60):  # the mean rises with the factor
        factor = (low + high) / 2
        low, high = (factor, high) if np.clip(factor * shares, LEAST, MOST).mean() < 1 else (low, factor)
    return np.clip(high * shares, LEAST, MOST)
