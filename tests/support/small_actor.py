"""A small flow policy on vectors, in place of pi0 as the actor of `pi0.acrlpd`; an agent and batches of it."""

from __future__ import annotations

import copy

import torch
from torch import nn

from pi0.acrlpd.acrlpd_pi0_agent import ACRLPDPi0Agent, LossSettings
from pi0.policy.critics import CriticNetworks

BATCH = 12
CHUNK, ACTION_DIM, REAL = 4, 3, 2  # the last feature of an action is padding
STATE = 2


class SmallActor(nn.Module):
    """Flow matching with one hidden layer; actions are carried out within [-1, 1]."""

    chunk, action_dim = CHUNK, ACTION_DIM

    def __init__(self, hidden: int = 32):
        super().__init__()
        size = CHUNK * ACTION_DIM
        self.layers = nn.Sequential(nn.Linear(STATE + size + 1, hidden), nn.GELU(), nn.Linear(hidden, size))

    def velocity(self, state, noisy, time):
        x = torch.cat([state, noisy.flatten(-2), time[..., None]], -1)
        return self.layers(x).unflatten(-1, (CHUNK, ACTION_DIM))

    @torch.no_grad()
    def sample(self, observations, noise):
        state = observations["state"].expand(len(noise), -1, -1)
        x = noise
        for step in range(4):
            time = torch.full(x.shape[:2], 1 - step / 4)
            x = x - self.velocity(state, x, time) / 4
        return x

    def flow_loss(self, observations, actions, valid, generator, samples):
        kinds, batch, horizon, _ = actions.shape
        held = torch.zeros(kinds, batch, CHUNK, ACTION_DIM)
        held[:, :, :horizon] = actions
        noise = torch.randn(samples, *held.shape, generator=generator)
        time = torch.rand(samples, kinds, batch, generator=generator)
        t = time[..., None, None]
        velocity = self.velocity(
            observations["state"].expand(samples, kinds, -1, -1), t * noise + (1 - t) * held, time
        )
        errors = (velocity - (noise - held)).square()[..., :horizon, :REAL].mean((0, 4))
        return (errors * valid).sum(-1) / valid.sum(-1).clamp(min=1)

    def carried_out(self, actions, observations):
        return actions[..., :REAL].clamp(-1, 1)

    def copy(self):
        return copy.deepcopy(self)


class StateFeatures(nn.Module):
    """Critics see the state twice."""

    width = STATE

    def forward(self, observations):
        return observations["state"]


def make_agent(
    samples: int = 5, seed: int = 0, learned_temperature: bool = False, **settings
) -> ACRLPDPi0Agent:
    torch.manual_seed(seed)
    actor, features = SmallActor(), StateFeatures()
    critics = CriticNetworks(STATE, STATE, CHUNK, REAL, critics=3, hidden=16, layers=2)
    log_temperature = torch.nn.Parameter(torch.tensor(0.1).log())
    return ACRLPDPi0Agent(
        actor,
        critics,
        features,
        samples,
        CHUNK,
        REAL,
        pi0_opt_state=torch.optim.Adam(actor.parameters(), 1e-3),
        critic_opt_state=torch.optim.Adam(critics.parameters(), 1e-3),
        temp_opt_state=torch.optim.Adam([log_temperature], 1e-2) if learned_temperature else None,
        log_temperature=log_temperature,
        settings=LossSettings(**settings),
        seed=seed,
    )


def made_batch(seed: int = 1) -> dict:
    random = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=random)

    count = torch.randint(1, CHUNK + 1, (BATCH,), generator=random)
    valid = (torch.arange(CHUNK)[None] < count[:, None]).float()
    ended = torch.rand(BATCH, generator=random) < 0.4
    return {
        "observations": {"state": normal(BATCH, STATE)},
        "next_observations": {"state": normal(BATCH, STATE)},
        "actions": normal(BATCH, CHUNK, ACTION_DIM),
        "rewards": normal(BATCH, CHUNK) * valid,
        "masks": 1 - (ended[:, None] & (torch.arange(CHUNK)[None] >= count[:, None] - 1)).float(),
        "valid": valid,
        "sequence_mask": torch.rand(BATCH, generator=random) < 0.8,
        "success": torch.rand(BATCH, generator=random) < 0.5,
    }
