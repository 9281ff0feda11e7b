"""Batches for the agent, from episodes in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pi0 import PI0Policy
from pi0.acrlpd.caches import ObservationCaches
from pi0.acrlpd.episodes import RecordedEpisode
from pi0.acrlpd.replay import ReplayBuffer
from pi0.base.errors import InputError
from pi0.ranks.collectives import gather, rank_and_world_size
from pi0.training.state import Place


class ACRLPDDataLoader:
    """Draws batches of windows (docs/acrlpd.md, "Batch").

    In a distributed run each rank has episodes of its own. A batch is divided among the ranks in proportion to their
    windows, so that all windows are equally likely; all ranks change their episodes together.

    Attributes:
        replay: the episodes.
        caches: what is kept of their observations.

    Args:
        policy: prepares observations and normalises actions.
        features: what critics see, if it never changes; None: it is not kept, and each batch has images.
        capacity: windows in memory.
        seed: of the order of windows.
    """

    def __init__(self, policy: PI0Policy, features: nn.Module | None, capacity: int, seed: int = 0):
        self._policy = policy
        self.replay = ReplayBuffer(capacity)
        self.caches = ObservationCaches(policy, features)
        self.generator = torch.Generator().manual_seed(seed + 1_000_003 * rank_and_world_size()[0])
        self._windows: list[int] = []  # of each rank

    def add(self, episodes: list[RecordedEpisode]) -> None:
        """Add whole episodes."""
        self.caches.follow(self.replay, self.replay.add(episodes))
        self._windows = gather(len(self.replay))

    def sample_batch(self, batch_size: int, images: bool = True) -> dict[str, Any]:
        """This rank's part of a batch; without `images` it is for critics, whose features and candidates are kept."""
        own = shares(batch_size, self._windows)[rank_and_world_size()[0]]
        return self.batch(self.replay.draw(own, self.generator), images)

    def batch(self, rows: Tensor, images: bool = True) -> dict[str, Any]:
        """The batch of some windows, by their rows."""
        windows, caches = self.replay.windows[rows], self.caches
        raw = self.replay.states[windows.seen]
        kept = bool(caches.features.shape[1])
        made: dict[str, Any] = {
            "observations": caches.observations(self.replay, windows.seen, images or not kept),
            "next_observations": caches.observations(
                self.replay, windows.then, (images and caches.candidates is None) or not kept
            ),
            "actions": self._policy.normalize_actions(windows.actions, raw),
        }
        if kept:
            made["features"] = caches.features[windows.seen]
            made["next_features"] = caches.features[windows.then]
        for name in ("rewards", "masks", "valid", "terminals", "next_terminal", "sequence_mask", "success"):
            made[name] = getattr(windows, name)
        if caches.candidates is not None:
            made["candidates"] = caches.candidates[windows.seen].transpose(0, 1)
            made["next_candidates"] = caches.candidates[windows.then].transpose(0, 1)
        return made

    def state_dict(self) -> dict[str, Any]:
        """Episodes, candidates and the random stream; inputs and features follow from the episodes."""
        return {
            "replay": self.replay.state_dict(),
            "candidates": self.caches.candidates,
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`."""
        self.replay.load_state_dict(state["replay"])
        self.caches.begin(self.replay, state["candidates"])
        self.generator.set_state(state["generator"])
        self._windows = gather(len(self.replay))

    def join_state_dicts(self, states: list[dict[str, Any]], place: Place) -> None:
        """Continue with this rank's share of the earlier ranks' episodes; candidates are drawn again."""
        episodes = [each for state in states for each in state["replay"]["episodes"]]
        share = episodes[place.rank :: place.world_size]
        self.replay.load_state_dict({"added": len(share), "episodes": share})
        self.caches.begin(self.replay, None)
        self._windows = gather(len(self.replay))

    def get_dataset_statistics(self) -> dict[str, Any]:
        """Episodes, solved ones, windows, steps, bytes."""
        return self.replay.statistics()


def shares(total: int, sizes: Sequence[int]) -> list[int]:
    """`total` divided in proportion to `sizes`, at least 1 for each.

    Raises:
        InputError: a size is 0, or the total is less than there are sizes.
    """
    if not sizes or min(sizes) < 1:
        raise InputError("the buffer of a rank holds no episode; record more rollouts (data.rollouts)")
    if total < len(sizes):
        raise InputError(f"a batch of {total} windows is too small for {len(sizes)} ranks (data.batch_size)")
    ends = np.cumsum([0, *sizes]) * (total / sum(sizes))
    found = np.diff(np.round(ends)).astype(int)
    while found.min() < 1:  # a rank with few windows
        found[found.argmin()] += 1
        found[found.argmax()] -= 1
    return found.tolist()
