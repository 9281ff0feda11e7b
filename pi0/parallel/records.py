"""What is recorded of an update (`pi0.parallel.metrics` says what each number means)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pi0.parallel.actor import Filled
from pi0.parallel.collected import Progress


def of_slices(slices: Sequence[Filled], workers: int, update: int) -> dict[str, Any]:
    """Metrics of the slices that an update learned from.

    Args:
        slices: one or more.
        workers: number of workers.
        update: number of the update.
    """
    episodes = [episode for filled in slices for episode in filled.episodes]
    scores = [episode.score for episode in episodes]
    by_worker = [0] * workers
    for filled in slices:
        by_worker[filled.worker] += len(filled.episodes)
    return {
        "transitions": sum(filled.steps for filled in slices),
        "finished": len(episodes),
        "scores": scores,
        "score": {"mean": _mean(scores), "min": min(scores), "max": max(scores)} if scores else None,
        "episode_steps": _mean([episode.length for episode in episodes]) if episodes else None,
        "lag": update - min(filled.version for filled in slices),
        "workers": len(slices),
        "worker_episodes": by_worker,
        "worker_seconds": {
            name: _mean([filled.seconds[name] for filled in slices]) for name in ("game", "policy", "all")
        },
    }


def of_progress(progress: Progress) -> dict[str, Any]:
    """Metrics of all that was collected until now."""
    return {
        "steps": progress.steps,
        "episodes": progress.episodes,
        "recent_score": progress.score,
        "best_score": progress.best.score if progress.best else None,
        "dropped": progress.dropped,
    }


def speeds(metrics: Mapping[str, Any], before: Mapping[str, Any] | None, skip: int) -> dict[str, float]:
    """Speeds since the update before, from the counts of both; `skip` is the frames of a step."""
    seconds, steps, episodes = (
        metrics[name] - (before[name] if before else 0) for name in ("seconds", "steps", "episodes")
    )
    a_second = 1 / max(seconds, 1e-9)
    return {
        "steps_per_s": steps * a_second,
        "frames_per_s": steps * skip * a_second,
        "episodes_per_hour": 3600 * episodes * a_second,
    }


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))
