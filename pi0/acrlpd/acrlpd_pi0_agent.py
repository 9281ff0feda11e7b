"""The agent: its losses, its steps, and the averages of its weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pi0 import PI0Policy
from pi0.acrlpd.actor import Actor, Observations, Pi0Actor
from pi0.acrlpd.checkpointing import name_parts, networks, optimizers
from pi0.acrlpd.config import RLTrainConfig
from pi0.acrlpd.critic_networks import CriticNetworks, ObservationFeatures
from pi0.acrlpd.loss_functions import (
    Aggregation,
    advantage_weights,
    aggregate,
    chunk_target,
    effective_sample_size,
    possible_values,
    temperature_loss,
    weights_divergence,
)
from pi0.ranks.collectives import average_gradients, gather_rows, mean_over_ranks, rank_and_world_size
from pi0.ranks.sharding import whole
from pi0.training.ema import AveragedModule
from pi0.training.random_state import OwnStream
from pi0.training.state import TrainingState, trained_state

Batch = Mapping[str, Any]  # docs/acrlpd.md, "Batch"
Info = dict[str, float]
SMALLEST = 1e-9  # a number of windows that means none


@dataclass(frozen=True)
class LossSettings:
    """How the losses are put together.

    Attributes:
        aggregation: of the target critics.
        temperature: beta of the actor's weights; where it start if it is learned.
        divergence: KL of the weights, nats, to which a learned temperature leads.
        awr_weight: weight of the flow loss that the advantages weigh.
        best_weight: weight of the flow loss on the best sample.
        flow_samples: draws of noise and time for each window of a flow loss.
        value_range: lowest and highest value that the rewards allow.
        grad_norm: gradients of the actor and of the critics are each scaled down to this norm.
    """

    aggregation: Aggregation = "min"
    temperature: float = 0.1
    divergence: float = 0.5
    awr_weight: float = 1.0
    best_weight: float = 1.0
    flow_samples: int = 4
    value_range: tuple[float, float] | None = None
    grad_norm: float = 1.0


@dataclass(frozen=True)
class Judgement:
    """What the critics say of a batch; nothing of it has a gradient.

    Attributes:
        advantages: value of each window's chunk less the mean over the samples, float, of the windows of all ranks.
        weights: exp(advantage / temperature) of this rank's windows, [B]; the mean over all ranks' windows is 1.
        best: the best sample of each of this rank's windows, [B, C, A].
        best_over_mean: its value less the mean over the samples, [B].
    """

    advantages: Tensor
    weights: Tensor
    best: Tensor
    best_over_mean: Tensor


class ACRLPDPi0Agent:
    """An actor that samples chunks, critics that value them, and slow averages of both.

    The averaged actor samples; the averaged critics choose among samples and weigh what the actor learns; the target
    critics value what comes after a window.

    In a distributed run each rank gives a batch of its own windows, and all ranks call the same methods together. The
    losses are means over the windows of all ranks, however unevenly they are distributed: the mean of the ranks'
    gradients is their gradient. What a method says of a batch is the same on all ranks.

    Attributes:
        pi0_model, critic_networks: in training.
        target_critic: follows the critics by `target_update_rate`.
        pi0_ema, critic_ema: averages, in float32; without `use_ema` they are the trained modules themselves.
        log_temperature: scalar parameter.
        generator: draws all noise, on the CPU.

    Args:
        pi0_model: the actor.
        critic_networks: the critics.
        features: observations to features; trained with the critics if it has weights that are.
        num_action_samples: N, samples among which the best is chosen.
        horizon_length: H, steps of a window.
        real_action_dim: features of an action without padding.
        discount: per control step.
        target_update_rate: share by which an update moves the target critics.
        bc_loss_weight: weight of behaviour cloning.
        use_ema, pi0_ema_decay, critic_ema_decay: averages, and how slow they are.
        pi0_opt_state, critic_opt_state, temp_opt_state: optimizers of the actor, of critics and features, and of
            `log_temperature`; None for the last: the temperature is fixed.
        settings: of the losses.
        seed: of `generator`.

    Raises:
        ValueError: a number is out of range, or the critics are of other chunks.
    """

    def __init__(
        self,
        pi0_model: Actor,
        critic_networks: CriticNetworks,
        features: nn.Module,
        num_action_samples: int,
        horizon_length: int,
        real_action_dim: int,
        discount: float = 0.99,
        target_update_rate: float = 0.005,
        bc_loss_weight: float = 0.1,
        use_ema: bool = True,
        pi0_ema_decay: float = 0.999,
        critic_ema_decay: float = 0.99,
        pi0_opt_state: torch.optim.Optimizer | None = None,
        critic_opt_state: torch.optim.Optimizer | None = None,
        temp_opt_state: torch.optim.Optimizer | None = None,
        *,
        log_temperature: nn.Parameter | None = None,
        settings: LossSettings | None = None,
        seed: int = 0,
    ):
        self.settings = settings or LossSettings()
        _require(num_action_samples >= 1, f"num_action_samples is {num_action_samples}; it must be 1 or more")
        _require(0 < discount <= 1, f"discount is {discount}; it must be above 0 and at most 1")
        _require(
            1 <= horizon_length <= pi0_model.chunk,
            f"horizon_length is {horizon_length}; the actor's chunks have {pi0_model.chunk} actions",
        )
        _require(
            (critic_networks.horizon, critic_networks.action_dim) == (horizon_length, real_action_dim),
            f"the critics value {critic_networks.horizon} actions of {critic_networks.action_dim} features, not "
            f"{horizon_length} of {real_action_dim}",
        )
        self.pi0_model, self.critic_networks, self.features = pi0_model, critic_networks, features
        self.num_action_samples, self.horizon_length = num_action_samples, horizon_length
        self.real_action_dim, self.discount = real_action_dim, discount
        self.target_update_rate, self.bc_loss_weight = target_update_rate, bc_loss_weight
        self.use_ema = use_ema
        self.pi0_ema_decay, self.critic_ema_decay = pi0_ema_decay, critic_ema_decay
        self.pi0_opt_state, self.critic_opt_state = pi0_opt_state, critic_opt_state
        self.temp_opt_state = temp_opt_state
        self.log_temperature = (
            nn.Parameter(torch.tensor(self.settings.temperature).log())
            if log_temperature is None
            else log_temperature
        )
        self.target_critic = copy.deepcopy(critic_networks)
        self.pi0_ema: Any = pi0_model
        self.critic_ema: CriticNetworks = critic_networks
        self._averages: list[AveragedModule] = []
        if use_ema:
            self.pi0_ema = pi0_model.copy()
            for weight in self.pi0_ema.parameters():
                if weight.requires_grad:
                    weight.data = weight.data.float()
            self.critic_ema = copy.deepcopy(critic_networks)
            self._averages = [
                AveragedModule(pi0_model, self.pi0_ema, pi0_ema_decay),  # type: ignore[type-var]
                AveragedModule(critic_networks, self.critic_ema, critic_ema_decay),
            ]
        self.generator = torch.Generator().manual_seed(seed)

    # Its state -----------------------------------------------------------------------------------

    def create_train_state(self, step: int = 0) -> TrainingState:
        """The parts of a checkpoint of the agent alone, named as `pi0.acrlpd.checkpointing` names them."""
        state = TrainingState()
        name_parts(state, self, None, OwnStream(self.generator, 0))
        state.step = step
        state.begin()
        return state

    def to_train_state(self, step: int = 0, epoch: int = 0) -> dict[str, Any]:
        """The state as a tree of tensors and plain values, for `pi0.acrlpd.pytree_checker`; nothing is copied."""
        tree: dict[str, Any] = {name: trained_state(module) for name, module in networks(self).items()}
        tree |= {name: optimizer.state_dict() for name, (optimizer, _) in optimizers(self).items()}
        return tree | {"step": step, "epoch": epoch}

    def create_openpi_train_state(self, step: int = 0) -> dict[str, Any]:
        """The actor alone, with the names of openpi's training state (src/openpi/training/utils.py, `TrainState`)."""
        tree = self.to_train_state()
        return {
            "step": step,
            "params": tree["pi0_params"],
            "opt_state": tree.get("pi0_opt_state"),
            "ema_decay": self.pi0_ema_decay if self.use_ema else None,
            "ema_params": tree["pi0_ema_params"] if self.use_ema else None,
        }

    # Samples and their values --------------------------------------------------------------------

    @torch.no_grad()
    def sample(self, observations: Observations, count: int | None = None) -> Tensor:
        """Chunks [S, B, C, A] of the averaged actor; `count` None means `num_action_samples`."""
        shape = (count or self.num_action_samples, len(observations["state"]), self.pi0_model.chunk)
        noise = torch.randn(*shape, self.pi0_model.action_dim, generator=self.generator)
        return self.pi0_ema.sample(observations, noise.to(observations["state"].device))

    def valued(self, chunks: Tensor, observations: Observations) -> Tensor:
        """The part of chunks [..., B, C, A] that a critic sees: H actions as they would be carried out."""
        return self.pi0_model.carried_out(chunks[..., : self.horizon_length, :], observations)

    @torch.no_grad()
    def best_of(
        self, candidates: Tensor, observed: Tensor, observations: Observations
    ) -> tuple[Tensor, Tensor]:
        """The best candidate by the averaged critics.

        Args:
            candidates: [S, B, C, A].
            observed: of `critic_ema.observe`.
            observations: of the batch.

        Returns:
            Numbers of the best candidates, int64 [B]; the mean values of all, [S, B].
        """
        values = self.critic_ema.values(observed, self.valued(candidates, observations)).mean(0)
        return values.argmax(0), values

    # Losses --------------------------------------------------------------------------------------

    def compute_critic_loss(self, batch: Batch) -> tuple[Tensor, Info]:
        """Mean squared error of all critics, over the windows whose target is known."""
        then = batch["next_observations"]
        with torch.no_grad():
            features = self._features(batch, "next_features", then)
            candidates = batch.get("next_candidates")
            if candidates is None:
                candidates = self.sample(then)
            best, _ = self.best_of(candidates, self.critic_ema.observe(features, then["state"]), then)
            chosen = self.valued(_pick(candidates, best), then)
            next_values = aggregate(
                self.target_critic(features, then["state"], chosen), self.settings.aggregation
            )
            targets = chunk_target(
                batch["rewards"], batch["masks"], batch["valid"], next_values, self.discount,
                self.settings.value_range,
            )  # fmt: skip
        now = batch["observations"]
        values = self.critic_networks(
            self._features(batch, "features", now), now["state"], self.valued(batch["actions"], now)
        )
        known = batch["sequence_mask"].to(values)
        errors, middle = (values - targets).square().mean(0), values.mean(0)
        solved = batch["success"].to(values)
        info = _means(
            critic_loss=(errors, known),
            value=(middle, known),
            target=(targets, known),
            value_spread=(values.std(0), known),
            value_solved=(middle, solved),
            value_failed=(middle, 1 - solved),
            known=(known, torch.ones_like(known)),
        )
        return _part(errors, known), info

    def compute_actor_loss(self, batch: Batch) -> tuple[Tensor, Info]:
        """Flow loss weighted by exp(A / temperature), plus that on the best of N samples.

        A is the value of the window's chunk less the mean over the samples. Nothing of it has a gradient. A part whose
        weight is 0 is not computed.
        """
        judged = self._judge(batch)
        flow = self._flow_losses(batch, judged, recorded=self.settings.awr_weight > 0)
        return self._actor_loss(judged, flow)

    def compute_bc_loss(self, batch: Batch) -> tuple[Tensor, Info]:
        """Flow loss on the windows of successful episodes; 0 if there is none."""
        return self._bc_loss(batch, self._flow_losses(batch, None, recorded=True)["recorded"])

    def compute_loss(self, batch: Batch) -> tuple[Tensor, Info]:
        """Critic loss, actor loss and the weighted loss of behaviour cloning, added; and what each part says of itself."""
        total, info, _ = self._total_loss(batch)
        return total, info

    def _total_loss(self, batch: Batch) -> tuple[Tensor, Info, Judgement | None]:
        settings = self.settings
        total, info = self.compute_critic_loss(batch)
        info["loss"] = info["critic_loss"]
        judged = None
        if settings.awr_weight > 0 or settings.best_weight > 0 or self.temp_opt_state is not None:
            judged = self._judge(batch)
        recorded = settings.awr_weight > 0 or self.bc_loss_weight > 0
        flow = self._flow_losses(batch, judged, recorded)
        if judged is not None:
            actor, of_actor = self._actor_loss(judged, flow)
            total = total + actor
            info |= {**of_actor, "loss": info["loss"] + of_actor["actor_loss"]}
        if self.bc_loss_weight > 0:
            cloning, of_cloning = self._bc_loss(batch, flow["recorded"])
            total = total + self.bc_loss_weight * cloning
            info |= {**of_cloning, "loss": info["loss"] + self.bc_loss_weight * of_cloning["bc_loss"]}
        return total, info, judged

    @torch.no_grad()
    def _judge(self, batch: Batch) -> Judgement:
        now = batch["observations"]
        candidates = batch.get("candidates")
        if candidates is None:
            candidates = self.sample(now)
        observed = self.critic_ema.observe(self._features(batch, "features", now), now["state"])
        best, values = self.best_of(candidates, observed, now)
        taken = self.critic_ema.values(observed, self.valued(batch["actions"], now)[None]).mean(0)[0]
        parts = gather_rows(taken - values.mean(0))
        advantages = torch.cat(parts)
        weights = advantage_weights(advantages, self.log_temperature.exp().item())
        own = weights.split([len(part) for part in parts])[rank_and_world_size()[0]]
        return Judgement(advantages, own, _pick(candidates, best), values.amax(0) - values.mean(0))

    def _flow_losses(self, batch: Batch, judged: Judgement | None, recorded: bool) -> dict[str, Tensor]:
        """Flow losses [B] of the `recorded` chunks and, if they are judged and that is learned, of the `best` samples."""
        parts = {}
        if recorded:
            parts["recorded"] = (batch["actions"], batch["valid"])
        if judged is not None and self.settings.best_weight > 0:
            parts["best"] = (judged.best[:, : self.horizon_length], torch.ones_like(batch["valid"]))
        if not parts:
            return {}
        chunks, valid = (torch.stack(each) for each in zip(*parts.values(), strict=True))
        losses = self.pi0_model.flow_loss(
            batch["observations"], chunks, valid, self.generator, self.settings.flow_samples
        )
        return dict(zip(parts, losses, strict=True))

    def _actor_loss(self, judged: Judgement, flow: Mapping[str, Tensor]) -> tuple[Tensor, Info]:
        every = torch.ones_like(judged.best_over_mean)
        parts = {}  # by name: weight and losses
        if self.settings.awr_weight > 0:
            parts["weighted_loss"] = (self.settings.awr_weight, judged.weights * flow["recorded"])
        if self.settings.best_weight > 0:
            parts["best_loss"] = (self.settings.best_weight, flow["best"])
        of_parts = {name: (losses, every) for name, (_, losses) in parts.items()}
        info = _means(**of_parts, best_over_mean=(judged.best_over_mean, every))
        advantages, temperature = judged.advantages, self.log_temperature.exp().item()
        everywhere = advantage_weights(advantages, temperature)
        info |= {
            "actor_loss": sum(weight * info[name] for name, (weight, _) in parts.items()),
            "advantage": advantages.mean().item(),
            "advantage_spread": advantages.std().item() if len(advantages) > 1 else 0.0,
            "sample_size": effective_sample_size(everywhere).item(),
            "largest_weight": everywhere.max().item(),
            "weights_divergence": weights_divergence(advantages, temperature).item(),
            "temperature": temperature,
        }
        total = sum((weight * losses for weight, losses in parts.values()), torch.zeros_like(every))
        return _part(total, every), info

    def _bc_loss(self, batch: Batch, flow: Tensor) -> tuple[Tensor, Info]:
        solved = batch["success"].to(flow)
        info = _means(bc_loss=(flow, solved), solved_share=(solved, torch.ones_like(solved)))
        return _part(flow, solved), info

    def _features(self, batch: Batch, name: str, observations: Observations) -> Tensor:
        """Kept features, or new ones."""
        kept = batch.get(name)
        return self.features(observations) if kept is None else kept

    # Steps ---------------------------------------------------------------------------------------

    def train_step(self, batch: Batch) -> tuple[ACRLPDPi0Agent, Info]:
        """One step of all optimizers, in place; returns itself and what `compute_loss` says before the step.

        Raises:
            FloatingPointError: a gradient is not finite; nothing has changed.
        """
        _require(self.pi0_opt_state is not None, "the agent has no optimizer of its actor")
        self._clear_gradients()
        loss, info, judged = self._total_loss(batch)
        loss.backward()
        info |= self._apply(True, judged)
        return self, info

    def critic_step(self, batch: Batch) -> Info:
        """A step of the critics alone.

        Raises:
            FloatingPointError: as `train_step`.
        """
        self._clear_gradients()
        loss, info = self.compute_critic_loss(batch)
        loss.backward()
        return info | self._apply(False, None)

    def _apply(self, actor: bool, judged: Judgement | None) -> Info:
        """A step of the critics, of the `actor` and, where its chunks were judged, of the temperature."""
        _require(self.critic_opt_state is not None, "the agent has no optimizer of its critics")
        learns = {"critic_grad_norm": [self.critic_networks, self.features]}
        if actor:
            learns["actor_grad_norm"] = [self.pi0_model]
        norms = {}
        for name, modules in learns.items():
            for module in modules:
                average_gradients(module)
            weights = [p for module in modules for p in module.parameters() if p.requires_grad]
            norms[name] = whole(nn.utils.clip_grad_norm_(weights, self.settings.grad_norm)).item()
        bad = [name for name, norm in norms.items() if not math.isfinite(norm)]
        if bad:
            self._clear_gradients()
            raise FloatingPointError(f"{' and '.join(bad)} not finite")
        self.critic_opt_state.step()  # type: ignore[union-attr]
        if actor:
            self.pi0_opt_state.step()  # type: ignore[union-attr]
        if judged is not None and self.temp_opt_state is not None:
            self._temperature_step(judged.advantages)
        self.update_target_networks()
        self.update_ema_parameters(actor)
        self._clear_gradients()
        return norms

    def _temperature_step(self, advantages: Tensor) -> None:
        temperature_loss(advantages, self.log_temperature, self.settings.divergence).backward()
        self.temp_opt_state.step()  # type: ignore[union-attr]
        self.temp_opt_state.zero_grad(set_to_none=True)  # type: ignore[union-attr]

    def _clear_gradients(self) -> None:
        for optimizer in (self.pi0_opt_state, self.critic_opt_state):
            if optimizer is not None:
                optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def update_target_networks(self) -> None:
        """Move the target critics towards the critics by `target_update_rate`."""
        pairs = zip(self.target_critic.parameters(), self.critic_networks.parameters(), strict=True)
        torch._foreach_lerp_(*map(list, zip(*pairs, strict=True)), self.target_update_rate)

    def update_ema_parameters(self, actor: bool = True) -> None:
        """Move the averages towards what is trained; that of the actor only if `actor`."""
        for average in self._averages[0 if actor else 1 :]:
            average.update()


