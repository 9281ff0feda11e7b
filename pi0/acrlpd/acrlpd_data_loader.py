"""Batches for the agent, from episodes in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pi0 import PI0Policy
from pi0.acrlpd.caches import ObservationCaches
from pi0.acrlpd.episodes import RecordedEpisode
from pi0.acrlpd.replay import ReplayBuffer
from pi0.training.state import Place


class ACRLPDDataLoader:
    """Draws batches of windows (docs/acrlpd.md, "Batch").

    Attributes:
        replay: the episodes.
        caches: what is kept of their observations.

    Args:
        policy: prepares observations and normalises actions.
        features: what critics see, fixed.
        capacity: windows in memory.
        seed: of the order of windows.
    """

    def __init__(self, policy: PI0Policy, features: nn.Module, capacity: int, seed: int = 0):
        self._policy = policy
        self.replay = ReplayBuffer(capacity)
        self.caches = ObservationCaches(policy, features)
        self.generator = torch.Generator().manual_seed(seed)

    def add(self, episodes: list[RecordedEpisode]) -> None:
        """Add whole episodes."""
        self.caches.follow(self.replay, self.replay.add(episodes))

    def sample_batch(self, batch_size: int, images: bool = True) -> dict[str, Any]:
        """A batch; without `images` it is for critics, whose features and candidates are kept."""
        return self.batch(self.replay.draw(batch_size, self.generator), images)

    def batch(self, rows: Tensor, images: bool = True) -> dict[str, Any]:
        """The batch of some windows, by their rows."""
        windows, caches = self.replay.windows[rows], self.caches
        raw = self.replay.states[windows.seen]
        made: dict[str, Any] = {
            "observations": caches.observations(self.replay, windows.seen, images),
            "next_observations": caches.observations(
                self.replay, windows.then, images and caches.candidates is None
            ),
            "actions": self._policy.normalize_actions(windows.actions, raw),
            "features": caches.features[windows.seen],
            "next_features": caches.features[windows.then],
        }
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

    def join_state_dicts(self, states: list[dict[str, Any]], place: Place) -> None:
        """Continue with this rank's share of the earlier ranks' episodes; candidates are drawn again."""
        share = states[place.rank :: place.world_size]
        episodes = [each for state in share for each in state["replay"]["episodes"]]
        self.replay.load_state_dict({"added": len(episodes), "episodes": episodes})
        self.caches.begin(self.replay, None)

    def get_dataset_statistics(self) -> dict[str, Any]:
        """Episodes, solved ones, windows, steps, bytes."""
        return self.replay.statistics()
