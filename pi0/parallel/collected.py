"""What a run has collected until now, as a part of a checkpoint."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from pi0.parallel.actor import Episode, Filled

RECENT = 100  # episodes of the score that is shown


class Progress:
    """What has been collected until now, as a part of a checkpoint; everything that decides what is asked for next.

    Attributes:
        states, numbers: where each worker's next slice begins, and how many it has filled.
        generations: how often each worker has begun without continuing anything.
        behaviour: the weights with which the slices were asked for that the next update learns from; None: the
            newest.
        episodes, steps: collected, of all workers.
        scores: the last raw scores, oldest first, as (worker, score).
        best: the episode with the best score.
        dropped: slices that were too old to learn from.
    """

    def __init__(self, workers: int):
        self.states: list[Mapping[str, Any]] = []
        self.numbers = [0] * workers
        self.generations = [0] * workers
        self.behaviour: np.ndarray | None = None
        self.episodes = self.steps = self.dropped = 0
        self.scores: deque[tuple[int, float]] = deque(maxlen=RECENT)
        self.best: Episode | None = None

    def take(self, filled: Filled) -> None:
        """Count a slice."""
        self.steps += filled.steps
        for episode in filled.episodes:
            self.episodes += 1
            self.scores.append((filled.worker, episode.score))
            if self.best is None or episode.score > self.best.score:
                self.best = episode

    @property
    def score(self) -> float | None:
        """Mean raw score of the last episodes; None before the first has ended."""
        return float(np.mean([score for _, score in self.scores])) if self.scores else None

    def state_dict(self) -> dict[str, Any]:
        """A copy of plain values and tensors."""
        best = self.best
        return {
            "states": [{name: _plain(value) for name, value in state.items()} for state in self.states],
            "numbers": list(self.numbers),
            "generations": list(self.generations),
            "behaviour": None if self.behaviour is None else torch.from_numpy(self.behaviour),
            "counts": [self.episodes, self.steps, self.dropped],
            "scores": [list(pair) for pair in self.scores],
            "best": best and {name: _plain(value) for name, value in vars(best).items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`."""
        self.states = [{name: _restored(value) for name, value in each.items()} for each in state["states"]]
        self.numbers, self.generations = list(state["numbers"]), list(state["generations"])
        self.behaviour = None if state["behaviour"] is None else state["behaviour"].numpy()
        self.episodes, self.steps, self.dropped = state["counts"]
        self.scores = deque(((number, score) for number, score in state["scores"]), maxlen=RECENT)
        best = state["best"]
        self.best = best and Episode(**{name: _restored(value) for name, value in best.items()})

    def join_state_dicts(self, states: list[dict], place: Any) -> None:
        """Never called: one process learns, so its number never changes."""
        raise NotImplementedError


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return torch.from_numpy(np.frombuffer(value, np.uint8).copy())
    return torch.from_numpy(value.copy()) if isinstance(value, np.ndarray) else value


def _restored(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return value.numpy().tobytes() if value.ndim == 1 else value.numpy()
