"""`PI0Policy`: from a robot's observations to actions, and the flow-matching loss of action chunks."""

from __future__ import annotations

import copy
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pi0.base.errors import CheckpointError, InputError
from pi0.model.config import Pi0Config
from pi0.model.lora import RANKS
from pi0.model.network import NULL, POSITIVE, Pi0Network, PrefixCache
from pi0.policy.cameras import How
from pi0.policy.flow_sde import step_mean, step_std
from pi0.policy.folder import (
    Origin,
    load_weights,
    read_cameras,
    read_config,
    read_norm_stats,
    save_checkpoint_files,
)
from pi0.policy.images import to_network_images
from pi0.policy.normalization import (
    NormStats,
    Stats,
    add_state,
    learned_delta_actions,
    normalize,
    require_quantiles,
    subtract_state,
    unnormalize,
)
from pi0.policy.tokenizer import PaligemmaTokenizer, TinyTokenizer, Tokenizer

TRAINABLE = ("all", "without_vision", "expert", "lora", "as_saved", "none")


class PI0Policy(nn.Module):
    """A pi0 network with what it needs to act: normalisation statistics, image preparation and a tokenizer.

    It has two levels. `select_action` takes raw observations and returns actions for the robot. `forward` and
    `sample_actions` take the network's inputs (`prepare` makes them): images in [-1, 1], state and actions
    normalised and zero-padded to `config.action_dim`. Shapes: B observations, H = config.action_horizon
    actions in a chunk, A = config.action_dim.

    Args:
        config: sizes.
        norm_stats: statistics of its training data; without them only the lower level works.

    Raises:
        NormStatsError: the statistics do not fit the configuration.
    """

    def __init__(self, config: Pi0Config, norm_stats: NormStats | None = None):
        super().__init__()
        self.config = config
        self.norm_stats: NormStats | None = None
        self.delta_actions = bool(config.delta_actions)  # whether the state is subtracted from the actions
        if norm_stats is not None:
            self.use_norm_stats(norm_stats)
        self.network = Pi0Network(config)
        self.compiled = False  # whether torch.compile compiles the network
        self._tokenizer: Tokenizer | None = None
        self._origin: Origin | None = None  # what it keeps of its file, if it came from one

    def use_norm_stats(self, norm_stats: NormStats) -> None:
        """Normalise by these statistics from now on.

        Raises:
            NormStatsError: they do not fit the configuration.
        """
        self.delta_actions = learned_delta_actions(norm_stats, self.config.delta_actions)
        if self.config.use_quantile_norm:
            require_quantiles(norm_stats)
        self.norm_stats = norm_stats

    # Files

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        norm_stats_path: str | Path | None = None,
        trainable: str = "as_saved",
        cameras: Mapping[str, str] | None = None,
    ) -> PI0Policy:
        """Load a policy folder of this project, openpi or LeRobot, in evaluation mode.

        Beside the weights this takes a few megabytes of memory; see `load_weights`.

        Args:
            path: the folder, with model.safetensors, config.json and, for acting, statistics (docs/checkpoints.md).
            device: where the weights go.
            dtype: type of the two experts and the vision tower. What openpi keeps in float32 stays in float32:
                norms, patch and position embeddings, the flow head. If only a part is trained (`choose_trained`),
                that part stays in float32, too. None is float32.
            norm_stats_path: a norm_stats.json to use instead of the folder's own statistics.
            trainable: the part to train, as in `choose_trained`. That method starts from rounded weights in a
                policy that was loaded in bfloat16; here the trained part is never rounded.
            cameras: camera to image, if the names of LeRobot's image features do not tell; None: names decide, then
                their order, which is printed.

        Raises:
            FileNotFoundError: the folder, config.json, model.safetensors or norm_stats_path is missing.
            CheckpointError: a file is broken or does not fit the others, or a weight is not finite.
        """
        policy, dtypes, notes = cls._without_weights(path, dtype, norm_stats_path, trainable, cameras)
        for note in notes:
            print(note)
        shapes = {name: parameter.shape for name, parameter in policy.network.named_parameters()}
        weights, policy._origin = load_weights(path, shapes, dtypes, device)
        frozen = {
            name for name, parameter in policy.network.named_parameters() if not parameter.requires_grad
        }
        policy.network.load_state_dict(weights, assign=True)
        for name, parameter in policy.network.named_parameters():
            parameter.requires_grad_(name not in frozen)
        policy.choose_trained(trainable)
        return policy.eval()

    @classmethod
    def bytes_of_weights(
        cls,
        path: str | Path,
        dtype: torch.dtype | None = None,
        norm_stats_path: str | Path | None = None,
        trainable: str = "as_saved",
    ) -> int:
        """Memory in bytes of the weights that `from_pretrained` would load; the weights are not read."""
        policy, dtypes, _ = cls._without_weights(path, dtype, norm_stats_path, trainable)
        return sum(p.numel() * dtypes[name].itemsize for name, p in policy.network.named_parameters())

    @classmethod
    def _without_weights(
        cls,
        path: str | Path,
        dtype: torch.dtype | None,
        norm_stats_path: str | Path | None,
        trainable: str,
        cameras: Mapping[str, str] | None = None,
    ) -> tuple[PI0Policy, dict[str, torch.dtype], list[str]]:
        """The policy without weights, by name the type that each weight gets, and what a user should know."""
        config = read_config(path, cameras)
        notes = [
            f"{path}: image {choice}; if that is wrong, state the cameras: python -m pi0.checkpoint convert --help"
            for choice in read_cameras(path, cameras)
            if choice.how is How.ORDER
        ]
        stats, _, floors = read_norm_stats(path, config, norm_stats_path)
        notes += [f"{stats and stats.source}: {line}, because the feature is constant" for line in floors]
        with torch.device("meta"), _without_start_values():
            policy, trainee = cls(config, stats), cls(config, stats)
            trainee.choose_trained(trainable)
        low = trainee.network.low_precision_parameters() if dtype else set()
        names = [name for name, _ in policy.network.named_parameters()]
        return policy, {name: dtype if dtype and name in low else torch.float32 for name in names}, notes

    def save_pretrained(self, path: str | Path, layout: str = "openpi") -> None:
        """Write a policy folder that `from_pretrained` loads; each file is replaced whole.

        Args:
            path: the folder.
            layout: "openpi": openpi's PyTorch code loads the weights, unless they hold parts that only this project
                has: low-rank additions (`merge_lora` first), an optimality condition, a convolutional tower.
                "lerobot": LeRobot loads the whole folder.

        Raises:
            CheckpointError: the layout cannot hold a part of the model.
            OSError, OutputError: the disk refuses.
        """
        weights = self.network.state_dict()
        save_checkpoint_files(path, weights, self.saved_config, self.norm_stats, self._origin, layout)

    @property
    def saved_config(self) -> Pi0Config:
        """The configuration with what the statistics have shown, for readers that do not examine them."""
        return dataclasses.replace(self.config, delta_actions=True) if self.delta_actions else self.config

    def enable_guidance(self) -> None:
        """Add an optimality condition, for guidance; it changes no output until it is trained."""
        if not self.config.guidance:
            self.config = dataclasses.replace(self.config, guidance=True)
            self.network.add_condition(self.config)

    def freeze(self, *, vision_encoder: bool = False, all_but_expert: bool = False) -> None:
        """Train all but the vision tower, or only the action expert and its projections."""
        self._train(freeze_vision_encoder=vision_encoder, train_expert_only=all_but_expert)

    def enable_lora(self, gemma_rank: int = RANKS[0], expert_rank: int = RANKS[1]) -> None:
        """Train by low-rank adaptation (`pi0.model.lora`); it changes no output until it is trained.

        Args:
            gemma_rank, expert_rank: ranks of the additions to the matrices of the two transformers, by default
                openpi's. 0 adds nothing: that transformer is trained whole.

        Raises:
            ValueError: the policy already has low-rank adaptation.
        """
        if self._adapted:
            raise ValueError(
                "this policy already has low-rank adaptation; call merge_lora() before new ranks"
            )
        self._train((gemma_rank, expert_rank))

    def merge_lora(self) -> None:
        """Merge what low-rank adaptation has learned into the weights, to save it for other programs.

        In a policy that was loaded in bfloat16 the result is rounded; load the policy in float32 to avoid that.
        """
        self._train((0, 0))

    def choose_trained(self, what: str) -> None:
        """Choose the part of the weights that is trained.

        The trained part is in float32; the frozen part keeps the type that the policy was loaded in. In bfloat16
        small learning rates would change nothing. Weights that were loaded in bfloat16 start from their rounded
        values; `from_pretrained` with `trainable` starts from those in the file.

        Args:
            what: one of `TRAINABLE`. "all": all, in the type that the policy was loaded in. "without_vision": all
                but the vision tower. "expert": only the action expert and its projections. "lora": low-rank
                additions to both transformers, the vision tower and the projections. "as_saved": the part that the
                folder's configuration names. "none": nothing, and the configuration stays.

        Raises:
            ValueError: `what` is none of these.
        """
        if what not in TRAINABLE:
            raise ValueError(f"trainable cannot be {what!r}; choose one of {', '.join(TRAINABLE)}")
        if what == "none":
            self.requires_grad_(False)
            return
        if what == "as_saved" or (what == "lora" and self._adapted):
            return
        self._train(
            RANKS if what == "lora" else (0, 0),
            freeze_vision_encoder=what == "without_vision",
            train_expert_only=what == "expert",
        )

    def copy(self) -> PI0Policy:
        """A copy that is trained separately; frozen weights share their memory with the original."""
        frozen = {id(parameter): parameter for parameter in self.parameters() if not parameter.requires_grad}
        return copy.deepcopy(self, frozen)

    @property
    def _adapted(self) -> bool:
        return bool(self.config.gemma.lora_rank or self.config.action_expert.lora_rank)

    def _train(self, lora_ranks: tuple[int, int] | None = None, **frozen: Any) -> None:
        """Change these fields of the configuration and what is trained, in one step: nothing is rounded in between."""
        gemma, expert = self.config.gemma, self.config.action_expert
        if lora_ranks is not None:
            gemma = dataclasses.replace(gemma, lora_rank=lora_ranks[0])
            expert = dataclasses.replace(expert, lora_rank=lora_ranks[1])
        self.config = dataclasses.replace(self.config, gemma=gemma, action_expert=expert, **frozen)
        self.network.choose_trained(self.config)

    # The network's inputs and outputs

    def forward(
        self,
        images: Mapping[str, Tensor],
        image_masks: Mapping[str, Tensor],
        state: Tensor,
        tokenized_prompt: Tensor,
        tokenized_prompt_mask: Tensor,
        actions: Tensor | None,
        noise: Tensor | None = None,
        time: Tensor | None = None,
        condition: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Flow-matching loss of action chunks, per element and not reduced; or, without actions, the velocity.

        With x_t = t * noise + (1 - t) * actions, the squared error of the predicted velocity against
        noise - actions (Black et al. 2024, eq. 1; openpi's direction of time: 1 is noise).

        Args:
            images: for each camera, float [B, 3, size, size] in [-1, 1].
            image_masks: for each camera, bool [B].
            state: normalised, float [B, A].
            tokenized_prompt: int [B, L].
            tokenized_prompt_mask: bool [B, L].
            actions: normalised, float [B, H, A]; or [S, B, H, A], other ones for each draw, of which `noise` and
                `time` must then be given. None: `noise` is x_t, and the result is the velocity there. It is computed
                here, and not in a method of its own, since wrappers that shard a policy know only `forward`.
            noise: standard normal, float [B, H, A]; or [S, B, H, A] for S draws on each observation, whose
                images and prompt are then encoded once. None draws [B, H, A].
            time: flow time of each draw, [B] or [S, B]; None draws it (`draw_noise_and_time`).
            condition: optimality of each chunk, int [B]: NULL, POSITIVE or NEGATIVE of pi0.model.network.
                None is NULL. Only with `config.guidance`.
            generator: random generator for what is drawn here.

        Returns:
            Squared error, or velocity, float, in the shape of the noise.

        Raises:
            ValueError: noise and time have different numbers of draws.
        """
        observation = (images, image_masks, tokenized_prompt, tokenized_prompt_mask)
        if actions is None:
            if noise is None or time is None or condition is not None:
                raise ValueError("a velocity needs x_t as noise, and time; it has no condition")
            prefix = self._run(Pi0Network.encode_prefix, *observation)
            x_t = noise.reshape(-1, *noise.shape[-2:])
            return self._run(Pi0Network.velocity, prefix, state, x_t, time.flatten()).view(noise.shape)
        if noise is None or time is None:
            samples = None if noise is None or noise.ndim == 3 else len(noise)
            drawn_noise, drawn_time = self.draw_noise_and_time(actions, samples, generator)
            noise = drawn_noise if noise is None else noise
            time = drawn_time if time is None else time
        shape = noise.shape
        batch = actions.shape[-3]
        noise, t = noise.reshape(-1, *actions.shape[-3:]), time.reshape(-1, batch)  # [S, B, H, A], [S, B]
        if len(noise) != len(t):
            raise ValueError(
                f"noise {list(shape)} and time {list(time.shape)} disagree on the number of draws"
            )
        x_t = t[..., None, None] * noise + (1 - t[..., None, None]) * actions
        if condition is not None:
            condition = condition.expand(len(noise), -1).flatten()
        prefix = self._run(Pi0Network.encode_prefix, *observation)
        velocity = self._run(Pi0Network.velocity, prefix, state, x_t.flatten(0, 1), t.flatten(), condition)
        return (velocity.view_as(noise) - (noise - actions)).square().view(shape)

    @staticmethod
    def draw_noise_and_time(
        actions: Tensor, samples: int | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw noise [B, H, A] and flow times [B] for the loss of actions [B, H, A]; `samples` adds a leading axis.

        Times follow Beta(1.5, 1), scaled to (0.001, 1], so most are near noise. They are drawn by its inverse
        distribution function, u^(2/3).
        """
        lead = () if samples is None else (samples,)
        options = {"generator": generator, "device": actions.device, "dtype": actions.dtype}
        noise = torch.randn(*lead, *actions.shape, **options)
        u = torch.rand(*lead, len(actions), **options)
        return noise, u ** (1 / 1.5) * 0.999 + 0.001

    @torch.no_grad()
    def sample_actions(
        self,
        images: Mapping[str, Tensor],
        image_masks: Mapping[str, Tensor],
        state: Tensor,
        tokenized_prompt: Tensor,
        tokenized_prompt_mask: Tensor,
        noise: Tensor,
        num_steps: int | None = None,
        guidance_weight: float | None = None,
    ) -> Tensor:
        """Follow the flow from noise at t = 1 to actions at t = 0 in equal Euler steps.

        Args:
            images, image_masks, state, tokenized_prompt, tokenized_prompt_mask: as in `forward`.
            noise: standard normal, float [B, H, A]; or [S, B, H, A] for S chunks from each observation, whose
                images and prompt are then encoded once.
            num_steps: Euler steps; None takes the configuration's.
            guidance_weight: w of v_null + w * (v_positive - v_null), only with `config.guidance`; 0 and None
                are the unconditional field, 1 the positive one.

        Returns:
            Normalised actions, float, in the shape of the noise.

        Raises:
            ValueError: num_steps is below 1.
        """
        observation = (images, image_masks, tokenized_prompt, tokenized_prompt_mask)
        for x_t in self._follow_flow(observation, state, noise, num_steps, guidance_weight):
            actions = x_t
        return actions

    @torch.no_grad()
    def sample_path(
        self,
        images: Mapping[str, Tensor],
        image_masks: Mapping[str, Tensor],
        state: Tensor,
        tokenized_prompt: Tensor,
        tokenized_prompt_mask: Tensor,
        noise: Tensor,
        noise_level: float,
    ) -> Tensor:
        """Follow the flow in Euler steps with noise (`pi0.policy.flow_sde`), in as many as the configuration says.

        Args:
            images, image_masks, state, tokenized_prompt, tokenized_prompt_mask: as in `forward`.
            noise: standard normal, float [1 + K, B, H, A] or [1 + K, S, B, H, A], with K = `config.num_steps`: where
                the flow begins, then the noise of each step.
            noise_level: of the steps; with 0 the actions are those of `sample_actions`, to the bit.

        Returns:
            Where the flow is before each step and, at last, the normalised actions, in the shape of the noise.
        """
        observation = (images, image_masks, tokenized_prompt, tokenized_prompt_mask)
        return torch.stack(
            list(self._follow_flow(observation, state, noise[0], None, None, noise[1:], noise_level))
        )

    def _follow_flow(
        self,
        observation: tuple,
        state: Tensor,
        start: Tensor,
        num_steps: int | None,
        guidance_weight: float | None,
        step_noise: Tensor | None = None,
        noise_level: float = 0.0,
    ) -> Iterator[Tensor]:
        """Where the flow is before each Euler step and after the last, each in the shape of `start`."""
        prefix = self._run(Pi0Network.encode_prefix, *observation)
        steps = self.config.num_steps if num_steps is None else num_steps
        if steps < 1:
            raise ValueError(f"num_steps must be at least 1, not {steps}")
        x_t = start.reshape(-1, *start.shape[-2:])
        for step in range(steps):
            yield x_t.view(start.shape)
            t = torch.full((len(x_t),), 1 - step / steps, dtype=start.dtype, device=start.device)
            velocity = self.guided_velocity(prefix, state, x_t, t, guidance_weight)
            x_t = step_mean(x_t, velocity, step, steps, noise_level)
            if step_noise is not None:
                x_t = x_t + step_std(step, steps, noise_level) * step_noise[step].view(x_t.shape)
        yield x_t.view(start.shape)

    def guided_velocity(
        self, prefix: PrefixCache, state: Tensor, x_t: Tensor, t: Tensor, weight: float | None
    ) -> Tensor:
        """Velocity [B, H, A] under guidance (Ho and Salimans 2021); both conditions go through in one batch."""
        if weight is None or weight == 0:
            return self._run(Pi0Network.velocity, prefix, state, x_t, t)
        positive = torch.full((len(x_t),), POSITIVE, device=x_t.device)
        if weight == 1:
            return self._run(Pi0Network.velocity, prefix, state, x_t, t, positive)
        condition = torch.cat([torch.full_like(positive, NULL), positive])
        both = self._run(Pi0Network.velocity, prefix, state, x_t.repeat(2, 1, 1), t.repeat(2), condition)
        null, good = both.chunk(2)
        return null + weight * (good - null)

    def _run(self, network_pass: Callable[..., Any], *arguments: Any) -> Any:
        """Run a pass through the network, compiled if `self.compiled`."""
        return (_compiled(network_pass) if self.compiled else network_pass)(self.network, *arguments)

    # The robot's observations and actions

    @property
    def device(self) -> torch.device:
        return self.network.action_in_proj.weight.device

    @property
    def tokenizer(self) -> Tokenizer:
        """The configuration's tokenizer; it is loaded on first use."""
        if self._tokenizer is None:
            length = self.config.prompt_length
            if self.config.tokenizer == "tiny":
                self._tokenizer = TinyTokenizer(length)
            else:
                self._tokenizer = PaligemmaTokenizer(self.config.tokenizer_path, length)
            if self._tokenizer.vocab_size > self.config.vocab_size:
                raise CheckpointError(
                    f"{self.config.source}: the {self.config.tokenizer} tokenizer knows "
                    f"{self._tokenizer.vocab_size} tokens, the model {self.config.vocab_size}; name the tokenizer that "
                    "it was trained with (tokenizer, tokenizer_path)"
                )
        return self._tokenizer

    def prepare(self, observations: Mapping[str, Any], state_noise: Tensor | None = None) -> dict[str, Any]:
        """Turn raw observations into the keyword arguments of `forward` and `sample_actions`.

        Args:
            observations: a batch, as arrays or tensors:
                images: for each camera, uint8 [B, h, w, 3], upright. A configured camera without images is black
                    and masked out (openpi, src/openpi/policies/libero_policy.py: LIBERO has no second
                    wrist); other names are an error.
                state: float [B, robot_state_dim]; LIBERO's is end-effector position 3 (m), axis-angle 3
                    (rad), gripper fingers 2 (m) (openpi, examples/libero/main.py).
                prompt: B strings.
            state_noise: float [B, A], added to the normalised state before the prompt spells it.

        Returns:
            images, image_masks, state, tokenized_prompt and tokenized_prompt_mask, on the policy's device.

        Raises:
            ValueError: wrong shapes, unknown cameras, or batch sizes that differ.
            CheckpointError: the policy has no statistics.
        """
        config, device = self.config, self.device
        state = torch.as_tensor(observations["state"], dtype=torch.float32, device=device)
        if state.ndim != 2 or state.shape[1] != config.robot_state_dim:
            raise ValueError(f"state has shape {list(state.shape)}, expected [B, {config.robot_state_dim}]")
        given = observations["images"]
        unknown = [name for name in given if name not in config.cameras]
        if unknown or not given:
            raise ValueError(
                f"images of {unknown or 'no camera'}; the model's cameras are {', '.join(config.cameras)}"
            )
        images, masks = {}, {}
        for name in config.cameras:
            masks[name] = torch.full((len(state),), name in given, device=device)
            if name in given:
                images[name] = to_network_images(
                    torch.as_tensor(given[name], device=device), config.image_size, config.mirror_images
                )
            else:
                images[name] = torch.full(
                    (len(state), 3, config.image_size, config.image_size), -1.0, device=device
                )
        state = self._normalize(state, self._stats().state)
        if state_noise is not None:
            state = state + state_noise.to(device)
        spelt = None
        if config.discrete_state_input:
            spelt = state if config.pad_discrete_state else state[:, : config.robot_state_dim]
            spelt = spelt.float().cpu().numpy()
        tokens, token_masks = self.tokenizer.encode_batch(list(observations["prompt"]), spelt)
        sizes = {len(state), len(tokens), *(len(image) for image in images.values())}
        if len(sizes) > 1:
            raise ValueError(f"images, state and prompt disagree on the batch size: {sorted(sizes)}")
        return {
            "images": images,
            "image_masks": masks,
            "state": state,
            "tokenized_prompt": torch.as_tensor(tokens, device=device),
            "tokenized_prompt_mask": torch.as_tensor(token_masks, device=device),
        }

    def select_action(
        self,
        observations: Mapping[str, Any],
        noise: Tensor,
        num_steps: int | None = None,
        guidance_weight: float | None = None,
    ) -> Tensor:
        """Action chunks for raw observations.

        Args:
            observations: as in `prepare`.
            noise: standard normal, float [B, H, A] or [S, B, H, A]: the only randomness.
            num_steps, guidance_weight: as in `sample_actions`.

        Returns:
            Actions, float32 [B, H, robot_action_dim] or [S, B, H, robot_action_dim], clipped to the
            controller's range [-1, 1].
        """
        noise = noise.to(self.device)
        actions = self.sample_actions(
            **self.prepare(observations), noise=noise, num_steps=num_steps, guidance_weight=guidance_weight
        )
        return self.unnormalize_actions(actions, observations["state"]).clamp(-1, 1)

    def normalize_actions(
        self, actions: Tensor | np.ndarray, states: Tensor | np.ndarray | None = None
    ) -> Tensor:
        """Robot actions [..., H, robot_action_dim] to network actions [..., H, A], zero-padded.

        Args:
            actions: chunks.
            states: raw states [..., robot_state_dim] at which the chunks were chosen; for `delta_actions`.
        """
        actions = torch.as_tensor(actions, dtype=torch.float32, device=self.device)
        if actions.shape[-1] != self.config.robot_action_dim:
            raise ValueError(
                f"actions have {actions.shape[-1]} features, expected {self.config.robot_action_dim}"
            )
        if self.delta_actions:
            actions = subtract_state(actions, self._states(states))
        return self._normalize(actions, self._stats().actions)

    def unnormalize_actions(self, actions: Tensor, states: Tensor | np.ndarray | None = None) -> Tensor:
        """Network actions [..., H, A] to the robot's, float32 [..., H, robot_action_dim], not clipped.

        Args:
            actions: chunks.
            states: as in `normalize_actions`.
        """
        actions = actions[..., : self.config.robot_action_dim].float()
        actions = unnormalize(actions, self._stats().actions, self.config.use_quantile_norm)
        return add_state(actions, self._states(states)) if self.delta_actions else actions

    def _states(self, states: Tensor | np.ndarray | None) -> Tensor:
        if states is None:
            raise ValueError("this policy's actions are relative to the state (delta_actions); pass states")
        return torch.as_tensor(states, dtype=torch.float32, device=self.device)

    def _normalize(self, values: Tensor, stats: Stats) -> Tensor:
        normal = normalize(values, stats, self.config.use_quantile_norm)
        return nn.functional.pad(normal, (0, self.config.action_dim - values.shape[-1]))

    def _stats(self) -> NormStats:
        if self.norm_stats is None:
            raise CheckpointError(
                "this policy has no normalisation statistics (no norm_stats.json in its policy folder); name one as "
                "norm_stats_path; python -m pi0.norm_stats computes it"
            )
        return self.norm_stats


@functools.cache
def _compiled(network_pass: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(network_pass)


@contextmanager
def _without_start_values() -> Iterator[None]:
    """Skip the initialisation of modules that are made meanwhile: their weights come from a file.

    On the meta device it has no effect, but takes over a second: PyTorch imports its symbolic shapes.
    """
    names = ("normal_", "trunc_normal_", "kaiming_uniform_", "uniform_", "zeros_", "ones_")
    originals = {name: getattr(nn.init, name) for name in names}
    try:
        for name in names:
            setattr(nn.init, name, lambda tensor, *_, **__: tensor)
        yield
    finally:
        for name, original in originals.items():
            setattr(nn.init, name, original)


def pick_device(name: str) -> torch.device:
    """The device called `name`; `auto` is the GPU if there is one, under torchrun the rank's own GPU.

    Raises:
        InputError: there is no such device here.
    """
    if name == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"device = {name!r}: {error}") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"device = {name!r}: PyTorch sees {torch.cuda.device_count()} GPUs here; use auto or cpu"
        )
    return device
