"""Statistics of a data set's features as LeRobot writes them beside its data.

Each feature has min, max, mean, std, count and five quantiles (huggingface/lerobot v0.6.1,
src/lerobot/datasets/compute_stats.py). LeRobot estimates those of images from a sample, and merges the quantiles of
episodes by their extremes. Here all are exact; those of images come from counts of each grey level.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}

Statistics = dict[str, list]


def number_statistics(values: np.ndarray) -> Statistics:
    """Statistics of numbers [T] or vectors [T, D] over time; lists of 1 or D."""
    flat = np.asarray(values, np.float64).reshape(len(values), -1)
    statistics = {"min": flat.min(0), "max": flat.max(0), "mean": flat.mean(0), "std": flat.std(0)}
    statistics |= dict(zip(QUANTILES, np.quantile(flat, list(QUANTILES.values()), axis=0), strict=True))
    # Integers and booleans keep their kind where LeRobot keeps it.
    kind = {"b": bool, "i": int}.get(np.asarray(values).dtype.kind, float)
    extremes = {name: statistics[name].astype(kind) for name in ("min", "max")}
    return {name: part.tolist() for name, part in (statistics | extremes).items()} | {"count": [len(flat)]}


def count_levels(frames: np.ndarray) -> np.ndarray:
    """How often each grey level occurs in frames uint8 [F, height, width, 3], by colour: int64 [3, 256]."""
    levels = np.zeros((3, 256), np.int64)
    for frame in frames:  # one at a time: counting takes eight times the memory of a frame
        for colour in range(3):
            levels[colour] += np.bincount(frame[..., colour].ravel(), minlength=256)
    return levels


def level_statistics(levels: np.ndarray, frames: int) -> Statistics:
    """Statistics of the colours of `frames` frames, in [0, 1], from `count_levels`; lists [3, 1, 1]."""
    grey = np.arange(256) / 255
    shares = levels / levels.sum(axis=1, keepdims=True)
    mean = shares @ grey
    cumulative = levels.cumsum(axis=1)
    statistics = {
        "min": grey[(levels > 0).argmax(axis=1)],
        "max": grey[255 - (levels[:, ::-1] > 0).argmax(axis=1)],
        "mean": mean,
        "std": np.sqrt(shares @ grey**2 - mean**2),
    }
    for name, quantile in QUANTILES.items():
        statistics[name] = grey[(cumulative >= quantile * cumulative[:, -1:]).argmax(axis=1)]
    return {name: part.reshape(3, 1, 1).tolist() for name, part in statistics.items()} | {"count": [frames]}


class DatasetStatistics:
    """Collects what statistics of a whole data set need: all numbers, and counts of the images' grey levels."""

    def __init__(self) -> None:
        self._numbers: dict[str, list[np.ndarray]] = {}
        self._levels: dict[str, np.ndarray] = {}
        self._frames = 0

    def add(
        self, numbers: Mapping[str, np.ndarray], images: Mapping[str, Sequence | np.ndarray]
    ) -> dict[str, Statistics]:
        """Add an episode, numbers [T, ...] and frames [T, h, w, 3]; return its own statistics, by feature."""
        own = {}
        for name, values in numbers.items():
            self._numbers.setdefault(name, []).append(values)
            own[name] = number_statistics(values)
        for name, frames in images.items():
            levels = count_levels(np.asarray(frames))
            self._levels[name] = self._levels.get(name, 0) + levels
            own[name] = level_statistics(levels, len(frames))
        self._frames += len(next(iter(numbers.values())))
        return own

    def total(self) -> dict[str, Statistics]:
        """Statistics of all episodes so far."""
        whole = {name: number_statistics(np.concatenate(parts)) for name, parts in self._numbers.items()}
        return whole | {name: level_statistics(levels, self._frames) for name, levels in self._levels.items()}
