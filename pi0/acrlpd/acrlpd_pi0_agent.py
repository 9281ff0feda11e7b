"""The agent: its losses, its steps, and the averages of its weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pi0.acrlpd.actor import Actor, Observations
from pi0.acrlpd.critic_networks import CriticNetworks
from pi0.acrlpd.loss_functions import (
    Aggregation,
    advantage_weights,
    aggregate,
    chunk_target,
    effective_sample_size,
    temperature_loss,
    weights_divergence,
)
from pi0.training.ema import AveragedModule

Batch = Mapping[str, Any]  # docs/acrlpd.md, "Batch"
Info = dict[str, float]


@dataclass(frozen=True)
class LossSettings:
    """How the losses are put together.

    Attributes:
        aggregation: of the target critics.
        temperature: beta of the actor's weights; where it start if it is learned.
        divergence: KL of the weights, nats, to which a learned temperature leads.
        best_weight: weight of the flow loss on the best sample.
        flow_samples: draws of noise and time for each window of a flow loss.
        value_range: lowest and highest value that the rewards allow.
        grad_norm: gradients of the actor and of the critics are each scaled down to this norm.
    """

    aggregation: Aggregation = "min"
    temperature: float = 0.1
    divergence: float = 0.5
    best_weight: float = 1.0
    flow_samples: int = 4
    value_range: tuple[float, float] | None = None
    grad_norm: float = 1.0


class ACRLPDPi0Agent:
    """An actor that samples chunks, critics that value them, and slow averages of both.

    The averaged actor samples; the averaged critics choose among samples and weigh what the actor learns; the target
    critics value what comes after a window.

    Attributes:
        pi0_model, critic_networks: in training.
        target_critic: follows the critics by `target_update_rate`.
        pi0_ema, critic_ema: averages; without `use_ema` they are the trained modules themselves.
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
            self.critic_ema = copy.deepcopy(critic_networks)
            self._averages = [
                AveragedModule(pi0_model, self.pi0_ema, pi0_ema_decay),  # type: ignore[type-var]
                AveragedModule(critic_networks, self.critic_ema, critic_ema_decay),
            ]
        self.generator = torch.Generator().manual_seed(seed)

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
        errors = (values - targets).square().mean(0)
        loss = (errors * known).sum() / known.sum().clamp(min=1)
        info = {
            "critic_loss": loss.item(),
            "value": _mean_of(values.detach().mean(0), known),
            "target": _mean_of(targets, known),
            "value_spread": _mean_of(values.detach().std(0), known),
            "known": known.mean().item(),
        }
        return loss, info

    def compute_actor_loss(self, batch: Batch) -> tuple[Tensor, Info]:
        """Flow loss weighted by exp(A / temperature), plus that on the best of N samples.

        A is the value of the window's chunk less the mean over the samples. Nothing of it has a gradient.
        """
        return self._actor_loss(batch, self._flow_loss_of_data(batch))

    def compute_bc_loss(self, batch: Batch) -> tuple[Tensor, Info]:
        """Flow loss on the windows of successful episodes; 0 if there is none."""
        return self._bc_loss(batch, self._flow_loss_of_data(batch))

    def compute_loss(self, batch: Batch) -> tuple[Tensor, Info]:
        """Critic loss, actor loss and the weighted loss of behaviour cloning, added; and what each part says of itself."""
        critic, of_critic = self.compute_critic_loss(batch)
        flow = self._flow_loss_of_data(batch)
        actor, of_actor = self._actor_loss(batch, flow)
        cloning, of_cloning = self._bc_loss(batch, flow)
        total = critic + actor + self.bc_loss_weight * cloning
        return total, {**of_critic, **of_actor, **of_cloning, "loss": total.item()}

    def _flow_loss_of_data(self, batch: Batch) -> Tensor:
        return self.pi0_model.flow_loss(
            batch["observations"],
            batch["actions"],
            batch["valid"],
            self.generator,
            self.settings.flow_samples,
        )

    def _actor_loss(self, batch: Batch, flow: Tensor) -> tuple[Tensor, Info]:
        now, settings = batch["observations"], self.settings
        with torch.no_grad():
            candidates = batch.get("candidates")
            if candidates is None:
                candidates = self.sample(now)
            observed = self.critic_ema.observe(self._features(batch, "features", now), now["state"])
            best, values = self.best_of(candidates, observed, now)
            taken = self.critic_ema.values(observed, self.valued(batch["actions"], now)[None]).mean(0)[0]
            advantages = taken - values.mean(0)
            temperature = self.log_temperature.exp().item()
            weights = advantage_weights(advantages, temperature)
            chosen = _pick(candidates, best)
        weighted = (weights * flow).mean()
        total, distilled = weighted, torch.zeros(())
        if settings.best_weight:
            horizon = torch.ones(chosen.shape[:2], device=chosen.device)
            distilled = self.pi0_model.flow_loss(
                now, chosen, horizon, self.generator, settings.flow_samples
            ).mean()
            total = total + settings.best_weight * distilled
        self._advantages = advantages
        info = {
            "actor_loss": total.item(),
            "weighted_loss": weighted.item(),
            "best_loss": distilled.item(),
            "advantage": advantages.mean().item(),
            "advantage_spread": advantages.std().item() if len(advantages) > 1 else 0.0,
            "sample_size": effective_sample_size(weights).item(),
            "largest_weight": weights.max().item(),
            "weights_divergence": weights_divergence(advantages, temperature).item(),
            "temperature": temperature,
            "best_over_mean": (values.amax(0) - values.mean(0)).mean().item(),
        }
        return total, info

    def _bc_loss(self, batch: Batch, flow: Tensor) -> tuple[Tensor, Info]:
        solved = batch["success"].to(flow)
        loss = (flow * solved).sum() / solved.sum().clamp(min=1)
        return loss, {"bc_loss": loss.item(), "solved_share": solved.mean().item()}

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
        loss, info = self.compute_loss(batch)
        loss.backward()
        info |= self._apply(actor=True)
        return self, info

    def critic_step(self, batch: Batch) -> Info:
        """A step of the critics alone.

        Raises:
            FloatingPointError: as `train_step`.
        """
        self._clear_gradients()
        loss, info = self.compute_critic_loss(batch)
        loss.backward()
        return info | self._apply(actor=False)

    def _apply(self, actor: bool) -> Info:
        _require(self.critic_opt_state is not None, "the agent has no optimizer of its critics")
        clip, limit = nn.utils.clip_grad_norm_, self.settings.grad_norm
        critics = [
            *self.critic_networks.parameters(),
            *(p for p in self.features.parameters() if p.requires_grad),
        ]
        norms = {"critic_grad_norm": clip(critics, limit)}
        if actor:
            norms["actor_grad_norm"] = clip(self.pi0_model.parameters(), limit)  # type: ignore[attr-defined]
        bad = [name for name, norm in norms.items() if not torch.isfinite(norm)]
        if bad:
            self._clear_gradients()
            raise FloatingPointError(f"{' and '.join(bad)} not finite")
        self.critic_opt_state.step()  # type: ignore[union-attr]
        if actor:
            self.pi0_opt_state.step()  # type: ignore[union-attr]
            if self.temp_opt_state is not None:
                self._temperature_step()
        self.update_target_networks()
        self.update_ema_parameters(actor)
        self._clear_gradients()
        return {name: norm.item() for name, norm in norms.items()}

    def _temperature_step(self) -> None:
        temperature_loss(self._advantages, self.log_temperature, self.settings.divergence).backward()
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


def _pick(candidates: Tensor, best: Tensor) -> Tensor:
    """The candidate of each observation: [S, B, C, A] by [B] to [B, C, A]."""
    return candidates[best, torch.arange(candidates.shape[1], device=candidates.device)]


def _mean_of(values: Tensor, mask: Tensor) -> float:
    return ((values * mask).sum() / mask.sum().clamp(min=1)).item()


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
