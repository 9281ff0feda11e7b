"""Slices as a batch to learn from: stacks, advantages and value targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from pi0.parallel.actor import Filled
from pi0.parallel.config import Config
from pi0.parallel.ppo import Batch, PPOAgent
from pi0.parallel.returns import gae, vtrace
from pi0.parallel.slices import Layout


def make_batch(
    slices: Sequence[Filled],
    layout: Layout,
    arrays: Mapping[str, np.ndarray],
    agent: PPOAgent,
    config: Config,
) -> Batch:
    """The transitions of slices, one slice after another.

    The loss sees only the sign of a reward. In mode sync the policy that acted is the one that learns, and its values
    and log-probabilities are taken as they are. In overlap and async the present weights evaluate the transitions again,
    because a ratio against an older policy would be clipped before it has moved. The age is then corrected for by
    importance weights: in overlap by those of decoupled PPO (Hilton et al. 2021, "Batch size-invariance for policy
    optimization"), with GAE; in async by V-trace. The value of a truncated episode's last observation stays that of the
    policy that acted.

    Args:
        slices: what workers have filled.
        layout, arrays: the shared memory. Frames are not copied, so a slice must not be filled again until the batch
            has been learned.
        agent: evaluates what is needed of the present weights.
        config: gamma, gae_lambda, mode, shuffle_advantages.
    """

    def column(name: str) -> list[np.ndarray]:
        return [arrays[name][each.buffer, each.worker][: each.steps] for each in slices]

    stacks = [
        layout.stacks(each.buffer, each.worker, arrays["ages"][each.buffer, each.worker][: each.steps + 1])
        for each in slices
    ]
    frames = torch.from_numpy(arrays["frames"])
    batch = Batch(
        frames=frames,
        stacks=torch.from_numpy(np.concatenate([each[:-1] for each in stacks])),
        actions=torch.from_numpy(np.concatenate(column("actions"))),
        log_probs=torch.from_numpy(np.concatenate(column("log_probs"))),
        values=torch.from_numpy(np.concatenate(column("values"))),
        advantages=torch.zeros(0),
        returns=torch.zeros(0),
        weights=torch.ones(sum(each.steps for each in slices)),
    )
    rewards = [np.sign(each) for each in column("rewards")]
    given = list(zip(rewards, column("ended"), column("bootstraps"), strict=True))
    lasts = np.array([arrays["last_values"][each.buffer, each.worker] for each in slices])
    log_ratios = np.zeros(len(batch), np.float32)
    if config.mode != "sync":
        log_probs, values = map(torch.from_numpy, agent.evaluate(frames, batch.stacks, batch.actions))
        log_ratios = (log_probs - batch.log_probs).numpy()
        _, lasts = agent.evaluate(frames, torch.from_numpy(np.concatenate([each[-1:] for each in stacks])))
        batch = replace(batch, log_probs=log_probs, values=values)
    if config.mode == "overlap":
        batch = replace(batch, weights=torch.from_numpy(np.exp(log_ratios)))
    ends = np.cumsum([each.steps for each in slices])[:-1]
    of_slices = np.split(batch.values.numpy(), ends), np.split(log_ratios, ends), lasts
    found = []
    for (reward, ended, bootstraps), value, ratios, last in zip(given, *of_slices, strict=True):
        if config.mode == "async":
            made = vtrace(
                reward, value, ended, bootstraps, float(last), ratios, config.gamma, config.gae_lambda
            )
        else:
            made = gae(reward, value, ended, bootstraps, float(last), config.gamma, config.gae_lambda)
        found.append(made)
    advantages, returns = (torch.from_numpy(np.concatenate(each)) for each in zip(*found, strict=True))
    if config.shuffle_advantages:
        advantages = advantages[torch.randperm(len(advantages), generator=agent.generator)]
    return replace(batch, advantages=advantages, returns=returns)


def explained_variance(batch: Batch) -> float | None:
    """Share of the variance of the returns that the values explain; None if there is no variance."""
    variance = float(batch.returns.var(correction=0))
    return None if variance == 0 else 1 - float((batch.returns - batch.values).var(correction=0)) / variance
