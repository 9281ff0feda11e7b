"""What the agent asks of an actor, and pi0 as one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from pi0 import PI0Policy
from pi0.policy.images import to_network_images

Observations = Mapping[str, Any]  # `observations` of a batch


class Actor(Protocol):
    """A policy that samples chunks and has a flow-matching loss; also a `torch.nn.Module`.

    Attributes:
        chunk: actions in its chunks, C.
        action_dim: features of its normalised actions, A.
    """

    chunk: int
    action_dim: int

    def sample(self, observations: Observations, noise: Tensor) -> Tensor:
        """Chunks [S, B, C, A], normalised, from noise of that shape; without a gradient."""

    def flow_loss(
        self,
        observations: Observations,
        actions: Tensor,
        valid: Tensor,
        generator: torch.Generator,
        samples: int,
    ) -> Tensor:
        """Flow-matching loss [K, B] of K chunks of each observation: of actions [K, B, H, A], over the valid [K, B, H]
        ones and `samples` draws each."""

    def carried_out(self, actions: Tensor, observations: Observations) -> Tensor:
        """Normalised actions [..., B, H, A] as the controller would carry them out, without padding: [..., B, H, R]."""

    def copy(self) -> Self:
        """A copy that is trained separately."""


class Pi0Actor(nn.Module):
    """A pi0 policy as the agent's actor.

    Args:
        policy: the policy; its weights are trained.
        mixed_precision: sample, and compute the loss, in bfloat16 where PyTorch's autocast considers it safe.
    """

    def __init__(self, policy: PI0Policy, mixed_precision: bool = False):
        super().__init__()
        self.policy = policy
        self.mixed_precision = mixed_precision
        self.chunk = policy.config.action_horizon
        self.action_dim = policy.config.action_dim

    def sample(self, observations: Observations, noise: Tensor) -> Tensor:
        """See `Actor`; all chunks of an observation share its prefix."""
        with torch.autocast(self.policy.device.type, torch.bfloat16, enabled=self.mixed_precision):
            return self.policy.sample_actions(**network_inputs(self.policy, observations), noise=noise)

    def flow_loss(
        self,
        observations: Observations,
        actions: Tensor,
        valid: Tensor,
        generator: torch.Generator,
        samples: int,
    ) -> Tensor:
        """See `Actor`. All chunks of an observation share its prefix. Actions that do not count are replaced by the last
        one that does, since actions attend to each other; so is the rest of a chunk longer than H."""
        kinds, batch, horizon, width = actions.shape
        last = (valid.sum(-1).long() - 1).clamp(min=0)[..., None]
        steps = torch.arange(self.chunk, device=actions.device)
        index = steps.minimum(last)[..., None].expand(-1, -1, -1, width)
        held = actions.gather(2, index)  # [K, B, C, A]
        noise, time = self.policy.draw_noise_and_time(held.flatten(0, 1).cpu(), samples, generator)
        with torch.autocast(self.policy.device.type, torch.bfloat16, enabled=self.mixed_precision):
            loss = self.policy(
                **network_inputs(self.policy, observations),
                actions=held.repeat(samples, 1, 1, 1),
                noise=noise.view(-1, *held.shape[1:]).to(held),
                time=time.view(-1, batch).to(held),
            )
        loss = loss.unflatten(0, (samples, kinds))[..., :horizon, : self.policy.config.robot_action_dim]
        loss = loss.mean((0, 4))  # [K, B, H]
        counts = valid.to(loss)
        return (loss * counts).sum(-1) / counts.sum(-1).clamp(min=1)

    def carried_out(self, actions: Tensor, observations: Observations) -> Tensor:
        """See `Actor`: clipped to [-1, 1] in the robot's units, as `PI0Policy.select_action` does it."""
        robot = self.policy.config.robot_action_dim
        states = observations["raw_state"]
        clipped = self.policy.unnormalize_actions(actions, states).clamp(-1, 1)
        return self.policy.normalize_actions(clipped, states)[..., :robot]

    def copy(self) -> Pi0Actor:
        """See `Actor`; frozen weights share their memory."""
        return Pi0Actor(self.policy.copy(), self.mixed_precision)


def network_inputs(policy: PI0Policy, observations: Observations) -> dict[str, Any]:
    """A batch's observations as `PI0Policy.forward` takes them: images scaled to [-1, 1], on its device."""
    config, device = policy.config, policy.device
    images = {
        camera: to_network_images(frames.to(device), config.image_size, config.mirror_images)
        for camera, frames in observations["image"].items()
    }
    return {
        "images": images,
        "image_masks": {camera: mask.to(device) for camera, mask in observations["image_mask"].items()},
        "state": observations["state"].to(device),
        "tokenized_prompt": observations["tokenized_prompt"].to(device),
        "tokenized_prompt_mask": observations["tokenized_prompt_mask"].to(device),
    }
