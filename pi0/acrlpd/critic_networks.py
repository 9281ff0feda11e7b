"""The critics of the agent, which lie where every policy finds them, and features of a network of their own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pi0.acrlpd.actor import Observations, Pi0Actor, network_inputs
from pi0.policy.critics import CriticNetworks, PolicyFeatures
from pi0.policy.images import to_network_images

__all__ = ["ConvFeatures", "CriticNetworks", "FixedFeatures"]


class FixedFeatures(nn.Module):
    """`PolicyFeatures` of the starting policy, for observations of a batch.

    Attributes:
        width: F.
        policy_features: for `pi0.policy.critics.save_critic`.

    Args:
        actor: the starting policy, which is copied.
    """

    def __init__(self, actor: Pi0Actor):
        super().__init__()
        self.policy_features = PolicyFeatures(actor.policy.config, actor.policy.network)
        self.width = self.policy_features.width
        self._policy = [actor.policy]  # in a list, so that its weights are not this module's

    def forward(self, observations: Observations) -> Tensor:
        """Features, float32 [B, F]."""
        return self.policy_features(**network_inputs(self._policy[0], observations))


class ConvFeatures(nn.Module):
    """A small convolutional network that is trained with the critics; to compare with `FixedFeatures`.

    Attributes:
        width: F.

    Args:
        cameras: number of cameras.
        size: pixels a side.
    """

    def __init__(self, cameras: int, size: int = 64):
        super().__init__()
        self._size = size
        self.layers = nn.Sequential(
            nn.Conv2d(3 * cameras, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU(),
            nn.Conv2d(64, 64, 3, 2, 1), nn.ReLU(), nn.Flatten(),
        )  # fmt: skip
        self.width = 64 * (-(-size // 8)) ** 2

    def forward(self, observations: Observations) -> Tensor:
        """Features, float32 [B, F]."""
        frames = [to_network_images(each, self._size) for each in observations["image"].values()]
        return self.layers(torch.cat(frames, 1).to(next(self.parameters()).device))
