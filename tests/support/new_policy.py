"""A policy that nobody has trained, and random generators, for tests of losses."""

import numpy as np
import torch

from pi0 import PI0Policy
from pi0.model.config import Pi0Config
from pi0.policy.normalization import NormStats, Stats


def make_policy(guidance: bool = False) -> PI0Policy:
    def unit(size):
        ones = np.ones(size, np.float32)
        return Stats(mean=0 * ones, std=ones, q01=-ones, q99=ones)

    torch.manual_seed(0)
    config = Pi0Config.preset("pi0_tiny", guidance=guidance)
    return PI0Policy(config, NormStats(state=unit(8), actions=unit(7)))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
