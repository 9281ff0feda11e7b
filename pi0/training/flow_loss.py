"""The flow-matching loss of action chunks, and the augmentation of their observations."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pi0 import PI0Policy
from pi0.data.chunks import Chunks


@dataclass(frozen=True)
class Augmentation:
    """Random changes to the observations in training; without them the policy would memorise few scenes.

    Attributes:
        shift: images move by up to this many pixels in each direction, with repeated edges (Yarats et al. 2021).
        state_noise: standard deviation of noise on the state, in units of the state's standard deviation.
    """

    shift: int = 4
    state_noise: float = 0.03

    def images(self, frames: Tensor, generator: torch.Generator) -> Tensor:
        """Shift each of the images uint8 [N, h, w, 3] by its own random amount."""
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
        policy: the policy.
        chunks: N chunks.
        samples: draws of noise and time for each observation, which is encoded once for all of them.
        generator: source of all randomness, on the CPU.
        augmentation: random changes to the observations; None: none.
        condition: optimality of each chunk, int [N] (`pi0.model.network`), None for unconditional.
        model: distributed wrapper of the policy, called for the loss; None: the policy itself.
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
    """Actions [N, C, 7] in which the last valid action of each chunk replaces the invalid ones.

    Actions of a chunk attend to each other, so invalid ones would influence the valid ones.
    """
    last = (valid.sum(1, keepdim=True) - 1).clamp(min=0)  # [N, 1]
    index = torch.arange(actions.shape[1]).minimum(last)  # [N, C]
    return actions.gather(1, index[..., None].expand_as(actions))
