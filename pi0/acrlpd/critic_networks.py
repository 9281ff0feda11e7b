"""The critics of the agent, which lie where every policy finds them, and what they see of a batch's observations."""

from __future__ import annotations

from torch import Tensor, nn

from pi0.acrlpd.actor import Observations, Pi0Actor, network_inputs
from pi0.policy.critics import FEATURES, CriticNetworks, OwnFeatures, PolicyFeatures

__all__ = ["CriticNetworks", "ObservationFeatures", "OwnFeatures", "PolicyFeatures"]


class ObservationFeatures(nn.Module):
    """Features of the observations of a batch.

    Attributes:
        network: what computes them, for `pi0.policy.critics.save_critic`.
        width: F.
        fixed: whether they never change, so that they can be kept.

    Args:
        actor: the starting policy, of which `PolicyFeatures` takes a copy.
        kind: "policy" or "own", a key of `pi0.policy.critics.FEATURES`.
    """

    def __init__(self, actor: Pi0Actor, kind: str = "policy"):
        super().__init__()
        self.network = FEATURES[kind](actor.policy.config, actor.policy.network)
        self.width = self.network.width
        self.fixed = isinstance(self.network, PolicyFeatures)
        self._policy = [actor.policy]  # in a list, so that its weights are not this module's

    def forward(self, observations: Observations) -> Tensor:
        """Features, float32 [B, F]."""
        return self.network(**network_inputs(self._policy[0], observations))
