"""Steps a second of another trainer, for benchmarks/parallel.py, which runs this in .venv-peers.

    .venv-peers/bin/python benchmarks/peers/training.py stable-baselines3 --envs 8 --threads 1 --updates 10
    .venv-peers/bin/python benchmarks/peers/training.py cleanrl-style --envs 8 --threads 1 --updates 10

stable-baselines3 is its PPO on SubprocVecEnv with VecFrameStack. cleanrl-style is the loop below: PPO as published, with
the details of CleanRL's `ppo_atari.py` (observations kept as float32, one minibatch after another, nothing else at the
same time), on gymnasium's AsyncVectorEnv. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from games import (
    EPOCHS,
    MINIBATCH,
    STACK,
    UPDATE_INTERVAL,
    NatureNetwork,
    make_env,
    make_stacked_env,
    parameters,
    resident_mb,
)
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv, VecFrameStack
from torch import nn

from pi0.base.arguments import ranged
from pi0.parallel.machine_load import CpuMeter

GAMMA, LAMBDA, CLIP, ENTROPY, VALUE, NORM, LR = 0.99, 0.95, 0.1, 0.01, 0.5, 0.5, 2.5e-4


@dataclass
class Clock:
    """Time of updates, without those that warm up.

    Attributes:
        warm_up, updates: numbers of updates before the measurement and in it.
        learning: seconds in the epochs of each update, from the first on.
    """

    warm_up: int
    updates: int
    learning: list[float] = field(default_factory=list)
    done: int = 0

    def tick(self, processes: list[int]) -> None:
        """An update begins; those before it are done."""
        if self.done == self.warm_up:
            self._cpu, self._started = CpuMeter(), time.perf_counter()
        if self.done == self.warm_up + self.updates:
            self._seconds = time.perf_counter() - self._started
            self._idle = 100 - self._cpu.percent()
            self._memory = [resident_mb(process) for process in processes]
        self.done += 1

    @property
    def over(self) -> bool:
        """Whether all updates are done."""
        return self.done > self.warm_up + self.updates

    def result(self, network: nn.Module) -> dict[str, float]:
        """What was measured."""
        learning = self.learning[self.warm_up : self.warm_up + self.updates]
        return {
            "steps_per_s": self.updates * UPDATE_INTERVAL / self._seconds,
            "idle_percent": self._idle,
            "worker_mb": sum(self._memory) / len(self._memory),
            "trainer_mb": resident_mb(os.getpid()),
            "update_ms": 1e3 * sum(learning) / (self.updates * UPDATE_INTERVAL),
            "parameters": parameters(network),
        }


def stable_baselines3_ppo(
    envs: VecEnv, seed: int, lr: float = LR, clip: float = CLIP, entropy_weight: float = ENTROPY
) -> PPO:
    """Its PPO with the settings that all trainers have; the learning rate falls to 0."""
    return PPO(
        "CnnPolicy", envs, learning_rate=lambda left: lr * left, n_steps=UPDATE_INTERVAL // envs.num_envs,
        batch_size=MINIBATCH, n_epochs=EPOCHS, gamma=GAMMA, gae_lambda=LAMBDA, clip_range=clip, clip_range_vf=clip,
        ent_coef=entropy_weight, vf_coef=VALUE, max_grad_norm=NORM, seed=seed, device="cpu",
    )  # fmt: skip


def stable_baselines3(envs: int, clock: Clock) -> nn.Module:
    """Train with Stable-Baselines3; returns the network."""
    games = SubprocVecEnv([make_env] * envs)
    processes = [process.pid for process in games.processes]

    class Ticks(BaseCallback):
        def _on_rollout_start(self) -> None:
            if clock.done:
                clock.learning.append(time.perf_counter() - self.collected)
            clock.tick(processes)

        def _on_rollout_end(self) -> None:
            self.collected = time.perf_counter()

        def _on_step(self) -> bool:
            return not clock.over

    stacked = VecFrameStack(games, STACK)
    ppo = stable_baselines3_ppo(stacked, seed=0)
    ppo.learn((clock.warm_up + clock.updates + 1) * UPDATE_INTERVAL, Ticks())
    stacked.close()
    return ppo.policy


def cleanrl_style(envs: int, clock: Clock) -> nn.Module:
    """Train with a plain loop; returns the network."""
    from gymnasium.vector import AsyncVectorEnv, AutoresetMode

    games = AsyncVectorEnv([make_stacked_env] * envs, autoreset_mode=AutoresetMode.SAME_STEP)
    processes = [process.pid for process in games.processes]
    network = NatureNetwork(int(games.single_action_space.n))
    optimizer = torch.optim.Adam(network.parameters(), lr=LR, eps=1e-5)
    steps = UPDATE_INTERVAL // envs
    stacks = torch.zeros(steps, envs, STACK, 84, 84)
    actions = torch.zeros(steps, envs, dtype=torch.long)
    log_probs, rewards, ended, values = (torch.zeros(steps, envs) for _ in range(4))

    def observed(stack: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(stack).squeeze(-1).float()

    now, over = observed(games.reset(seed=0)[0]), torch.zeros(envs)
    while True:
        clock.tick(processes)
        if clock.over:
            break
        for step in range(steps):
            stacks[step], ended[step] = now, over
            with torch.no_grad():
                logits, values[step] = network(now)
                policy = torch.distributions.Categorical(logits=logits)
                actions[step] = policy.sample()
                log_probs[step] = policy.log_prob(actions[step])
            seen, reward, terminated, truncated, _ = games.step(actions[step].numpy())
            rewards[step] = torch.from_numpy(reward)
            now, over = observed(seen), torch.from_numpy(terminated | truncated).float()
        collected = time.perf_counter()
        with torch.no_grad():
            next_value = network(now)[1]
        advantages, running, ends = torch.zeros(steps, envs), torch.zeros(envs), over
        for step in reversed(range(steps)):
            error = rewards[step] + GAMMA * next_value * (1 - ends) - values[step]
            running = error + GAMMA * LAMBDA * (1 - ends) * running
            advantages[step], next_value, ends = running, values[step], ended[step]
        batch = [
            each.flatten(0, 1)
            for each in (stacks, actions, log_probs, advantages, advantages + values, values)
        ]
        for _ in range(EPOCHS):
            for rows in torch.randperm(UPDATE_INTERVAL).split(MINIBATCH):
                learn(network, optimizer, *(each[rows] for each in batch))
        clock.learning.append(time.perf_counter() - collected)
    games.close()
    return network


def learn(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    stacks: torch.Tensor,
    actions: torch.Tensor,
    log_probs: torch.Tensor,
    advantages: torch.Tensor,
    returns: torch.Tensor,
    old_values: torch.Tensor,
) -> None:
    """A step of the optimizer on the clipped objective of Schulman et al. (2017), with a clipped value loss."""
    logits, values = network(stacks)
    policy = torch.distributions.Categorical(logits=logits)
    ratio = (policy.log_prob(actions) - log_probs).exp()
    normal = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    surrogate = torch.min(normal * ratio, normal * ratio.clamp(1 - CLIP, 1 + CLIP)).mean()
    near = old_values + (values - old_values).clamp(-CLIP, CLIP)
    value = 0.5 * torch.max((values - returns) ** 2, (near - returns) ** 2).mean()
    optimizer.zero_grad()
    (VALUE * value - surrogate - ENTROPY * policy.entropy().mean()).backward()
    nn.utils.clip_grad_norm_(network.parameters(), NORM)
    optimizer.step()


TRAINERS = {"stable-baselines3": stable_baselines3, "cleanrl-style": cleanrl_style}


def main() -> None:
    """Train, print what was measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("trainer", choices=TRAINERS)
    parser.add_argument("--envs", type=ranged(int, 1), default=8)
    parser.add_argument("--threads", type=ranged(int, 1), default=1, help="torch threads")
    parser.add_argument("--warm-up", type=ranged(int, 0), default=2, help="updates before the measurement")
    parser.add_argument("--updates", type=ranged(int, 1), default=10, help="updates that are measured")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    clock = Clock(options.warm_up, options.updates)
    network = TRAINERS[options.trainer](options.envs, clock)
    print(json.dumps(clock.result(network)))


if __name__ == "__main__":
    main()
