"""The replay buffer: chunks of the last iterations, from which updates learn."""

from __future__ import annotations

import itertools

from pi0.ript.cfg_adapter import WeightedChunks
from pi0.training.state import Place


class Replay:
    """The chunks of the last iterations.

    Args:
        iterations: how many iterations it keeps.
        nothing: no chunks, in the right shapes, for a batch without any.

    Attributes:
        parts: the chunks of each iteration, oldest first; None for an iteration without any.
    """

    def __init__(self, iterations: int, nothing: WeightedChunks):
        self._iterations = iterations
        self._nothing = nothing
        self.parts: list[WeightedChunks | None] = []

    def add(self, chunks: WeightedChunks | None) -> None:
        """Add the chunks of an iteration; the oldest iteration beyond the number is dropped."""
        self.parts = [*self.parts, chunks][-self._iterations :]

    def batch(self) -> WeightedChunks:
        """All chunks, oldest first; may be empty."""
        return WeightedChunks.cat([self._nothing, *(part for part in self.parts if part is not None)])

    def state_dict(self) -> list[dict | None]:
        """The chunks of each iteration; they never change, so their tensors are not copied."""
        return [None if part is None else part.state_dict() for part in self.parts]

    def load_state_dict(self, state: list[dict | None]) -> None:
        """Continue from `state_dict()`."""
        self.parts = [None if part is None else WeightedChunks.from_state(part) for part in state]

    def join_state_dicts(self, states: list[list[dict | None]], place: Place) -> None:
        """Continue with this rank's share of the earlier ranks' chunks."""
        share = states[place.rank :: place.world_size]
        # From the newest back: a rank that joined later has fewer iterations.
        newest_first = itertools.zip_longest(*(state[::-1] for state in share))
        self.parts = [_joined(parts) for parts in newest_first][::-1]


def _joined(parts: tuple[dict | None, ...]) -> WeightedChunks | None:
    filled = [WeightedChunks.from_state(part) for part in parts if part is not None]
    return WeightedChunks.cat(filled) if filled else None