def create_acrlpd_pi0_agent(
    policy: PI0Policy,
    horizon_length: int,
    num_action_samples: int = 8,
    *,
    critics: int = 2,
    hidden: int = 256,
    layers: int = 3,
    features: str = "policy",
    mixed_precision: bool = False,
    seed: int = 0,
    **options: Any,
) -> ACRLPDPi0Agent:
    """An agent with a pi0 policy as its actor, without optimizers yet (`fsdp_support.create_global_optimizers`).

    Args:
        policy: its weights are trained, and what critics see is copied from it.
        horizon_length, num_action_samples: as for `ACRLPDPi0Agent`.
        critics, hidden, layers: sizes of `CriticNetworks`.
        features: what critics see, a key of `pi0.policy.critics.FEATURES`.
        mixed_precision: as for `Pi0Actor`.
        seed: of the critics' weights and of all noise.
        options: others of `ACRLPDPi0Agent`.

    Raises:
        ValueError: as `ACRLPDPi0Agent` and `CriticNetworks`.
    """
    torch.manual_seed(seed)
    actor = Pi0Actor(policy, mixed_precision)
    seen, robot = ObservationFeatures(actor, features), policy.config.robot_action_dim
    networks_ = CriticNetworks(
        seen.width, policy.config.action_dim, horizon_length, robot, critics, hidden, layers
    )
    return ACRLPDPi0Agent(
        actor,
        networks_.to(policy.device),
        seen.to(policy.device),
        num_action_samples,
        horizon_length,
        robot,
        seed=seed,
        **options,
    )


