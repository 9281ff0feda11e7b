"""Proximal policy optimisation (Schulman et al. 2017), with the details of CleanRL's `ppo_atari.py`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from pi0.parallel.network import ActorCritic

EVALUATE_AT_ONCE = 512  # observations without gradients


@dataclass(frozen=True)
class Batch:
    """Transitions to learn from.

    Attributes:
        frames: uint8 [F, 84, 84], shared with the workers.
        stacks: indices into `frames`, int64 [N, 4], oldest first.
        actions: int64 [N].
        log_probs: of the actions under the policy from which ratios are taken, float32 [N]: the one that acted,
            exploration included, or the present one.
        advantages, returns: float32 [N].
        values: from which the value loss is clipped, of the same policy, float32 [N].
        weights: how much more likely that policy takes the action than the one that acted, float32 [N].
    """

    frames: torch.Tensor
    stacks: torch.Tensor
    actions: torch.Tensor
    log_probs: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor
    values: torch.Tensor
    weights: torch.Tensor

    def __len__(self) -> int:
        return len(self.actions)


@dataclass(frozen=True)
class PPOSettings:
    """Coefficients, with CleanRL's values for Atari.

    Attributes:
        clip: how far a probability may move from the one that acted, as a ratio.
        entropy_weight, value_weight: of these terms of the loss.
        grad_norm: gradients are scaled down to this norm.
        epochs: passes over a batch.
        minibatch: transitions of a step of the optimizer.
    """

    clip: float = 0.1
    entropy_weight: float = 0.01
    value_weight: float = 0.5
    grad_norm: float = 0.5
    epochs: int = 4
    minibatch: int = 256


@dataclass(frozen=True)
class Loss:
    """The terms of a minibatch's loss, each a scalar tensor; `total` has the gradient."""

    total: torch.Tensor
    policy: torch.Tensor
    value: torch.Tensor
    entropy: torch.Tensor
    kl: torch.Tensor
    clipped: torch.Tensor


def ppo_loss(
    logits: torch.Tensor,
    values: torch.Tensor,
    actions: torch.Tensor,
    log_probs: torch.Tensor,
    advantages: torch.Tensor,
    returns: torch.Tensor,
    old_values: torch.Tensor,
    weights: torch.Tensor,
    settings: PPOSettings,
) -> Loss:
    """The clipped surrogate, the clipped value loss and the entropy of a minibatch.

    With weights it is the decoupled surrogate of Hilton et al. (2021, equation 2): a transition counts by its importance
    weight, and the ratio is clipped around the policy at the beginning of the update.

    Advantages are normalised within the minibatch. `kl` is the estimate (ratio - 1) - log ratio (Schulman 2020).

    Args:
        logits: [B, actions]; the others [B], as in `Batch`.
    """
    logs = logits.log_softmax(-1)
    log_ratio = logs.gather(-1, actions[:, None]).squeeze(-1) - log_probs
    ratio = log_ratio.exp()
    advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    clip = settings.clip
    limited = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))
    surrogate = (weights * limited).mean()
    near = old_values + (values - old_values).clamp(-clip, clip)
    value = 0.5 * torch.maximum((values - returns) ** 2, (near - returns) ** 2).mean()
    entropy = -(logs.exp() * logs).sum(-1).mean()
    total = surrogate - settings.entropy_weight * entropy + settings.value_weight * value
    with torch.no_grad():
        kl = (ratio - 1 - log_ratio).mean()
        clipped = ((ratio - 1).abs() > clip).float().mean()
    return Loss(total, surrogate, value, entropy, kl, clipped)


class PPOAgent:
    """The network and its optimizer.

    Args:
        network: the network, on its device.
        settings: coefficients.
        lr: learning rate at the beginning.
        generator: draws the order of the minibatches.
    """

    def __init__(self, network: ActorCritic, settings: PPOSettings, lr: float, generator: torch.Generator):
        self.network = network
        self.settings = settings
        self.lr = lr
        self.generator = generator
        self.device = next(network.parameters()).device
        self.optimizer = torch.optim.Adam(network.parameters(), lr=lr, eps=1e-5, fused=True)

    def evaluate(
        self, frames: torch.Tensor, stacks: torch.Tensor, actions: torch.Tensor | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Log-probabilities of actions (0 without any) and values under the present weights, float32 [N].

        Args:
            frames, stacks, actions: as in `Batch`.
        """
        logs, values = [], []
        with torch.inference_mode():
            for rows in torch.arange(len(stacks)).split(EVALUATE_AT_ONCE):
                logits, value = self.network(self._observations(frames, stacks[rows]))
                if actions is not None:
                    chosen = actions[rows, None].to(self.device)
                    logs.append(logits.log_softmax(-1).gather(-1, chosen).squeeze(-1).cpu())
                values.append(value.cpu())
        found = torch.cat(logs).numpy() if logs else np.zeros(len(stacks), np.float32)
        return found, torch.cat(values).numpy()

    def update(
        self,
        batch: Batch,
        share_left: float = 1.0,
        between: Callable[[bool], None] = lambda finite: None,
    ) -> dict[str, float]:
        """Learn from a batch; returns means over the minibatches.

        Args:
            batch: what to learn from.
            share_left: share of training that is left, by which the learning rate is multiplied.
            between: called after each step, with whether its gradient was finite; what it raises ends the update.
        """
        settings = self.settings
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * share_left
        sums: dict[str, float] = {}
        steps = bad = 0
        for _ in range(settings.epochs):
            order = torch.randperm(len(batch), generator=self.generator)
            for rows in order.split(settings.minibatch):
                if len(rows) < 2:  # a single advantage cannot be normalised
                    continue
                logits, values = self.network(self._observations(batch.frames, batch.stacks[rows]))
                names = ("actions", "log_probs", "advantages", "returns", "weights")
                parts = {name: getattr(batch, name)[rows].to(self.device) for name in names}
                old_values = batch.values[rows].to(self.device)
                loss = ppo_loss(logits, values, **parts, old_values=old_values, settings=settings)
                self.optimizer.zero_grad(set_to_none=True)
                loss.total.backward()
                norm = nn.utils.clip_grad_norm_(self.network.parameters(), settings.grad_norm)
                finite = bool(torch.isfinite(norm))
                if finite:
                    self.optimizer.step()
                    named = {"loss": loss.total, "policy_loss": loss.policy, "value_loss": loss.value}
                    named |= {
                        "entropy": loss.entropy,
                        "kl": loss.kl,
                        "clipped": loss.clipped,
                        "grad_norm": norm,
                    }
                    for name, value in named.items():
                        sums[name] = sums.get(name, 0.0) + value.item()
                    steps += 1
                bad += not finite
                between(finite)
        return {name: total / steps for name, total in sums.items()} | {"updates": steps, "bad_updates": bad}

    def _observations(self, frames: torch.Tensor, stacks: torch.Tensor) -> torch.Tensor:
        """Stacks of frames, uint8 [B, 4, 84, 84], on the device."""
        return frames[stacks].to(self.device, non_blocking=True)
