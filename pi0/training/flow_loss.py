"""The flow-matching loss of action chunks, and the augmentation of what the policy sees of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pi0 import PI0Policy
from pi0.data.chunks import Chunks


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
