"""Batches for the agent, from episodes in memory: those of practice, and a pool of those in files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pi0 import PI0Policy
from pi0.acrlpd.caches import ObservationCaches
from pi0.acrlpd.config import RLTrainConfig
from pi0.acrlpd.episodes import RecordedEpisode
from pi0.acrlpd.files import RecordedFiles
from pi0.acrlpd.replay import ReplayBuffer
from pi0.training.state import Place


def create_acrlpd_data_loader(
    config: RLTrainConfig, policy: PI0Policy, features: nn.Module
) -> ACRLPDDataLoader:
    """The loader of a run; its files are opened and checked, and none of their episodes is in memory yet.

    Raises:
        InputError: as `RecordedFiles`.
    """
    data = config.data
    files = RecordedFiles(config, policy) if data.datasets else None
    return ACRLPDDataLoader(
        policy, features, data.buffer_windows, config.training.seed, files, data.online_share
    )


class ACRLPDDataLoader:
    """Draws batches of windows (docs/acrlpd.md, "Batch").

    Rows of windows count those of practice first, then those of the files.

    Attributes:
        replay: the episodes of practice.
        caches: what is kept of their observations.
        pool, pool_caches: the same of the files' episodes that are in memory.
        files: the files; None: there are none.

    Args:
        policy: prepares observations and normalises actions.
        features: what critics see, fixed.
        capacity: windows of practice in memory.
        seed: of the order of windows.
        files: where other episodes come from; `refresh_memory_pool` takes the first of them.
        online_share: share of a batch that is drawn from practice, where both are there; None: windows are drawn evenly
            from all.
    """

    def __init__(
        self,
        policy: PI0Policy,
        features: nn.Module,
        capacity: int,
        seed: int = 0,
        files: RecordedFiles | None = None,
        online_share: float | None = None,
    ):
        self._policy = policy
        self.replay = ReplayBuffer(capacity)
        self.caches = ObservationCaches(policy, features)
        self.files = files
        self.pool = ReplayBuffer(1)
        self.pool_caches = ObservationCaches(policy, features)
        self._online_share = online_share
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        """Windows of both."""
        return len(self.replay) + len(self.pool)

    def add(self, episodes: list[RecordedEpisode]) -> None:
        """Add whole episodes of practice."""
        self.caches.follow(self.replay, self.replay.add(episodes))

    def refresh_memory_pool(self) -> None:
        """Take the next whole episodes of the files into memory, in place of those that are there.

        Nothing changes where all are there already, and without files.
        """
        if self.files is not None and (self.files.pools > 1 or not len(self.pool)):
            self._fill_pool(self.files.next_pool(), None)

    def refresh_candidates(self, sample: Callable[[dict[str, Any]], Tensor]) -> None:
        """Draw new candidate chunks for all observations, as `ObservationCaches.refresh`."""
        for replay, caches in self._sources():
            caches.refresh(replay, sample)

    def sample_batch(self, batch_size: int, images: bool = True) -> dict[str, Any]:
        """A batch; without `images` it is for critics, whose features and candidates are kept."""
        return self.batch(self._draw(batch_size), images)

    def _draw(self, count: int) -> Tensor:
        practised, filed = len(self.replay), len(self.pool)
        if not filed:
            return self.replay.draw(count, self.generator)
        if not practised:
            return self.pool.draw(count, self.generator)
        if self._online_share is None:
            return torch.randint(practised + filed, (count,), generator=self.generator)
        online = round(self._online_share * count)
        rows = self.pool.draw(count - online, self.generator)
        return torch.cat([self.replay.draw(online, self.generator), practised + rows])

    def batch(self, rows: Tensor, images: bool = True) -> dict[str, Any]:
        """The batch of some windows, by their rows; those of practice come first."""
        kept = all(caches.candidates is not None for _, caches in self._sources())
        first, parts = 0, []
        for replay, caches in self._sources():
            own = rows[(rows >= first) & (rows < first + len(replay))] - first
            first += len(replay)
            if len(own):
                parts.append(self._batch_of(replay, caches, own, images, kept))
        return parts[0] if len(parts) == 1 else _joined(parts)

    def _batch_of(
        self, replay: ReplayBuffer, caches: ObservationCaches, rows: Tensor, images: bool, kept: bool
    ) -> dict[str, Any]:
        """The batch of windows of one buffer, with candidates if they are `kept`."""
        windows = replay.windows[rows]
        made: dict[str, Any] = {
            "observations": caches.observations(replay, windows.seen, images),
            "next_observations": caches.observations(replay, windows.then, images and not kept),
            "actions": self._policy.normalize_actions(windows.actions, replay.states[windows.seen]),
            "features": caches.features[windows.seen],
            "next_features": caches.features[windows.then],
        }
        for name in ("rewards", "masks", "valid", "terminals", "next_terminal", "sequence_mask", "success"):
            made[name] = getattr(windows, name)
        if kept:
            assert caches.candidates is not None
            made["candidates"] = caches.candidates[windows.seen].transpose(0, 1)
            made["next_candidates"] = caches.candidates[windows.then].transpose(0, 1)
        return made

    def _sources(self) -> list[tuple[ReplayBuffer, ObservationCaches]]:
        """What holds windows, practice first."""
        both = ((self.replay, self.caches), (self.pool, self.pool_caches))
        return [source for source in both if len(source[0])]

    def _fill_pool(self, episodes: list[RecordedEpisode], candidates: Tensor | None) -> None:
        self.pool = ReplayBuffer(max(1, sum(map(len, episodes))))
        self.pool.add(episodes)
        self.pool_caches.begin(self.pool, candidates)

    def state_dict(self) -> dict[str, Any]:
        """Episodes of practice, place in the files, candidates and the random stream; the rest follows from them."""
        return {
            "replay": self.replay.state_dict(),
            "candidates": self.caches.candidates,
            "generator": self.generator.get_state(),
            "files": None if self.files is None else self.files.state_dict(),
            "pool_candidates": self.pool_caches.candidates,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`.

        Raises:
            CheckpointError: the files have changed.
        """
        self.replay.load_state_dict(state["replay"])
        self.caches.begin(self.replay, state["candidates"])
        self.generator.set_state(state["generator"])
        if self.files is not None:
            self._fill_pool(self.files.load_state_dict(state["files"]), state["pool_candidates"])

    def join_state_dicts(self, states: list[dict[str, Any]], place: Place) -> None:
        """Continue with this rank's share of the earlier ranks' episodes; candidates are drawn again."""
        share = states[place.rank :: place.world_size]
        episodes = [each for state in share for each in state["replay"]["episodes"]]
        self.replay.load_state_dict({"added": len(episodes), "episodes": episodes})
        self.caches.begin(self.replay, None)
        if self.files is not None:
            self._fill_pool(self.files.load_state_dict(states[0]["files"]), None)

    def get_dataset_statistics(self) -> dict[str, Any]:
        """Episodes, solved ones, windows, steps, bytes: of what is in memory."""
        practised, filed = self.replay.statistics(), self.pool.statistics()
        return {name: practised[name] + filed[name] for name in practised}


def _joined(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Batches one behind the other; candidates have their windows in the second place."""
    return {
        name: _joined([part[name] for part in parts])
        if isinstance(parts[0][name], dict)
        else torch.cat([part[name] for part in parts], 1 if name.endswith("candidates") else 0)
        for name in parts[0]
    }
