"""`PI0_CFG_Adapter`: from episodes and their advantages to a loss.

`weighted`: the advantage of an episode is the weight of each of its executed chunks. Positive advantages
pull the flow towards the chunk's actions. Negative ones are scaled by `negative_weight`. They push away only while
the chunk's loss is below `NEGATIVE_CLIP`: the flow-matching loss has no upper bound, so an unclipped push
would dominate everything else in the end (`tests/test_cfg_adapter.py` shows both).

`guidance`: classifier-free guidance RL (Frans et al. 2025). The chunk's optimality (whether its advantage is above
zero) is a condition of the flow. A share of the chunks has no condition, so that the unconditional flow is learned
from the same data. Acting follows v_null + w (v_positive - v_null). The weight of a chunk is the size of its
advantage, for failures times `negative_weight`. With equal weights, failures, which are longer, would be most of an
iteration's data, and the weights that both conditions share would learn to imitate them.

`ratio`: the policy gradient, by clipped ratios of the probabilities of the flow's noisy steps (`pi0.ript.flow_ratio`).
Advantages of failures count in full: the clip bounds how far a chunk is pushed away.

Unanimous groups (advantage 0) do not show what is better and are left out in all modes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pi0 import PI0Policy
from pi0.base.errors import InputError
from pi0.data.chunks import Chunks
from pi0.libero.episodes import ROBOT, Episode
from pi0.model.network import NEGATIVE, NULL, POSITIVE
from pi0.ranks.collectives import gather, mean_over_ranks, rank_and_world_size
from pi0.ript.flow_ratio import Paths, RatioSums, clipped_ratio_loss, noise_of, step_log_probs, trace
from pi0.training.flow_loss import Augmentation, flow_loss

MODES = ("weighted", "guidance", "ratio")
NEGATIVE_CLIP = (
    1.0  # flow loss of a policy that predicts the mean velocity of standardised actions is about 2
)


class OutOfMemory(Exception):
    """Memory ran out, and this process cannot continue alone; `passes` may be enough for a minibatch."""

    def __init__(self, passes: int):
        super().__init__(f"memory ran out; {passes} passes for a minibatch may be enough")
        self.passes = passes


@dataclass
class WeightedChunks:
    """Chunks with the weights and conditions of their loss.

    Attributes:
        chunks: N chunks.
        weights: float32 [N]; the loss is sum(weights * flow loss) / sum(|weights|). In mode ratio, advantages.
        optimality: int64 [N], `POSITIVE` or `NEGATIVE`.
        paths: how the flow came to them, in mode ratio; else None.
    """

    chunks: Chunks
    weights: Tensor
    optimality: Tensor
    paths: Paths | None = None

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, index: Tensor) -> WeightedChunks:
        paths = None if self.paths is None else self.paths[index]
        return WeightedChunks(self.chunks[index], self.weights[index], self.optimality[index], paths)

    def state_dict(self) -> dict:
        """Tensors and strings, for a checkpoint."""
        paths = {} if self.paths is None else vars(self.paths)
        return {**vars(self.chunks), "weights": self.weights, "optimality": self.optimality, **paths}

    @staticmethod
    def from_state(state: dict) -> WeightedChunks:
        """The inverse of `state_dict`."""
        chunks = Chunks(**{name: state[name] for name in ("images", "states", "prompts", "actions", "valid")})
        paths = Paths(state["points"], state["log_probs"]) if "points" in state else None
        return WeightedChunks(chunks, state["weights"], state["optimality"], paths)

    @staticmethod
    def empty(cameras: Sequence[str], image_size: int, chunk: int) -> WeightedChunks:
        """No chunks: the training data of a rank that collected nothing."""
        none = torch.zeros(0)
        return WeightedChunks(Chunks.empty(cameras, image_size, chunk, ROBOT), none, none.long())

    def weightless(self) -> WeightedChunks:
        """One blank chunk of weight 0 and the same shapes, for a network that needs at least one."""
        blank = torch.zeros(1)
        return WeightedChunks(self.chunks.blank(), blank, blank.long())

    @staticmethod
    def cat(parts: Sequence[WeightedChunks]) -> WeightedChunks:
        """All chunks of `parts`, in order; those of a mode have paths all or none, but for parts without chunks."""
        paths = [part.paths for part in parts if part.paths is not None]
        return WeightedChunks(
            Chunks.cat([part.chunks for part in parts]),
            torch.cat([part.weights for part in parts]),
            torch.cat([part.optimality for part in parts]),
            Paths.cat(paths) if paths else None,
        )


class PI0_CFG_Adapter:
    """The training loss of RIPT for a pi0 policy.

    Args:
        policy: trained in place; it needs `config.guidance` in guidance mode.
        mode: `weighted`, `guidance` or `ratio`.
        noise_samples: draws of noise and time for each chunk; in mode ratio so many of the flow's steps, all of them
            if there are fewer.
        negative_weight: factor of negative advantages, 0 to 1; 0 leaves failures out. Mode ratio does not use it.
        condition_dropout: share of chunks that train the unconditional flow (guidance mode), 0 to 1.
        noise_level: noise of the flow's steps with which the policy acted (mode ratio), above 0.
        ratio_clip: a ratio counts up to so far from 1 (mode ratio).
        augmentation: random changes to the observations. Mode ratio makes none: it asks for the probability of what
            was done at what was seen.
        model: distributed wrapper of the policy, called for the loss; it averages gradients over ranks. Every rank
            must call it equally often, also with few or no chunks. None: the policy itself.
        mixed_precision: compute the loss in bfloat16 where PyTorch's autocast considers it safe.

    Raises:
        ValueError: an unknown mode, or guidance mode and a policy without an optimality condition.
    """

    def __init__(
        self,
        policy: PI0Policy,
        *,
        mode: str = "weighted",
        noise_samples: int = 4,
        negative_weight: float = 0.0,
        condition_dropout: float = 0.1,
        noise_level: float = 0.5,
        ratio_clip: float = 0.2,
        augmentation: Augmentation | None = None,
        model: nn.Module | None = None,
        mixed_precision: bool = False,
    ):
        if mode not in MODES:
            raise ValueError(f"unknown mode {mode!r}; use one of {', '.join(MODES)}")
        if mode == "guidance" and not policy.config.guidance:
            raise ValueError("guidance mode needs a policy with an optimality condition (config.guidance)")
        self.policy = policy
        self.mode = mode
        self.noise_samples = noise_samples
        self.negative_weight = negative_weight
        self.condition_dropout = condition_dropout
        self.noise_level = noise_level
        self.ratio_clip = ratio_clip
        self.augmentation = augmentation
        self.model = model or policy
        self.mixed_precision = mixed_precision
        self.passes = 1  # passes in which a minibatch is computed; more after memory ran out
        self._moved = RatioSums()

    def weigh(
        self, episodes: Sequence[Episode], advantages: Sequence[float], acted: PI0Policy | None = None
    ) -> WeightedChunks | None:
        """The chunks whose weight is not 0; None if there are none.

        Args:
            episodes: finished rollouts.
            advantages: one for each episode.
            acted: the policy that acted in them, with the same weights; None: the one in training. Mode ratio needs it.
        """
        parts, noise = [], []
        for episode, advantage in zip(episodes, advantages, strict=True):
            weight = self._weight(advantage)
            if weight != 0.0:
                chunks = Chunks.of(episode)
                optimality = POSITIVE if advantage > 0 else NEGATIVE
                parts.append(
                    WeightedChunks(
                        chunks, torch.full((len(chunks),), weight), torch.full((len(chunks),), optimality)
                    )
                )
                if self.mode == "ratio":
                    noise.append(noise_of(self.policy, episode, self.noise_level))
        if not parts:
            return None
        batch = WeightedChunks.cat(parts)
        if self.mode == "ratio":
            of_acting = (acted or self.policy, batch.chunks, torch.cat(noise), self.noise_level)
            batch.paths = trace(*of_acting, self.mixed_precision)
        return batch

    def compute_weighted_loss(
        self, episodes: Sequence[Episode], advantages: Sequence[float], generator: torch.Generator
    ) -> Tensor:
        """Loss of all executed chunks at once, a scalar with gradient; 0 if nothing can be learned.

        The stages do its two steps separately: `weigh`, then `minibatch_loss` for each minibatch.

        Args:
            episodes: finished rollouts.
            advantages: one for each episode.
            generator: source of noise, times, condition dropout and augmentation, on the CPU.
        """
        batch = self.weigh(episodes, advantages)
        if batch is None:
            return torch.zeros((), device=self.policy.device, requires_grad=True)
        return self.minibatch_loss(batch, generator)

    def minibatch_loss(
        self, batch: WeightedChunks, generator: torch.Generator, divisor: Tensor | None = None
    ) -> Tensor:
        """Weighted loss of a batch: sum(weights * loss) / sum(|weights|), a scalar with gradient.

        In mode ratio the loss of a chunk is the mean over its steps of PPO's, times the number of steps in a path: an
        unbiased estimate of the sum over all of them.

        In a distributed run the divisor is the mean over ranks. The mean of the ranks' gradients is then the gradient
        of the loss over all their chunks, however unevenly the chunks are distributed.

        Args:
            batch: chunks; may be empty.
            generator: source of noise, times, condition dropout and augmentation, on the CPU.
            divisor: the divisor if it is known; None: the ranks compute it together.
        """
        if len(batch) == 0:
            batch = batch.weightless()
        whole = self._divisor(batch) if divisor is None else divisor
        if self.mode == "ratio":
            return self._ratio_losses(batch, generator).sum() / whole
        condition = self._conditions(batch.optimality, generator) if self.mode == "guidance" else None
        losses = flow_loss(
            self.policy,
            batch.chunks,
            samples=self.noise_samples,
            generator=generator,
            augmentation=self.augmentation,
            condition=condition,
            model=self.model,
        )
        weights = batch.weights.to(losses)
        bounded = torch.where(weights < 0, losses.clamp(max=NEGATIVE_CLIP), losses)
        return (weights * bounded).sum() / whole.to(losses)

    def _ratio_losses(self, batch: WeightedChunks, generator: torch.Generator) -> Tensor:
        """Loss of each chunk, float [N], for as many of its steps as there are draws of noise in other modes."""
        paths = Paths.blank(self.policy) if batch.paths is None else batch.paths
        count = paths.log_probs.shape[1]
        order = torch.rand(count, len(batch), generator=generator).argsort(0)
        steps = order[: self.noise_samples]  # [S, N], other ones for each chunk
        log_probs = step_log_probs(
            self.policy, batch.chunks, paths.points, steps, self.noise_level, self.model
        )
        acted = paths.log_probs.gather(1, steps.T).T.to(log_probs)
        advantages = batch.weights.to(log_probs)
        self._moved.add(log_probs - acted, advantages, self.ratio_clip)
        return clipped_ratio_loss(log_probs, acted, advantages, self.ratio_clip).mean(0) * count

    def ratio_metrics(self) -> dict[str, float]:
        """How far the policy moved from the one that acted, since the last call, on all ranks; {} in other modes."""
        moved, self._moved = self._moved, RatioSums()
        return moved.over_ranks() if self.mode == "ratio" else {}

    def accumulate_gradient(
        self, batch: WeightedChunks, generator: torch.Generator, steps: int, retry: bool = True
    ) -> float:
        """Add 1/`steps` of the gradient of `minibatch_loss`; returns the loss.

        If memory runs out on any rank, all ranks drop the gradients accumulated so far, and from then on a minibatch
        takes twice as many passes. The model must not synchronise gradients by itself, so that no rank waits within a
        pass for one that has stopped; `average_gradients` does it afterwards.

        Args:
            batch: chunks; may be empty.
            generator: as for `minibatch_loss`.
            steps: minibatches in an optimizer step.
            retry: False if ranks must wait for each other within a pass (FSDP2).
        Raises:
            InputError: memory ran out, and each pass already has only one chunk.
            OutOfMemory: memory ran out, and `retry` is False.
        """
        divisor = self._divisor(batch)
        while True:
            loss = self._try_in_passes(batch, generator, steps, divisor, retry)
            short = [rank for rank, value in enumerate(gather(loss)) if value is None]
            if loss is not None and not short:
                return loss
            self.policy.zero_grad(set_to_none=True)
            self.passes *= 2
            where = f" on rank {short[0]}" if rank_and_world_size()[1] > 1 else ""
            print(f"memory ran out{where}: minibatches are computed in {self.passes} passes")

    def _try_in_passes(
        self, batch: WeightedChunks, generator: torch.Generator, steps: int, divisor: Tensor, retry: bool
    ) -> float | None:
        """Add the gradient of a minibatch and return its loss; None if memory ran out and more passes may help."""
        loss = 0.0
        try:
            # Every rank makes the same number of passes, however few chunks it has: with shards they run together.
            for index in torch.arange(len(batch)).tensor_split(self.passes):
                part = batch if self.passes == 1 else batch[index]
                with torch.autocast(self.policy.device.type, torch.bfloat16, enabled=self.mixed_precision):
                    part_loss = self.minibatch_loss(part, generator, divisor)
                (part_loss / steps).backward()
                loss += part_loss.item()
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
                raise
            if self.passes >= len(batch):
                raise InputError(
                    f"memory ran out with a single chunk in a pass, {self.noise_samples} draws of noise; lower "
                    "algo.noise_samples, or set training.gradient_checkpointing = true"
                ) from error
            if not retry:
                raise OutOfMemory(2 * self.passes) from error
            return None
        return loss

    @staticmethod
    def _divisor(batch: WeightedChunks) -> Tensor:
        return mean_over_ranks(batch.weights.abs().sum())

    @staticmethod
    def minibatches(
        batch: WeightedChunks, parts: int, generator: torch.Generator
    ) -> Iterator[WeightedChunks]:
        """One shuffled pass over `batch` in `parts` of equal size; with too few chunks some parts are empty."""
        order = torch.randperm(len(batch), generator=generator)
        for index in order.tensor_split(parts):
            yield batch[index]

    @staticmethod
    def count_minibatches(batch: WeightedChunks, size: int) -> int:
        """Minibatches of at most `size` chunks in one pass."""
        return -(-len(batch) // size)

    def _weight(self, advantage: float) -> float:
        if advantage > 0 or self.mode == "ratio":
            return advantage
        return self.negative_weight * (abs(advantage) if self.mode == "guidance" else advantage)

    def _conditions(self, optimality: Tensor, generator: torch.Generator) -> Tensor:
        dropped = torch.rand(len(optimality), generator=generator) < self.condition_dropout
        return torch.where(dropped, NULL, optimality).to(self.policy.device)
