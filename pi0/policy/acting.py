"""A policy for the rollout workers: uint8 images in, action chunks out, noise from a key."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from pi0 import PI0Policy
from pi0.base.errors import CheckpointError, InputError
from pi0.model.config import SiglipDims


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Compute with so many torch threads within."""
    threads = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class ActingPolicy:
    """Adapter between `PI0Policy` and `pi0.libero.rollouts`.

    On a CPU it acts with one thread by default: the other cores simulate meanwhile, and more threads would wait for
    each other beside busy workers.

    Args:
        policy: the policy.
        guidance_weight: weight w of classifier-free guidance; None samples the unconditional field.
        threads: torch threads with which it acts.
    Raises:
        InputError: a guidance weight is given, but the policy has no optimality condition.
    """

    def __init__(self, policy: PI0Policy, guidance_weight: float | None = None, threads: int = 1):
        if guidance_weight is not None and not policy.config.guidance:
            raise InputError(
                f"guidance weight {guidance_weight}: this policy has no optimality condition; "
                "algo.mode=guidance trains one"
            )
        self._policy = policy
        self._guidance_weight = guidance_weight
        self._threads = threads
        # A small tower costs less than another batch. SigLIP and Gemma take most of a chunk's time.
        self.shares_first_look = isinstance(policy.config.vision, SiglipDims)
        self._shape: tuple[int, ...] = (policy.config.action_horizon, policy.config.action_dim)

    def noise(self, key: tuple[int, ...]) -> np.ndarray:
        """Standard normal float32 [horizon, action dim]; the same key gives the same numbers everywhere."""
        return np.random.default_rng(key).standard_normal(self._shape, dtype=np.float32)

    def reads(self, prompt: str) -> bool:
        """Whether the policy has room for an instruction."""
        config = self._policy.config
        # The middle bin of a state has three digits, and none has more.
        width = config.action_dim if config.pad_discrete_state else config.robot_state_dim
        try:
            self._policy.tokenizer.encode(prompt, np.zeros(width) if config.discrete_state_input else None)
        except CheckpointError:
            return False
        return True

    @torch.inference_mode()
    def act(
        self, images: dict[str, np.ndarray], states: np.ndarray, prompts: list[str], noise: np.ndarray
    ) -> np.ndarray:
        """Action chunks, float32 [B, horizon, 7] in [-1, 1].

        Args:
            images: camera name to uint8 [B, height, width, 3].
            states: float32 [B, 8].
            prompts: B instructions.
            noise: float32 [B, horizon, action dim]; or [S, B, horizon, action dim] for S chunks from each
                observation, whose images and prompt are then encoded once: [S, B, horizon, 7].
        """
        observations = {
            "images": {name: torch.from_numpy(frames) for name, frames in images.items()},
            "state": torch.from_numpy(states),
            "prompt": prompts,
        }
        with torch_threads(self._threads):
            actions = self._sample(observations, torch.from_numpy(noise))
        return actions.float().cpu().numpy()

    def _sample(self, observations: dict, noise: torch.Tensor) -> torch.Tensor:
        """The robot's actions for observations as `PI0Policy.select_action` takes them."""
        return self._policy.select_action(observations, noise=noise, guidance_weight=self._guidance_weight)

    def prepared(
        self, images: dict[str, np.ndarray], states: np.ndarray, prompts: list[str]
    ) -> dict[str, np.ndarray]:
        """The network's inputs for the observations of `act`: what `PI0Policy.prepare` returns, by name."""
        given = self._policy.prepare({"images": images, "state": states, "prompt": prompts})
        parts = {
            f"{name}/{camera}": tensor
            for name in ("images", "image_masks")
            for camera, tensor in given.pop(name).items()
        }
        return {name: tensor.cpu().numpy() for name, tensor in (parts | given).items()}


class NoisyPolicy(ActingPolicy):
    """Acts with noise in every Euler step of the flow (`pi0.policy.flow_sde`), as the policy gradient of flows needs it.

    At level 0 it does what `ActingPolicy` does, to the bit.

    Args:
        policy: the policy.
        level: of the noise, 0 or more.
    """

    def __init__(self, policy: PI0Policy, level: float):
        super().__init__(policy)
        self._level = level
        self._shape = (policy.config.num_steps + 1, *self._shape)

    def noise(self, key: tuple[int, ...]) -> np.ndarray:
        """Standard normal float32 [1 + steps, horizon, action dim]; the first is `ActingPolicy.noise` of the key."""
        return super().noise(key)

    def _sample(self, observations: dict, noise: torch.Tensor) -> torch.Tensor:
        policy = self._policy
        given = noise.to(policy.device).movedim(-3, 0)  # [1 + steps, ..., B, horizon, action dim]
        path = policy.sample_path(**policy.prepare(observations), noise=given, noise_level=self._level)
        return policy.unnormalize_actions(path[-1], observations["state"]).clamp(-1, 1)
