"""Action chunks as training data: what the policy saw, what was done, which of it counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from pi0 import PI0Policy
from pi0.data import Demonstration
from pi0.ript.env.episodes import ACTION_DIM, STATE_DIM, Episode


@dataclass
class Chunks:
    """N observations, each with the chunk of C actions that followed it.

    Attributes:
        images: camera name to uint8 [N, height, width, 3].
        states: float32 [N, 8].
        prompts: N instructions.
        actions: float32 [N, C, 7] in [-1, 1].
        valid: bool [N, C]; False where a chunk was cut off and its actions never carried out.
    """

    images: dict[str, Tensor]
    states: Tensor
    prompts: list[str]
    actions: Tensor
    valid: Tensor

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: Tensor) -> Chunks:
        return Chunks(
            {name: frames[index] for name, frames in self.images.items()},
            self.states[index],
            [self.prompts[i] for i in index.tolist()],
            self.actions[index],
            self.valid[index],
        )

    @staticmethod
    def cat(parts: Sequence[Chunks]) -> Chunks:
        """All chunks of `parts`, in order."""
        return Chunks(
            {name: torch.cat([part.images[name] for part in parts]) for name in parts[0].images},
            torch.cat([part.states for part in parts]),
            [prompt for part in parts for prompt in part.prompts],
            torch.cat([part.actions for part in parts]),
            torch.cat([part.valid for part in parts]),
        )

    @staticmethod
    def empty(cameras: Sequence[str], image_size: int, chunk: int) -> Chunks:
        """No chunks, of the right shapes: what a rank has to learn from that collected nothing."""
        return Chunks(
            {name: torch.zeros(0, image_size, image_size, 3, dtype=torch.uint8) for name in cameras},
            torch.zeros(0, STATE_DIM),
            [],
            torch.zeros(0, chunk, ACTION_DIM),
            torch.zeros(0, chunk, dtype=torch.bool),
        )

    def blank(self) -> Chunks:
        """One chunk of these shapes without content, of which nothing is valid."""
        return Chunks(
            {name: frames.new_zeros(1, *frames.shape[1:]) for name, frames in self.images.items()},
            self.states.new_zeros(1, *self.states.shape[1:]),
            [""],
            self.actions.new_zeros(1, *self.actions.shape[1:]),
            self.valid.new_zeros(1, *self.valid.shape[1:]),
        )

    @staticmethod
    def of(episode: Episode) -> Chunks:
        """The chunks of one episode; actions beyond those carried out do not count."""
        length, chunk = episode.actions.shape[:2]
        return Chunks(
            {name: torch.from_numpy(frames) for name, frames in episode.images.items()},
            torch.from_numpy(episode.states),
            [episode.rollout.task.prompt] * length,
            torch.from_numpy(episode.actions),
            torch.from_numpy(np.arange(chunk) < episode.executed[:, None]),
        )

    @staticmethod
    def of_demonstration(demonstration: Demonstration, chunk: int) -> Chunks:
        """A chunk of `chunk` actions from each step whose images are there; those after the end do not count."""
        steps, length = demonstration.image_steps, len(demonstration)
        following = steps[:, None] + np.arange(chunk)  # [N, C]
        valid = following < length
        actions = demonstration.actions[np.minimum(following, length - 1)]
        actions[~valid] = 0
        return Chunks(
            {name: torch.from_numpy(frames) for name, frames in demonstration.images.items()},
            torch.from_numpy(demonstration.states[steps]),
            [demonstration.prompt] * len(steps),
            torch.from_numpy(actions),
            torch.from_numpy(valid),
        )


@dataclass(frozen=True)
class Augmentation:
    """Random changes to what the policy sees in training; on few scenes it else learns them by heart.

    Attributes:
        shift: images move by up to this many pixels each way, edges repeated (Yarats et al. 2021).
        state_noise: standard deviation of noise on the state, in units of its own standard deviation.
    """

    shift: int = 4
    state_noise: float = 0.03

    def images(self, frames: Tensor, generator: torch.Generator) -> Tensor:
        """Each of uint8 [N, h, w, 3] shifted by its own amount."""
        if self.shift == 0:
            return frames
        count, height, width, _ = frames.shape
        shifts = torch.randint(-self.shift, self.shift + 1, (count, 2), generator=generator)
        rows = (torch.arange(height) + shifts[:, :1]).clamp(0, height - 1)  # [N, h]
        columns = (torch.arange(width) + shifts[:, 1:]).clamp(0, width - 1)  # [N, w]
        return frames[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]

    def noise_on_state(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Noise for normalised states of this shape."""
        return self.state_noise * torch.randn(shape, generator=generator)


def flow_loss(
    policy: PI0Policy,
    chunks: Chunks,
    *,
    samples: int,
    generator: torch.Generator,
    augmentation: Augmentation | None = None,
    condition: Tensor | None = None,
    model: nn.Module | None = None,
) -> Tensor:
    """Flow-matching loss of each chunk, float [N]: mean over its valid actions, their 7 features and `samples` draws.

    Args:
        samples: noise and time draws on each observation, which is encoded once for all of them.
        generator: source of all randomness, on the CPU.
        condition: optimality of each chunk, int [N] (`pi0.model.network`), None for unconditional.
        model: what is called for the loss where it is not the policy itself: its distributed wrapper.
    """
    frames, state_noise = chunks.images, None
    if augmentation is not None:
        frames = {name: augmentation.images(images, generator) for name, images in frames.items()}
        state_noise = augmentation.noise_on_state((len(chunks), policy.config.action_dim), generator)
    observations = {"images": frames, "state": chunks.states, "prompt": chunks.prompts}
    inputs = policy.prepare(observations, state_noise)
    actions = policy.normalize_actions(_hold_last(chunks.actions, chunks.valid), chunks.states)
    noise, time = policy.draw_noise_and_time(actions.cpu(), samples, generator)
    loss = (model or policy)(
        **inputs,
        actions=actions,
        noise=noise.to(policy.device),
        time=time.to(policy.device),
        condition=condition,
    )  # [S, N, H, A]
    loss = loss[..., : policy.config.robot_action_dim].mean(dim=(0, 3))  # [N, H]
    valid = chunks.valid.to(loss)
    return (loss * valid).sum(1) / valid.sum(1).clamp(min=1)


def _hold_last(actions: Tensor, valid: Tensor) -> Tensor:
    """Actions [N, C, 7] with those that never happened replaced by the last that did.

    Actions of a chunk attend to each other, so even uncounted ones would be seen by those that count.
    """
    last = (valid.sum(1, keepdim=True) - 1).clamp(min=0)  # [N, 1]
    index = torch.arange(actions.shape[1]).minimum(last)  # [N, C]
    return actions.gather(1, index[..., None].expand_as(actions))
