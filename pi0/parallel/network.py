"""The policy and value network, for the trainer: the convolutional network of Mnih et al. (2015) with two heads."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from pi0.parallel import policy
from pi0.parallel.policy import STACK


class ActorCritic(nn.Module):
    """Logits and value of stacks of frames, as CleanRL's `ppo_atari.py` builds them.

    The convolutions run in `precision`; the heads, and all weights, are float32.

    Args:
        actions: number of actions.
        precision: of the convolutions and the hidden layer.
    """

    def __init__(self, actions: int, precision: torch.dtype = torch.float32):
        super().__init__()
        self.precision = precision
        self.conv1 = _initialised(nn.Conv2d(STACK, 32, 8, 4))
        self.conv2 = _initialised(nn.Conv2d(32, 64, 4, 2))
        self.conv3 = _initialised(nn.Conv2d(64, 64, 3, 1))
        self.hidden = _initialised(nn.Linear(64 * 7 * 7, 512))
        self.actor = _initialised(nn.Linear(512, actions), 0.01)
        self.critic = _initialised(nn.Linear(512, 1), 1.0)
        self.to(memory_format=torch.channels_last)  # faster on a CPU
        named = {name: tuple(parameter.shape) for name, parameter in self.named_parameters()}
        assert named == policy.shapes(actions), "workers act with the same network"

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
        return self.actor(features), self.critic(features).squeeze(-1)

    def flat(self) -> np.ndarray:
        """A copy of the parameters, float32, one after the other, as `pi0.parallel.policy.views` reads them."""
        return torch.cat([parameter.detach().reshape(-1).cpu() for parameter in self.parameters()]).numpy()

    def load_flat(self, flat: np.ndarray) -> None:
        """Take what `flat` returned."""
        rest = torch.from_numpy(np.array(flat))
        with torch.no_grad():
            for parameter in self.parameters():
                part, rest = rest[: parameter.numel()], rest[parameter.numel() :]
                parameter.copy_(part.view(parameter.shape))


def default_precision(device: torch.device) -> torch.dtype:
    """bfloat16 where the processor or GPU computes with it, else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32


def _initialised(layer: nn.Module, gain: float = 2**0.5) -> nn.Module:
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer
