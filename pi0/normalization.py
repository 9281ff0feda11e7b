"""Normalisation statistics of state and actions, in openpi's norm_stats.json."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pi0.errors import InputError, MissingFileError

EPSILON = 1e-6  # added to the standard deviation, as openpi does


class NormStatsError(InputError, ValueError):
    """Normalisation statistics that cannot be used."""


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
    """Statistics of the robot's state and of its actions."""

    state: Stats
    actions: Stats

    @classmethod
    def of(cls, states: np.ndarray, actions: np.ndarray) -> NormStats:
        """Statistics of recorded states [..., 8] and actions [..., 7]."""
        return cls(Stats.of(states), Stats.of(actions))

    def to_dict(self) -> dict:
        """The content of norm_stats.json."""
        return {
            "norm_stats": {
                part: {k: v.tolist() for k, v in vars(getattr(self, part)).items() if v is not None}
                for part in ("state", "actions")
            }
        }


def load_norm_stats(path: str | Path, state_dim: int, action_dim: int) -> NormStats:
    """Read norm_stats.json for a robot of `state_dim` and `action_dim` features.

    Longer statistics are cut: published ones may be padded to the network's action_dim.

    Raises:
        FileNotFoundError: no such file.
        NormStatsError: not JSON, a missing key, a vector that is too short, not numbers or negative; names file and key.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingFileError(f"normalisation statistics {path} not found")
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise NormStatsError(f"{path}: not valid JSON: {error}") from error
    parts = content.get("norm_stats") if isinstance(content, dict) else None
    if not isinstance(parts, dict):
        raise NormStatsError(f'{path}: no "norm_stats" object at the top')
    return norm_stats_from(parts, state_dim, action_dim, path)


def norm_stats_from(parts: dict, state_dim: int, action_dim: int, path: Path) -> NormStats:
    """The statistics in `parts`, the object under "norm_stats"; refuses as `load_norm_stats` does, naming `path`."""
    return NormStats(
        state=_read_stats(parts, "state", state_dim, path),
        actions=_read_stats(parts, "actions", action_dim, path),
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
        if not np.isfinite(vector).all() or (name == "std" and (vector < 0).any()):
            raise NormStatsError(f"{path}: {key} holds values that are not finite or below zero")
        vectors[name] = vector[:dim]
    return Stats(**vectors)
