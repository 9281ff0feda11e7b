"""Statistics of state and actions in openpi's norm_stats.json, and normalisation by them.

It follows openpi, src/openpi/transforms.py and training/config.py. Before actions are learned, the state of the
chunk's observation is subtracted (`delta_actions`, only for old published policies), then they are normalised and
zero-padded to the network's width. Sampled actions pass the inverse steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pi0.base.errors import InputError, MissingFileError
from pi0.base.files import read_json
from pi0.model.config import POSE_DIM

# Added to the divisor in both directions, as in openpi. LeRobot (src/lerobot/processor/normalize_processor.py)
# adds 1e-8 to the deviation only when it divides, and to a range of quantiles only if the range is 0.
EPSILON = 1e-6
# A divisor below EPSILON belongs to a feature that never changed in the data. It is raised to this value (of rad, m, or
# a controller's full range), or a change of a millimetre would reach the network as a thousand.
FLOOR = 0.02
# Beyond this float32 cannot tell two values of a feature from each other.
LARGEST = 1e6


class NormStatsError(InputError, ValueError):
    """The normalisation statistics cannot be used."""


@dataclass(frozen=True)
class Stats:
    """Statistics of one vector, float32 [D] each. The quantiles may be absent."""

    mean: np.ndarray
    std: np.ndarray
    q01: np.ndarray | None = None
    q99: np.ndarray | None = None

    @classmethod
    def of(cls, samples: np.ndarray) -> Stats:
        """Statistics of samples [..., D]."""
        flat = np.asarray(samples, np.float64).reshape(-1, np.shape(samples)[-1])
        q01, q99 = np.quantile(flat, [0.01, 0.99], axis=0)
        return cls(*(np.asarray(v, np.float32) for v in (flat.mean(0), flat.std(0), q01, q99)))


@dataclass(frozen=True)
class NormStats:
    """Statistics of the robot's state and actions.

    Attributes:
        state, actions: of each.
        source: names them in errors.
        floors: what was raised because a feature is constant (`with_floors`), a line each.
    """

    state: Stats
    actions: Stats
    source: str = "the normalisation statistics"
    floors: tuple[str, ...] = ()

    @classmethod
    def of(cls, states: np.ndarray, actions: np.ndarray) -> NormStats:
        """Statistics of recorded states [..., 8] and actions [..., 7].

        Quantiles are exact. openpi (src/openpi/shared/normalize.py) and LeRobot take them from histograms,
        openpi's of 5000 bins, so theirs differ by about a 5000th of the range.
        """
        return cls(Stats.of(states), Stats.of(actions))

    def to_dict(self) -> dict:
        """The content of norm_stats.json; openpi reads "norm_stats" and ignores the rest."""
        parts = {
            part: {k: v.tolist() for k, v in vars(getattr(self, part)).items() if v is not None}
            for part in ("state", "actions")
        }
        return {"norm_stats": parts} | ({"floors": list(self.floors)} if self.floors else {})

    def with_floors(self, *divisors: str, smallest_std: float = 0.0) -> NormStats:
        """The same with divisors that a network can use; `floors` says what was raised.

        A feature that never changed has no deviation and no range of quantiles. Its deviation becomes `FLOOR`, its range
        twice that. q01 stays. So a constant value becomes 0 by deviation and -1 by quantiles, as in openpi, which has
        no floor.

        Args:
            divisors: "std", "quantiles" or both.
            smallest_std: other deviations below this value are raised to it.
        """
        floors = list(self.floors)
        parts: dict[str, Any] = {}
        for part in ("state", "actions"):
            stats: Stats = getattr(self, part)
            std, q01, q99 = stats.std, stats.q01, stats.q99
            if "std" in divisors:
                smallest = np.where(std < EPSILON, max(FLOOR, smallest_std), smallest_std)
                std = np.maximum(std, smallest.astype(np.float32))
                floors += [
                    f"{part} feature {i}: deviation {stats.std[i]:.3g} raised to {std[i]:.3g}"
                    for i in np.flatnonzero(std > stats.std)
                ]
            if "quantiles" in divisors and q01 is not None and q99 is not None:
                constant = q99 - q01 < EPSILON
                q99 = np.where(constant, q01 + np.float32(2 * FLOOR), q99)
                floors += [
                    f"{part} feature {i}: q01 and q99 are both {q01[i]:.3g}, q99 raised to {q99[i]:.3g}"
                    for i in np.flatnonzero(constant)
                ]
            parts[part] = replace(stats, std=std, q99=q99)
        return replace(self, **parts, floors=tuple(floors))


def normalize(values: Tensor, stats: Stats, quantiles: bool) -> Tensor:
    """Values [..., D] to z-scores; with `quantiles` the 1st percentile becomes -1 and the 99th becomes 1.

    Neither clips the values.
    """
    if quantiles:
        low, high = _tensors(values, stats.q01, stats.q99)
        return (values - low) / (high - low + EPSILON) * 2 - 1
    mean, std = _tensors(values, stats.mean, stats.std)
    return (values - mean) / (std + EPSILON)


def unnormalize(values: Tensor, stats: Stats, quantiles: bool) -> Tensor:
    """The inverse of `normalize`."""
    if quantiles:
        low, high = _tensors(values, stats.q01, stats.q99)
        return (values + 1) / 2 * (high - low + EPSILON) + low
    mean, std = _tensors(values, stats.mean, stats.std)
    return values * (std + EPSILON) + mean


def _tensors(like: Tensor, *vectors: np.ndarray | None) -> list[Tensor]:
    return [torch.as_tensor(vector, device=like.device) for vector in vectors]


def subtract_state(actions: Tensor, states: Tensor) -> Tensor:
    """Chunks [..., H, 7] relative to the states [..., 8] at which they were chosen; the gripper stays."""
    return torch.cat([actions[..., :POSE_DIM] - _pose(states), actions[..., POSE_DIM:]], -1)


def add_state(actions: Tensor, states: Tensor) -> Tensor:
    """The inverse of `subtract_state`."""
    return torch.cat([actions[..., :POSE_DIM] + _pose(states), actions[..., POSE_DIM:]], -1)


def _pose(states: Tensor) -> Tensor:
    return states[..., None, :POSE_DIM]


def learned_delta_actions(stats: NormStats, stated: bool | None) -> bool:
    """Whether the state was subtracted from the actions (`subtract_state`); the statistics must agree.

    LIBERO's actions are themselves changes of pose. Still, openpi's pi0_libero and pi0_fast_libero learned them
    with the state subtracted as well. openpi's pi05_libero and policies that LeRobot trained without
    `use_relative_actions` did not (openpi, src/openpi/training/config.py: extra_delta_transform). A policy that is
    run the wrong way moves but never succeeds. LIBERO's actions lie in [-1, 1], and so do their means. With the
    state subtracted, the means lie around the negative mean of the state, whose first rotation is about 3 rad.

    Args:
        stats: statistics of a robot whose first six features of state and actions are a pose.
        stated: the configuration's value. None: the statistics decide; if they fit both, it is False as in
            openpi's newer policies.

    Raises:
        NormStatsError: the statistics belong to the other kind, or to neither.
    """
    actions, state = (part.mean[:POSE_DIM] for part in (stats.actions, stats.state))
    plain = bool((np.abs(actions) <= 1).all())
    relative = len(actions) == len(state) == POSE_DIM and bool((np.abs(actions + state) <= 1).all())
    fits = {False: plain, True: relative}
    chosen = (relative and not plain) if stated is None else stated
    if not fits[chosen]:
        mend = (
            f"set delta_actions to {str(not chosen).lower()} in config.json"
            if fits[not chosen]
            else ("take the statistics of the data that the policy was trained on")
        )
        raise NormStatsError(
            f"{stats.source}: mean actions {np.round(actions, 3).tolist()} cannot be those of LIBERO actions "
            f"{'minus the state' if chosen else 'in [-1, 1]'} (delta_actions is {str(stated).lower()}); {mend}"
        )
    return chosen


def require_quantiles(stats: NormStats) -> None:
    """Raise `NormStatsError` for statistics without the 1st and 99th percentile."""
    for name in ("state", "actions"):
        part = getattr(stats, name)
        if part.q01 is None or part.q99 is None:
            raise NormStatsError(
                f"{stats.source}: norm_stats.{name} has no q01 and q99, by which this policy normalises "
                "(use_quantile_norm); python -m pi0.norm_stats computes them from demonstrations"
            )


def load_norm_stats(path: str | Path, state_dim: int, action_dim: int) -> NormStats:
    """Read norm_stats.json for a robot of `state_dim` and `action_dim` features.

    Longer vectors are cut: published statistics may be padded to the network's action_dim.

    Raises:
        FileNotFoundError: no such file.
        NormStatsError: not JSON, a missing key, or a vector that is too short, not of finite numbers, or not possible as
            statistics; the message names file, key and feature.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingFileError(f"normalisation statistics {path} not found")
    content = read_json(path, NormStatsError)
    parts = content.get("norm_stats") if isinstance(content, dict) else None
    if not isinstance(parts, dict):
        raise NormStatsError(f'{path}: no "norm_stats" object at the top')
    stats = norm_stats_from(parts, state_dim, action_dim, path)
    floors = content.get("floors", [])
    if not isinstance(floors, list) or not all(isinstance(line, str) for line in floors):
        raise NormStatsError(f"{path}: floors is not a list of lines")
    return replace(stats, floors=tuple(floors))


