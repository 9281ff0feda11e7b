"""The policy and value network, for the trainer: the convolutional network of Mnih et al. (2015) with two heads."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from pi0.parallel import policy
from pi0.parallel.policy import STACK


class ActorCritic(nn.Module):
    """Logits and value of stacks of frames, as CleanRL's `ppo_atari.py` builds them.

    The convolutions run in `precision`; the heads, and all weights, are float32.

    An action may have several parts, such as the buttons and axes of a pad (`Game.parts`). Then there is a logit for each
    choice of each part, and the logit of an action is the sum of its parts': they are chosen independently, given the
    stack, as Stable-Baselines3 does it for `MultiDiscrete`. What is learned of a part counts for all actions that have it.

    Args:
        parts: choices of each part of an action; a single number for plain actions.
        precision: of the convolutions and the hidden layer.
    """

    def __init__(self, parts: Sequence[int], precision: torch.dtype = torch.float32):
        super().__init__()
        self.parts = tuple(parts)
        self.precision = precision
        self.conv1 = _initialised(nn.Conv2d(STACK, 32, 8, 4))
        self.conv2 = _initialised(nn.Conv2d(32, 64, 4, 2))
        self.conv3 = _initialised(nn.Conv2d(64, 64, 3, 1))
        self.hidden = _initialised(nn.Linear(64 * 7 * 7, 512))
        self.actor = _initialised(nn.Linear(512, sum(self.parts)), 0.01)
        self.critic = _initialised(nn.Linear(512, 1), 1.0)
        self.to(memory_format=torch.channels_last)  # faster on a CPU

    def forward(self, stacks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [B, actions] and values [B], float32, of stacks, uint8 [B, 4, 84, 84], oldest frame first."""
        pixels = stacks.to(self.precision, memory_format=torch.channels_last)  # bfloat16 has 0 to 255 exactly
        with torch.autocast(stacks.device.type, torch.bfloat16, enabled=self.precision == torch.bfloat16):
            first = self.conv1.weight / 255  # fewer numbers to divide than the pixels
            features = nn.functional.conv2d(pixels, first, self.conv1.bias, self.conv1.stride).relu_()
            features = self.conv2(features).relu_()
            features = self.conv3(features).relu_()
            features = self.hidden(features.flatten(1)).relu_()
        features = features.float()
        return self._joint(self.actor(features)), self.critic(features).squeeze(-1)

    def flat(self) -> np.ndarray:
        """A copy of the parameters, float32, one after the other, as `pi0.parallel.policy.views` reads them.

        Workers have a row of the actor's weights for each action, whatever its parts.
        """
        with torch.no_grad():
            named = dict(self.named_parameters())
            named["actor.weight"] = self._joint(self.actor.weight.T).T
            named["actor.bias"] = self._joint(self.actor.bias[None])[0]
            return torch.cat([named[name].reshape(-1).cpu() for name in policy.shapes(1)]).numpy()

    def _joint(self, of_parts: torch.Tensor) -> torch.Tensor:
        """For each action the sum over its parts: [N, sum of `parts`] to [N, actions], in the order of `Game.actions`."""
        first, *others = of_parts.split(self.parts, -1)
        for other in others:
            first = (first[:, :, None] + other[:, None, :]).flatten(1)
        return first


def default_precision(device: torch.device) -> torch.dtype:
    """bfloat16 where the processor or GPU computes with it, else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32


def _initialised(layer: nn.Module, gain: float = 2**0.5) -> nn.Module:
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer
