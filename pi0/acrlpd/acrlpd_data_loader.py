"""Batches for the agent, from episodes in memory: those of practice, and a pool of those in files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pi0 import PI0Policy
from pi0.acrlpd.caches import ObservationCaches
from pi0.acrlpd.config import RLTrainConfig
from pi0.acrlpd.episodes import RecordedEpisode
from pi0.acrlpd.files import RecordedFiles
from pi0.acrlpd.replay import ReplayBuffer
from pi0.base.errors import InputError
from pi0.ranks.collectives import gather, rank_and_world_size
from pi0.training.state import Place

# What a batch says of the time after its windows began.
FOLLOWED = (
    "rewards", "masks", "valid", "terminals", "next_terminal", "sequence_mask", "next_observations", "next_features",
    "next_candidates",
)  # fmt: skip


def create_acrlpd_data_loader(
    config: RLTrainConfig, policy: PI0Policy, features: nn.Module | None
) -> ACRLPDDataLoader:
    """The loader of a run; its files are opened and checked, and none of their episodes is in memory yet.

    Raises:
        InputError: as `RecordedFiles`.
    """
    data = config.data
    files = RecordedFiles(config, policy) if data.datasets else None
    return ACRLPDDataLoader(
        policy,
        features,
        data.buffer_windows,
        config.training.seed,
        files,
        data.online_share,
        data.shuffle_windows,
    )


class ACRLPDDataLoader:
    """Draws batches of windows (docs/acrlpd.md, "Batch").

    Rows of windows count those of practice first, then those of the files. In a distributed run each rank has episodes of
    its own. A batch is divided among the ranks in proportion to their windows, so that all windows are equally likely;
    all ranks change their episodes together.

    Attributes:
        replay: the episodes of practice.
        caches: what is kept of their observations.
        pool, pool_caches: the same of the files' episodes that are in memory.
        files: the files; None: there are none.

    Args:
        policy: prepares observations and normalises actions.
        features: what critics see, if it never changes; None: it is not kept, and each batch has images.
        capacity: windows of practice in memory.
        seed: of the order of windows.
        files: where other episodes come from; `refresh_memory_pool` takes the first of them.
        online_share: share of a batch that is drawn from practice, where both are there; None: windows are drawn evenly
            from all.
        shuffle_windows: a control: what followed is exchanged between the windows of a batch.
    """

    def __init__(
        self,
        policy: PI0Policy,
        features: nn.Module | None,
        capacity: int,
        seed: int = 0,
        files: RecordedFiles | None = None,
        online_share: float | None = None,
        shuffle_windows: bool = False,
    ):
        self._policy = policy
        self.replay = ReplayBuffer(capacity)
        self.caches = ObservationCaches(policy, features)
        self.files = files
        self.pool = ReplayBuffer(1)
        self.pool_caches = ObservationCaches(policy, features)
        self._online_share = online_share
        self._shuffle_windows = shuffle_windows
        self._rank, _ = rank_and_world_size()
        self.generator = torch.Generator().manual_seed(seed + 1_000_003 * self._rank)
        self._practised: list[int] = []  # windows of practice of each rank
        self._filed: list[int] = []  # windows of the files of each rank

    def __len__(self) -> int:
        """Windows of both."""
        return len(self.replay) + len(self.pool)

    def add(self, episodes: list[RecordedEpisode]) -> None:
        """Add whole episodes of practice."""
        self.caches.follow(self.replay, self.replay.add(episodes))
        self._count()

    def refresh_memory_pool(self) -> None:
        """Take the next whole episodes of the files into memory, in place of those that are there.

        Nothing changes where all are there already, and without files.
        """
        if self.files is not None and (self.files.pools > 1 or not sum(self._filed)):
            self._fill_pool(self.files.next_pool(), None)
            self._count()

    def count_to_refresh(self, moved: bool) -> int:
        """Observations for which `refresh_candidates` would draw."""
        return sum(len(replay.states) for replay, _ in self._to_refresh(moved))

    def refresh_candidates(self, sample: Callable[[dict[str, Any]], Tensor], moved: bool = True) -> None:
        """Draw candidate chunks, as `ObservationCaches.refresh`.

        Args:
            sample: gives [N, B, C, A] for observations of a batch.
            moved: the actor has moved, so all candidates are replaced; else only missing ones are drawn.
        """
        for replay, caches in self._to_refresh(moved):
            caches.refresh(replay, sample)

    def sample_batch(self, batch_size: int, images: bool = True) -> dict[str, Any]:
        """This rank's part of a batch; without `images` it is for critics, whose features and candidates are kept."""
        batch = self.batch(self._draw(batch_size), images)
        return exchanged(batch, self.generator) if self._shuffle_windows else batch

    def _draw(self, count: int) -> Tensor:
        practised, filed, share = self._practised, self._filed, self._online_share
        if share is None or not sum(practised) or not sum(filed):
            both = [sum(pair) for pair in zip(practised, filed, strict=True)]
            own = shares(count, both)[self._rank]
            return torch.randint(len(self), (own,), generator=self.generator)
        online = round(share * count)
        rows = []
        for source, first, number, sizes in (
            (self.replay, 0, online, practised),
            (self.pool, len(self.replay), count - online, filed),
        ):
            if number:
                own = shares(number, sizes)[self._rank]
                rows.append(first + source.draw(own, self.generator))
        return torch.cat(rows)

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
        seen = bool(caches.features.shape[1])  # whether features are kept
        made: dict[str, Any] = {
            "observations": caches.observations(replay, windows.seen, images or not seen),
            "next_observations": caches.observations(replay, windows.then, (images and not kept) or not seen),
            "actions": self._policy.normalize_actions(windows.actions, replay.states[windows.seen]),
        }
        for name in ("rewards", "masks", "valid", "terminals", "next_terminal", "sequence_mask", "success"):
            made[name] = getattr(windows, name)
        if seen:
            made["features"] = caches.features[windows.seen]
            made["next_features"] = caches.features[windows.then]
        if kept:
            assert caches.candidates is not None
            made["candidates"] = caches.candidates[windows.seen].transpose(0, 1)
            made["next_candidates"] = caches.candidates[windows.then].transpose(0, 1)
        return made

    def _sources(self) -> list[tuple[ReplayBuffer, ObservationCaches]]:
        """What holds windows, practice first."""
        both = ((self.replay, self.caches), (self.pool, self.pool_caches))
        return [source for source in both if len(source[0])]

    def _to_refresh(self, moved: bool) -> list[tuple[ReplayBuffer, ObservationCaches]]:
        return [source for source in self._sources() if moved or source[1].candidates is None]

    def _fill_pool(self, episodes: list[RecordedEpisode], candidates: Tensor | None) -> None:
        self.pool = ReplayBuffer(max(1, sum(map(len, episodes))))
        self.pool.add(episodes)
        self.pool_caches.begin(self.pool, candidates)

    def _count(self) -> None:
        counts = gather((len(self.replay), len(self.pool)))
        self._practised, self._filed = ([pair[place] for pair in counts] for place in (0, 1))

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
        self._count()

    def join_state_dicts(self, states: list[dict[str, Any]], place: Place) -> None:
        """Continue with this rank's share of all earlier ranks' episodes; candidates are drawn again."""
        episodes = [each for state in states for each in state["replay"]["episodes"]]
        share = episodes[place.rank :: place.world_size]
        self.replay.load_state_dict({"added": len(share), "episodes": share})
        self.caches.begin(self.replay, None)
        if self.files is not None:
            self._fill_pool(self.files.load_state_dict(states[0]["files"]), None)
        self._count()

    def get_dataset_statistics(self) -> dict[str, Any]:
        """Episodes, solved ones, windows, steps, bytes: of what is in memory."""
        practised, filed = self.replay.statistics(), self.pool.statistics()
        return {name: practised[name] + filed[name] for name in practised}


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


def exchanged(batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
    """A control: the batch in which each window is followed by what followed another one, drawn at random."""
    order = torch.randperm(len(batch["rewards"]), generator=generator)

    def pick(name: str, part: Any) -> Any:
        if isinstance(part, dict):
            return {key: pick(key, value) for key, value in part.items()}
        return part[:, order] if name == "next_candidates" else part[order]

    return {name: pick(name, part) if name in FOLLOWED else part for name, part in batch.items()}


def _joined(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Batches one behind the other; candidates have their windows in the second place."""
    return {
        name: _joined([part[name] for part in parts])
        if isinstance(parts[0][name], dict)
        else torch.cat([part[name] for part in parts], 1 if name.endswith("candidates") else 0)
        for name in parts[0]
    }