def norm_stats_from(parts: dict, state_dim: int, action_dim: int, path: Path) -> NormStats:
    """The statistics in `parts`, the object under "norm_stats"; errors are those of `load_norm_stats` and name `path`."""
    return NormStats(
        state=_read_stats(parts, "state", state_dim, path),
        actions=_read_stats(parts, "actions", action_dim, path),
        source=str(path),
    )


def _read_stats(parts: dict, part: str, dim: int, path: Path) -> Stats:
    if not isinstance(parts.get(part), dict):
        raise NormStatsError(f"{path}: missing norm_stats.{part}")
    vectors = {}
    for name in ("mean", "std", "q01", "q99"):
        key = f"norm_stats.{part}.{name}"
        value = parts[part].get(name)
        if value is None:
            if name in ("mean", "std"):
                raise NormStatsError(f"{path}: missing {key}")
            continue
        try:
            vector = np.asarray(value, np.float32)
        except (TypeError, ValueError) as error:
            raise NormStatsError(f"{path}: {key} is not a list of numbers") from error
        if vector.ndim != 1 or len(vector) < dim:
            raise NormStatsError(
                f"{path}: {key} has shape {list(vector.shape)}; the robot has {dim} features"
            )
        vectors[name] = vector[:dim]
    stats = Stats(**vectors)
    for name, unfit, why in _impossible(stats):
        if unfit.any():
            feature = int(np.flatnonzero(unfit)[0])
            found = ", ".join(f"{key} {vector[feature]:.6g}" for key, vector in vectors.items())
            raise NormStatsError(
                f"{path}: norm_stats.{part}.{name}, feature {feature}: {why} ({found}); restore the file, or compute "
                "it again: python -m pi0.norm_stats"
            )
    return stats


def _impossible(stats: Stats) -> Iterator[tuple[str, np.ndarray, str]]:
    """Key, features that cannot be so, bool [D], and why."""
    for name, vector in vars(stats).items():
        if vector is not None:
            yield name, ~np.isfinite(vector), "the value is not finite"
            yield name, np.abs(vector) > LARGEST, f"the value is beyond {LARGEST:.0e}"
    yield "std", stats.std < 0, "a deviation is not below zero"
    if stats.q01 is not None and stats.q99 is not None:
        yield "q01", stats.q01 > stats.q99, "q01 is above q99"
        moves = stats.q99 - stats.q01 > 2.5 * FLOOR  # more than a floor makes of a constant
        yield "std", (stats.std < EPSILON) & moves, "a deviation of 0, but q01 is not q99"
