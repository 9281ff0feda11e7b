"""The game as other trainers are given it, and the network that all trainers learn.

The wrappers are Stable-Baselines3's for Atari, in their usual order; CleanRL uses the same ones. The time limit counts
steps of 4 frames, as pi0.parallel's does.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import gymnasium
import numpy as np
import stable_retro
import torch
from stable_baselines3.common.atari_wrappers import ClipRewardEnv, MaxAndSkipEnv, NoopResetEnv, WarpFrame
from torch import nn

GAME = "Airstriker-Genesis-v0"
MAX_STEPS = 10000
STACK = 4
UPDATE_INTERVAL = 2048  # transitions of all environments in an update
MINIBATCH = 256
EPOCHS = 4


def make_console(actions: stable_retro.Actions = stable_retro.Actions.DISCRETE) -> gymnasium.Env:
    """The game without wrappers."""
    env = stable_retro.make(GAME, use_restricted_actions=actions, render_mode="rgb_array")
    env.get_action_meanings = lambda: ["NOOP"]  # NoopResetEnv asks for the first
    return env


def make_env() -> gymnasium.Env:
    """Single grey frames, uint8 [84, 84, 1]."""
    env = WarpFrame(MaxAndSkipEnv(NoopResetEnv(make_console(), 30), 4))
    return gymnasium.wrappers.TimeLimit(ClipRewardEnv(env), MAX_STEPS)


def make_scored_env() -> gymnasium.Env:
    """As `make_env`, with `MultiDiscrete` actions; at the end of an episode `info["episode"]` has its raw score."""
    console = gymnasium.wrappers.RecordEpisodeStatistics(make_console(stable_retro.Actions.MULTI_DISCRETE))
    resets = NoopResetEnv(console, 30)
    resets.noop_action = np.zeros(console.action_space.shape, int)
    return gymnasium.wrappers.TimeLimit(ClipRewardEnv(WarpFrame(MaxAndSkipEnv(resets, 4))), MAX_STEPS)


def make_stacked_env() -> gymnasium.Env:
    """Stacks of grey frames, uint8 [4, 84, 84, 1], stacked in the process of the environment."""
    return gymnasium.wrappers.FrameStackObservation(make_env(), STACK)


class NatureNetwork(nn.Module):
    """Logits and value of stacks; the network of Mnih et al. (2015), as CleanRL's `ppo_atari.py` builds it."""

    def __init__(self, actions: int):
        super().__init__()
        self.features = nn.Sequential(
            initialised(nn.Conv2d(STACK, 32, 8, 4)), nn.ReLU(),
            initialised(nn.Conv2d(32, 64, 4, 2)), nn.ReLU(),
            initialised(nn.Conv2d(64, 64, 3, 1)), nn.ReLU(),
            nn.Flatten(), initialised(nn.Linear(64 * 7 * 7, 512)), nn.ReLU(),
        )  # fmt: skip
        self.actor = initialised(nn.Linear(512, actions), 0.01)
        self.critic = initialised(nn.Linear(512, 1), 1.0)

    def forward(self, stacks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [B, actions] and values [B] of pixels 0 to 255, [B, 4, 84, 84]."""
        features = self.features(stacks / 255.0)
        return self.actor(features), self.critic(features).squeeze(-1)


def initialised(layer: nn.Module, gain: float = math.sqrt(2)) -> nn.Module:
    """Orthogonal weights, no bias."""
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def parameters(network: nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in network.parameters())


def resident_mb(process: int) -> float:
    """Resident memory of a process, MB."""
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
