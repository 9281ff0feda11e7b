"""What is kept of each observation, so that a step of the critics needs no image: inputs, features, candidate chunks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pi0 import PI0Policy
from pi0.acrlpd.replay import ReplayBuffer

AT_ONCE = 32  # observations that a network sees together


class ObservationCaches:
    """For each observation of a buffer, in its order: what the network is given besides images, features, candidates.

    Attributes:
        inputs: `state` float [O, A], `tokenized_prompt` int64 [O, L], `tokenized_prompt_mask` bool [O, L], and by
            camera `image_mask` bool [O].
        features: float32 [O, F]; F is 0 if they are not kept.
        candidates: float32 [O, N, C, A]; None before the first refresh.

    Args:
        policy: prepares observations; which weights it has does not matter.
        features: features [B, F] of what `PI0Policy.prepare` returns, which never change; None: none are kept.
    """

    def __init__(self, policy: PI0Policy, features: Callable[..., Tensor] | None):
        self._policy = policy
        self._features = features
        self.inputs: dict[str, Any] = {}
        self.features = torch.zeros(0, 0)
        self.candidates: Tensor | None = None

    def follow(self, replay: ReplayBuffer, left: int) -> None:
        """Take what a buffer has been given.

        Args:
            replay: the buffer, after `add`.
            left: what `add` returned.
        """
        kept = len(self.features) - left
        rows = torch.arange(kept, len(replay.states))
        parts = [self._prepare(replay, some) for some in rows.split(AT_ONCE)]
        old = {name: _each(column, lambda tensor: tensor[left:]) for name, column in self.inputs.items()}
        new = {name: _cat([part[0][name] for part in parts]) for name in parts[0][0]} if parts else {}
        self.inputs = {name: _cat([old[name], new[name]]) for name in new} if old and new else new or old
        fresh = [part[1] for part in parts]
        self.features = torch.cat([self.features[left:], *fresh] if len(self.features) else fresh)
        self.candidates = None

    def begin(self, replay: ReplayBuffer, candidates: Tensor | None) -> None:
        """Take a whole buffer, with the candidates that were drawn for it."""
        self.inputs, self.features = {}, torch.zeros(0, 0)
        if len(replay):
            self.follow(replay, 0)
        self.candidates = candidates

    def refresh(self, replay: ReplayBuffer, sample: Callable[[dict[str, Any]], Tensor]) -> None:
        """Draw new candidates for all observations: `sample` gives [N, B, C, A] for observations of a batch."""
        parts = []
        for rows in torch.arange(len(replay.states)).split(AT_ONCE):
            parts.append(sample(self.observations(replay, rows, images=True)).transpose(0, 1).cpu())
        self.candidates = torch.cat(parts)

    def observations(self, replay: ReplayBuffer, rows: Tensor, images: bool) -> dict[str, Any]:
        """`observations` of a batch (docs/acrlpd.md), with `raw_state`."""
        found: dict[str, Any] = {
            name: _each(column, lambda tensor: tensor[rows]) for name, column in self.inputs.items()
        }
        found["raw_state"] = replay.states[rows]
        if images:
            found["image"] = replay.images(rows)
            for camera in self._policy.config.cameras:
                if camera not in found["image"]:  # masked out, but the network takes it
                    size = self._policy.config.image_size
                    found["image"][camera] = torch.zeros(len(rows), size, size, 3, dtype=torch.uint8)
        return found

    def _prepare(self, replay: ReplayBuffer, rows: Tensor) -> tuple[dict[str, Any], Tensor]:
        given = self._policy.prepare(
            {
                "images": replay.images(rows),
                "state": replay.states[rows],
                "prompt": [replay.prompts[row] for row in rows.tolist()],
            }
        )
        features = torch.zeros(len(rows), 0) if self._features is None else self._features(**given).cpu()
        names = ("state", "tokenized_prompt", "tokenized_prompt_mask")
        inputs: dict[str, Any] = {name: given[name].cpu() for name in names}
        inputs["image_mask"] = {camera: mask.cpu() for camera, mask in given["image_masks"].items()}
        return inputs, features


def _each(column: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A tensor, or a dictionary of tensors, changed."""
    return {name: change(t) for name, t in column.items()} if isinstance(column, dict) else change(column)


def _cat(columns: list[Any]) -> Any:
    if isinstance(columns[0], dict):
        return {name: torch.cat([column[name] for column in columns]) for name in columns[0]}
    return torch.cat(columns)
