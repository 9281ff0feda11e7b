"""Critics of action chunks: what they see, how they value, their files, and acting with the best of N chunks.

The critics are an ensemble of MLPs over fixed features of an observation, the state and a chunk. Trainers learn them;
policies act with them.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from pi0.base.errors import CheckpointError, MissingFileError
from pi0.base.files import write_json
from pi0.base.tensors import write_tensors
from pi0.model.config import Pi0Config, SiglipDims
from pi0.model.network import Pi0Network
from pi0.model.vision import ConvTowers, SiglipTower
from pi0.policy.acting import ActingPolicy, torch_threads
from pi0.policy.pi0_policy import PI0Policy

SIZES_FILE, WEIGHTS_FILE = "critic.json", "critic.safetensors"
REGIONS = (
    2  # a tower with a token for each patch: its tokens are averaged over so many rows and columns of regions
)
OWN_SIZE, OWN_WORDS = 64, 32  # pixels a side and width of words of `OwnFeatures`


class Ensemble(nn.Module):
    """K linear layers with LayerNorm and weights of their own, applied together.

    Args:
        critics: K.
        inputs, outputs: widths.
    """

    def __init__(self, critics: int, inputs: int, outputs: int):
        super().__init__()
        bound = inputs**-0.5
        self.weight = nn.Parameter(torch.empty(critics, inputs, outputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(critics, 1, outputs))

    def forward(self, *parts: Tensor) -> Tensor:
        """[K, N, inputs], or [N, inputs] for all, to [K, N, outputs]; the inputs may come in parts, which saves a copy."""
        sizes = [part.shape[-1] for part in parts]
        critics = len(self.weight)
        (first, weight), *others = zip(parts, self.weight.split(sizes, 1), strict=True)
        # The sums are made within the products: passes over [K, N, outputs] cost as much as those.
        total = torch.baddbmm(self.bias, first.expand(critics, -1, -1), weight)
        for part, weight in others:
            total.baddbmm_(part.expand(critics, -1, -1), weight)
        return total


class EnsembleNorm(nn.Module):
    """LayerNorm with a scale and a shift for each of K critics (Ball et al. 2023 need it against overestimation)."""

    def __init__(self, critics: int, width: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(critics, 1, width))
        self.shift = nn.Parameter(torch.zeros(critics, 1, width))

    def forward(self, x: Tensor) -> Tensor:
        """[K, N, width] to the same."""
        return torch.addcmul(self.shift, F.layer_norm(x, x.shape[-1:]), self.scale)


class CriticNetworks(nn.Module):
    """K critics of action chunks.

    Attributes:
        sizes: the arguments, by name.

    Each is an MLP with LayerNorm. Its first layer sees features, state and chunk; every later one sees the chunk again:
    a chunk is a small part of the input, and a critic that forgets it cannot choose between chunks.

    Args:
        features: width of the features.
        state_dim: width of the state.
        horizon: H, steps of a chunk.
        action_dim: features of an action that the robot has; padding is left out by the caller.
        critics: K, 2 to 10.
        hidden: width of the hidden layers.
        layers: number of hidden layers.

    Raises:
        ValueError: K is not 2 to 10, or there is no hidden layer.
    """

    def __init__(
        self,
        features: int,
        state_dim: int,
        horizon: int,
        action_dim: int,
        critics: int = 2,
        hidden: int = 256,
        layers: int = 3,
    ):
        super().__init__()
        if not 2 <= critics <= 10:
            raise ValueError(f"{critics} critics; an ensemble has 2 to 10")
        if layers < 1:
            raise ValueError("a critic needs a hidden layer")
        self.sizes = {
            "features": features, "state_dim": state_dim, "horizon": horizon, "action_dim": action_dim,
            "critics": critics, "hidden": hidden, "layers": layers,
        }  # fmt: skip
        self.critics, self.horizon, self.action_dim = critics, horizon, action_dim
        chunk = horizon * action_dim
        self.feature_norm = nn.LayerNorm(features)
        self.observation = Ensemble(critics, features + state_dim, hidden)
        self.chunk = Ensemble(critics, chunk, hidden)
        self.norms = nn.ModuleList(EnsembleNorm(critics, hidden) for _ in range(layers))
        self.later = nn.ModuleList(Ensemble(critics, hidden + chunk, hidden) for _ in range(layers - 1))
        self.value = Ensemble(critics, hidden + chunk, 1)

    def observe(self, features: Tensor, state: Tensor) -> Tensor:
        """What the first layer makes of observations: features [B, F] and states [B, S] to [K, B, hidden].

        Any number of chunks can then be valued without looking again.
        """
        return self.observation(self.feature_norm(features), state)

    def values(self, observed: Tensor, chunks: Tensor) -> Tensor:
        """Values [K, S, B] of S chunks for each observation.

        Args:
            observed: of `observe`, [K, B, hidden].
            chunks: normalised actions as the controller would carry them out, float [S, B, H, action_dim].
        """
        samples, batch = chunks.shape[:2]
        flat = chunks.flatten(2).flatten(0, 1)  # [S * B, H * action_dim]
        x = self.chunk(flat)
        x.unflatten(1, (samples, batch)).add_(observed[:, None])
        for number, norm in enumerate(self.norms):
            if number:
                x = self.later[number - 1](x, flat)
            x = F.gelu(norm(x))
        return self.value(x, flat).view(self.critics, samples, batch)

    def forward(self, features: Tensor, state: Tensor, chunk: Tensor) -> Tensor:
        """Values [K, B] of one chunk [B, H, action_dim] for each observation."""
        return self.values(self.observe(features, state), chunk[None])[:, 0]


class PolicyFeatures(nn.Module):
    """Image tokens of a fixed copy of a policy, and the mean embedding of its prompt.

    Nothing in it is trained, so what it returns of an observation can be kept. Features that drift would spoil it.

    Attributes:
        width: F.

    Args:
        config: of the policy.
        network: where the vision tower and the token embedding are copied from; None: they are loaded later.
    """

    def __init__(self, config: Pi0Config, network: Pi0Network | None = None):
        super().__init__()
        self.config = config
        vision, words = config.vision, (config.vocab_size, config.gemma.width)
        self._pools = isinstance(vision, SiglipDims)
        self.vision: nn.Module
        if network is not None:
            self.vision, self.token_embedding = map(copy.deepcopy, (network.vision, network.token_embedding))
        else:
            self.vision = (
                SiglipTower(vision) if isinstance(vision, SiglipDims) else ConvTowers(vision, config.cameras)
            )
            self.token_embedding = nn.Embedding(*words)
        self.requires_grad_(False)
        tokens = REGIONS**2 if self._pools else self.vision.tokens
        self.width = len(config.cameras) * tokens * vision.width + config.gemma.width

    @torch.no_grad()
    def forward(
        self,
        images: Mapping[str, Tensor],
        image_masks: Mapping[str, Tensor],
        tokenized_prompt: Tensor,
        tokenized_prompt_mask: Tensor,
        **_: Tensor,
    ) -> Tensor:
        """Features, float32 [B, F], of what `PI0Policy.prepare` returns; a masked camera gives zeros."""
        cameras = self.config.cameras
        tokens = self.vision([images[camera] for camera in cameras])  # [B, T, width] each
        if self._pools:
            tokens = [_regions(each) for each in tokens]
        seen = [
            (each * image_masks[camera][:, None, None]).flatten(1)
            for camera, each in zip(cameras, tokens, strict=True)
        ]
        prompt = _mean_word(self.token_embedding, tokenized_prompt, tokenized_prompt_mask)
        return torch.cat([*seen, prompt * math.sqrt(self.config.gemma.width)], 1).float()


class OwnFeatures(nn.Module):
    """Features of a small network of the critics' own, which is trained with them; to compare with `PolicyFeatures`.

    What it returns of an observation changes while it learns, so it cannot be kept.

    Attributes:
        width: F.

    Args:
        config: of the policy.
        network: not used; for the same call as `PolicyFeatures`.
    """

    def __init__(self, config: Pi0Config, network: Pi0Network | None = None):
        super().__init__()
        self.config = config
        self.layers = nn.Sequential(
            nn.Conv2d(3 * len(config.cameras), 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU(),
            nn.Conv2d(64, 64, 3, 2, 1), nn.ReLU(), nn.Flatten(),
        )  # fmt: skip
        self.words = nn.Embedding(config.vocab_size, OWN_WORDS)
        self.width = 64 * (OWN_SIZE // 8) ** 2 + OWN_WORDS

    def forward(
        self,
        images: Mapping[str, Tensor],
        image_masks: Mapping[str, Tensor],
        tokenized_prompt: Tensor,
        tokenized_prompt_mask: Tensor,
        **_: Tensor,
    ) -> Tensor:
        """Features, float32 [B, F], of what `PI0Policy.prepare` returns; a masked camera is black."""
        frames = torch.cat(
            [images[name] * image_masks[name][:, None, None, None] for name in self.config.cameras], 1
        )
        if frames.shape[-1] != OWN_SIZE:
            frames = F.interpolate(frames, (OWN_SIZE, OWN_SIZE), mode="bilinear", antialias=True)
        return torch.cat(
            [self.layers(frames), _mean_word(self.words, tokenized_prompt, tokenized_prompt_mask)], 1
        )


Features = PolicyFeatures | OwnFeatures
FEATURES: dict[str, type[PolicyFeatures | OwnFeatures]] = {"policy": PolicyFeatures, "own": OwnFeatures}


def _mean_word(embedding: nn.Embedding, tokens: Tensor, mask: Tensor) -> Tensor:
    """Mean embedding [B, width] of prompts [B, L] over their valid tokens."""
    return (embedding(tokens) * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)


def _regions(tokens: Tensor) -> Tensor:
    """Means over regions of an image: [B, side * side, width] to [B, REGIONS * REGIONS, width]."""
    side = math.isqrt(tokens.shape[1])
    grid = tokens.transpose(1, 2).unflatten(2, (side, side)).float()
    return F.adaptive_avg_pool2d(grid, REGIONS).flatten(2).transpose(1, 2)


def save_critic(
    folder: str | Path,
    critics: CriticNetworks,
    features: Features,
    about: Mapping[str, Any] | None = None,
) -> None:
    """Write a critic's folder, which `load_critic` reads: critic.json and critic.safetensors.

    Args:
        folder: made if it is not there.
        critics: the critics.
        features: what they see of an observation.
        about: what else to note, for people.

    Raises:
        OSError, OutputError: the disk refuses.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {f"critics.{name}": tensor for name, tensor in critics.state_dict().items()}
    weights |= {f"features.{name}": tensor for name, tensor in features.state_dict().items()}
    write_tensors(folder / WEIGHTS_FILE, weights)
    kind = next(name for name, of_kind in FEATURES.items() if isinstance(features, of_kind))
    content = {
        "critics": critics.sizes, "features": kind, "policy": features.config.to_dict(), "about": dict(about or {}),
    }  # fmt: skip
    write_json(folder / SIZES_FILE, content)


