"""Mode `ratio`: the policy gradient of a flow, by clipped ratios of the probabilities of its noisy Euler steps.

Practice samples with noise in every Euler step (`pi0.policy.flow_sde`), so a chunk comes about by K Gaussian steps, and
a rollout is a Markov decision process in which each of them is an action (piRL's Flow-SDE; Flow-GRPO). A step's
log-probability is the sum over the actions that were carried out and the robot's features, as in piRL. Where all of a
chunk is carried out and the network's actions have no padding, that is the whole step, and the gradient is the policy
gradient to the letter. Else it is an approximation: it leaves out how the other elements, whose noise nobody saw,
influenced later steps of these, and has less variance for it.

The ratio is the present probability over that of the policy that acted. `Paths` keep what it takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pi0 import PI0Policy
from pi0.data.chunks import Chunks
from pi0.libero.episodes import Episode
from pi0.policy.acting import NoisyPolicy
from pi0.policy.flow_sde import log_prob, step_mean, step_std
from pi0.ranks.collectives import gather

AT_ONCE = 64  # chunks in a pass that computes paths


@dataclass
class Paths:
    """How the flow came to N chunks in K steps.

    Attributes:
        points: float32 [N, K + 1, H, A], from noise to the normalised actions.
        log_probs: float32 [N, K], of each step under the policy that acted.
    """

    points: Tensor
    log_probs: Tensor

    def __getitem__(self, index: Tensor) -> Paths:
        return Paths(self.points[index], self.log_probs[index])

    @staticmethod
    def cat(parts: Sequence[Paths]) -> Paths:
        """All paths of `parts`, in order."""
        return Paths(
            torch.cat([part.points for part in parts]), torch.cat([part.log_probs for part in parts])
        )

    @staticmethod
    def blank(policy: PI0Policy) -> Paths:
        """One path in this policy's shapes."""
        config = policy.config
        return Paths(
            torch.zeros(1, config.num_steps + 1, config.action_horizon, config.action_dim),
            torch.zeros(1, config.num_steps),
        )


def noise_of(policy: PI0Policy, episode: Episode, level: float) -> Tensor:
    """The noise with which the chunks of an episode were drawn, float32 [T, K + 1, H, A]."""
    acting = NoisyPolicy(policy, level)
    keys = [(*episode.rollout.noise_key, look) for look in range(len(episode.states))]
    return torch.stack([torch.from_numpy(acting.noise(key)) for key in keys])


@torch.no_grad()
def trace(
    policy: PI0Policy, chunks: Chunks, noise: Tensor, level: float, mixed_precision: bool = False
) -> Paths:
    """The paths by which `policy` came to these chunks, computed again from its noise.

    Log-probabilities are computed as the updates compute them, in the same precision, so that the ratio of a policy
    that has not changed is 1.

    Args:
        policy: the policy that acted, with the weights it acted with.
        chunks: N chunks.
        noise: float32 [N, K + 1, H, A] (`noise_of`).
        level: of the noise.
        mixed_precision: as in `PI0_CFG_Adapter`.
    """
    parts = []
    for index in torch.arange(len(chunks)).split(AT_ONCE):
        part = chunks[index]
        inputs = policy.prepare({"images": part.images, "state": part.states, "prompt": part.prompts})
        given = noise[index].to(policy.device).transpose(0, 1)
        points = policy.sample_path(**inputs, noise=given, noise_level=level).float().transpose(0, 1).cpu()
        steps = torch.arange(policy.config.num_steps)[:, None].expand(-1, len(part))
        with torch.autocast(policy.device.type, torch.bfloat16, enabled=mixed_precision):
            log_probs = step_log_probs(policy, part, points, steps, level)
        parts.append(Paths(points, log_probs.T.cpu()))
    return Paths.cat(parts)


def step_log_probs(
    policy: PI0Policy,
    chunks: Chunks,
    points: Tensor,
    steps: Tensor,
    level: float,
    model: nn.Module | None = None,
) -> Tensor:
    """Log-probabilities, float32 [S, N], of `steps` int [S, N] of the paths of N chunks.

    Args:
        policy: the policy whose probabilities are asked for.
        chunks: their observations, and which actions count.
        points: where the paths were, float32 [N, K + 1, H, A].
        steps: which steps of each path; an observation is encoded once for all of its steps.
        level: of the noise.
        model: distributed wrapper of the policy; None: the policy itself.
    """
    config, rows = policy.config, torch.arange(len(chunks))
    before, after = (points[rows, steps + more].to(policy.device) for more in (0, 1))  # [S, N, H, A]
    inputs = policy.prepare({"images": chunks.images, "state": chunks.states, "prompt": chunks.prompts})
    number = steps.to(before)
    time = 1 - number / config.num_steps
    velocity = (model or policy)(**inputs, actions=None, noise=before, time=time).float()
    of_steps = (number[..., None, None], config.num_steps, level)
    each = log_prob(after, step_mean(before, velocity, *of_steps), step_std(*of_steps))
    counted = chunks.valid.to(each)[..., None]  # [N, H, 1]
    return (each[..., : config.robot_action_dim] * counted).sum((2, 3))


def clipped_ratio_loss(log_probs: Tensor, acted: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """PPO's loss (Schulman et al. 2017, eq. 7) of each step, in the shape of `log_probs`; the gradient lowers it.

    Args:
        log_probs: of the present policy.
        acted: of the policy that acted.
        advantages: of each step.
        clip: the ratio counts from 1 - clip to 1 + clip only.
    """
    ratio = (log_probs - acted).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)


@dataclass
class RatioSums:
    """Sums over steps, of how far a policy has moved from the one that acted."""

    steps: float = 0.0
    clipped: float = 0.0
    kl: float = 0.0

    def add(self, log_ratios: Tensor, advantages: Tensor, clip: float) -> None:
        """Count steps float [S, N] of N chunks; those of advantage 0 are blank."""
        with torch.no_grad():
            log_ratios = log_ratios[:, advantages != 0].double()
            signs = advantages[advantages != 0].sign()
            ratios = log_ratios.exp()
            self.steps += log_ratios.numel()
            self.clipped += float((signs * (ratios - 1) > clip).sum())
            self.kl += float((ratios - 1 - log_ratios).sum())

    def over_ranks(self) -> dict[str, float]:
        """`clipped_share` and `ratio_kl` (docs/metrics.md); {} if there were no steps."""
        steps, clipped, kl = (sum(gather(value)) for value in (self.steps, self.clipped, self.kl))
        return {"clipped_share": clipped / steps, "ratio_kl": kl / steps} if steps else {}
