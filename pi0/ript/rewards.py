"""Scores of episodes."""

from __future__ import annotations

from pi0.libero.episodes import Episode


class BinarySuccessReward:
    """1.0 when LIBERO's goal held at the end of the episode, else 0.0."""

    def __call__(self, episode: Episode) -> float:
        return 1.0 if episode.success else 0.0