def load_critic(folder: str | Path, device: str | torch.device = "cpu") -> tuple[CriticNetworks, Features]:
    """Read a critic's folder, for acting.

    Raises:
        MissingFileError: a file is not there.
        CheckpointError: a file is broken, or the weights do not fit the sizes.
    """
    folder = Path(folder)
    for name in (SIZES_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise MissingFileError(
                f"{folder / name} is not there; a critic's folder holds {SIZES_FILE} and {WEIGHTS_FILE}"
            )
    try:
        content = json.loads((folder / SIZES_FILE).read_text())
        policy = Pi0Config.from_dict(content["policy"], str(folder / SIZES_FILE))
        features = FEATURES[content["features"]](policy)
        critics = CriticNetworks(**content["critics"])
        weights = load_file(folder / WEIGHTS_FILE)
        for name, module in (("critics.", critics), ("features.", features)):
            module.load_state_dict(
                {key.removeprefix(name): w for key, w in weights.items() if key.startswith(name)}
            )
    except (ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{folder} is no critic's folder: {error}") from error
    return tuple(module.to(device).requires_grad_(False).eval() for module in (critics, features))  # type: ignore[return-value]


class BestOfPolicy(ActingPolicy):
    """Acts with the best of N chunks of a policy, by critics; for `pi0.libero.rollouts`.

    With N = 1 it does what `ActingPolicy` does, to the bit, and asks no critic.

    Args:
        policy: the policy that samples.
        critics: they value; the mean of all decides.
        features: what they see.
        samples: N.
        guidance_weight, threads: as for `ActingPolicy`.

    Raises:
        CheckpointError: critics and policy are of different robots.
        InputError: as `ActingPolicy`.
        ValueError: N is below 1.
    """

    def __init__(
        self,
        policy: PI0Policy,
        critics: CriticNetworks,
        features: Features,
        samples: int,
        guidance_weight: float | None = None,
        threads: int = 1,
    ):
        super().__init__(policy, guidance_weight, threads)
        if samples < 1:
            raise ValueError(f"the best of {samples} chunks; 1 or more are needed")
        config = policy.config
        if critics.horizon > config.action_horizon or critics.action_dim != config.robot_action_dim:
            raise CheckpointError(
                f"the critics value {critics.horizon} actions of {critics.action_dim} features; this policy's chunks have "
                f"{config.action_horizon} actions of {config.robot_action_dim}"
            )
        self.shares_first_look = False  # every rollout values its own chunks
        self._critics, self._features, self._samples = critics, features, samples
        self._shape = (samples, *self._shape)

    def noise(self, key: tuple[int, ...]) -> np.ndarray:
        """Standard normal float32 [N, horizon, action dim]; the first is `ActingPolicy.noise` of the key."""
        return super().noise(key)

    @torch.inference_mode()
    def act(
        self, images: dict[str, np.ndarray], states: np.ndarray, prompts: list[str], noise: np.ndarray
    ) -> np.ndarray:
        """The best chunk of each observation, float32 [B, horizon, 7]; `noise` is [B, N, horizon, action dim]."""
        policy, critics = self._policy, self._critics
        with torch_threads(self._threads):
            inputs = policy.prepare({"images": images, "state": states, "prompt": prompts})
            drawn = torch.from_numpy(noise).to(policy.device).transpose(0, 1)
            sampled = policy.sample_actions(**inputs, noise=drawn, guidance_weight=self._guidance_weight)
            chunks = policy.unnormalize_actions(sampled, states).clamp(-1, 1)
            best = torch.zeros(len(states), dtype=torch.long, device=policy.device)
            if self._samples > 1:
                seen = policy.normalize_actions(chunks, states)[..., : critics.horizon, : critics.action_dim]
                observed = critics.observe(self._features(**inputs), inputs["state"])
                best = critics.values(observed, seen).mean(0).argmax(0)
            chosen = chunks[best, torch.arange(len(states), device=policy.device)]
        return chosen.float().cpu().numpy()

    @torch.inference_mode()
    def value(
        self, images: dict[str, np.ndarray], states: np.ndarray, prompts: list[str], chunks: np.ndarray
    ) -> np.ndarray:
        """What the critics expect of chunks float32 [B, horizon, 7], in the robot's units, at the observations of `act`.

        Returns the mean over the critics, float32 [B].
        """
        policy, critics = self._policy, self._critics
        inputs = policy.prepare({"images": images, "state": states, "prompt": prompts})
        given = torch.from_numpy(np.ascontiguousarray(chunks)).to(policy.device)
        seen = policy.normalize_actions(given, states)[..., : critics.horizon, : critics.action_dim]
        return critics(self._features(**inputs), inputs["state"], seen).mean(0).float().cpu().numpy()