def create_acrlpd_pi0_agent_from_rl_config(config: RLTrainConfig, policy: PI0Policy) -> ACRLPDPi0Agent:
    """The agent of a configuration, without optimizers yet.

    Raises:
        ValueError: as `create_acrlpd_pi0_agent`.
    """
    settings, training = config.acrlpd, config.training
    longest = 1 if settings.one_reward else (config.task.max_episode_length or 10**6)
    reachable = possible_values(settings.lowest_reward, settings.highest_reward, longest, settings.discount)
    return create_acrlpd_pi0_agent(
        policy,
        config.qchunking.horizon_length,
        settings.num_action_samples,
        critics=settings.critics,
        hidden=settings.hidden,
        layers=settings.layers,
        features=settings.features,
        mixed_precision=training.use_mixed_precision,
        seed=training.seed,
        discount=settings.discount,
        target_update_rate=settings.target_update_rate,
        bc_loss_weight=settings.bc_loss_weight,
        use_ema=settings.use_ema,
        pi0_ema_decay=settings.pi0_ema_decay,
        critic_ema_decay=settings.critic_ema_decay,
        settings=LossSettings(
            aggregation=settings.aggregation,
            temperature=settings.temperature,
            divergence=settings.divergence or 0.5,
            awr_weight=settings.awr_weight,
            best_weight=settings.best_weight,
            flow_samples=settings.flow_samples,
            value_range=reachable,
            grad_norm=settings.grad_norm,
        ),
    )


def _pick(candidates: Tensor, best: Tensor) -> Tensor:
    """The candidate of each observation: [S, B, C, A] by [B] to [B, C, A]."""
    return candidates[best, torch.arange(candidates.shape[1], device=candidates.device)]


def _part(values: Tensor, counts: Tensor) -> Tensor:
    """This rank's part of the mean of `values` over the windows of all ranks that count, each [B].

    The mean over ranks of its gradients is the gradient of that mean.
    """
    return (values * counts).sum() / mean_over_ranks(counts.sum()).clamp(min=SMALLEST)


def _means(**parts: tuple[Tensor, Tensor]) -> Info:
    """Means of values [B] over the windows of all ranks that their counts [B] count; 0 if they count none."""
    sums = [((values.detach() * counts).sum(), counts.sum()) for values, counts in parts.values()]
    found = mean_over_ranks(torch.stack([torch.stack(pair) for pair in sums])).tolist()
    return {name: total / max(count, SMALLEST) for name, (total, count) in zip(parts, found, strict=True)}


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
