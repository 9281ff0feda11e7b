"""Rollouts for the buffer: which ones, and what they give."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from pi0.acrlpd.episodes import RecordedEpisode, of_rollout
from pi0.base.progress import progress
from pi0.libero.environments import TRAINING, Environments
from pi0.libero.episodes import Episode, Rollout
from pi0.libero.evaluation import refuse_broken
from pi0.libero.init_states import InitStatePool
from pi0.libero.rollouts import Policy
from pi0.ranks.collectives import gather, rank_and_world_size
from pi0.training.interrupts import Interrupted


@dataclass
class Practice:
    """What rollouts gave.

    Attributes:
        episodes: those that ran to their end, in the order of the rollouts.
        tasks: [successes, rollouts] by task name.
        broken: what broke each of the others.
        steps: control steps of all episodes.
    """

    episodes: list[RecordedEpisode] = field(default_factory=list)
    tasks: dict[str, list[int]] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)
    steps: int = 0

    def metrics(self) -> dict[str, Any]:
        """Its numbers, for the metrics of an iteration."""
        return {
            "tasks": self.tasks,
            "rollouts": sum(count for _, count in self.tasks.values()),
            "successes": sum(solved for solved, _ in self.tasks.values()),
            "failed_rollouts": self.broken,
            "control_steps": self.steps,
        }


def choose_rollouts(
    environments: Environments, pools: Sequence[InitStatePool], count: int, seed: int, iteration: int
) -> list[Rollout]:
    """`count` rollouts, spread evenly over the tasks, from states in an order that `seed` and `iteration` decide.

    A task goes once through all its states before one of them comes again.
    """
    rollouts: list[Rollout] = []
    for number in range(count):
        pool, visit = pools[number % len(pools)], number // len(pools)
        lap, place = divmod(visit, len(pool))
        order = np.random.default_rng((seed, iteration, pool.task.index, lap)).permutation(len(pool))
        state = int(order[place])
        key = (TRAINING, seed, iteration, pool.task.index, state, lap)
        rollouts.append(replace(environments.rollout(pool, state, key), keep_last=True))
    return rollouts


def practise(
    environments: Environments, policy: Policy, rollouts: Sequence[Rollout], horizon: int, label: str
) -> Practice:
    """Run rollouts; in a distributed run all ranks call it together, and each runs its share.

    Raises:
        BrokenSimulationsError: more than a tenth of all broke.
        Interrupted: the run was asked to stop.
    """
    rank, world_size = rank_and_world_size()
    share = rollouts[rank::world_size]
    done: dict[int, Episode] = {}
    with progress(total=len(share), label=label, unit="rollout") as bar, suppress(Interrupted):
        for index, episode in environments.run_policy(policy, share):
            done[index] = episode
            bar.update(1, f"{sum(each.success for each in done.values())} solved")
    environments.interrupts.check_together(abandoned=len(done) < len(share))
    practice = Practice()
    for _, episode in sorted(done.items()):
        if episode.failure is not None:
            practice.broken.append(episode.failure)
            continue
        counts = practice.tasks.setdefault(episode.rollout.task.name, [0, 0])
        counts[0] += episode.success
        counts[1] += 1
        practice.steps += episode.steps
        practice.episodes.append(of_rollout(episode, horizon))
    refuse_broken(label, [line for part in gather(practice.broken) for line in part], len(rollouts))
    return practice
