"""A stage whose episodes are cut short and count as solved by a rule, so that it learns within seconds.

The tiny policy needs 82 steps or more to solve a task, and where all rollouts of a group fail nothing is learned. Tests
of what a stage does with outcomes need neither: these episodes are simulated for 20 steps, and half of a group is
solved. The scores of a policy still depend on what it did.

Usage: short_practice.py SCRIPT ARGUMENTS-OF-THE-SCRIPT...
"""

import dataclasses
import runpy
import sys
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from pi0.base.paths import REPO_ROOT
from pi0.libero.environments import TRAINING, Environments
from pi0.libero.episodes import Episode, Rollout
from pi0.libero.rollouts import Policy, RolloutPool

STEPS = 20  # two chunks
run_policy = Environments.run_policy


def every_other(rollout: Rollout) -> bool:
    """Whether a rollout of practice is solved: every other one of its group."""
    return rollout.noise_key[-1] % 2 == 0


def shortened(solved: Callable[[Rollout], bool] = every_other) -> Callable:
    """`Environments.run_policy` with short episodes, and with a rule for those of practice.

    An episode of a score is solved by a number made from its actions: by the policy, its noise and the state.
    """

    def run_short(
        self: Environments,
        policy: Policy,
        rollouts: Sequence[Rollout],
        num_envs: int | None = None,
        pool: RolloutPool | None = None,
    ) -> Iterator[tuple[int, Episode]]:
        short = [dataclasses.replace(rollout, horizon=STEPS, settle_steps=0) for rollout in rollouts]
        for index, episode in run_policy(self, policy, short, num_envs, pool):
            practice = episode.rollout.noise_key[0] == TRAINING
            number = int(10 * np.abs(episode.actions).sum())
            episode.success = solved(episode.rollout) if practice else number % 2 == 0
            yield index, episode

    return run_short


if __name__ == "__main__":
    Environments.run_policy = shortened()
    del sys.argv[0]
    sys.argv[0] = str(REPO_ROOT / sys.argv[0])
    runpy.run_path(sys.argv[0], run_name="__main__")
