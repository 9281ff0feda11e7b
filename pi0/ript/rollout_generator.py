"""`RolloutGenerator`: groups of rollouts whose scores can be compared."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pi0.base.errors import InputError
from pi0.base.progress import progress
from pi0.libero.environments import TRAINING
from pi0.libero.episodes import Episode, Rollout
from pi0.libero.evaluation import refuse_broken
from pi0.libero.init_states import InitStatePool
from pi0.libero.rollouts import Phases, Policy
from pi0.report.declaration import distribution
from pi0.ript.advantages import leave_one_out_advantages
from pi0.ript.env_runner import LIBEROEnvRunner
from pi0.ript.metrics import METRICS
from pi0.ript.rewards import BinarySuccessReward
from pi0.ript.rollout_stats import RolloutStats, StatsError, state_name
from pi0.training.interrupts import Interrupted

# A place to start an episode: a pool of initial states and an index into it.
Start = tuple[InitStatePool, int]


class InitStates(Protocol):
    """A data set of initial states; a loader's batches hold indices of its items."""

    def start(self, index: int) -> Start:
        """The start of an episode from item `index`."""


@dataclass
class Group:
    """Finished rollouts that share a baseline.

    Attributes:
        episodes: episodes of the group's starts, in their order.
        advantages: leave-one-out advantage of each.
    """

    episodes: list[Episode]
    advantages: list[float]

    @property
    def unanimous(self) -> bool:
        """All rollouts scored the same, so the group does not show what is better."""
        return not any(self.advantages)


@dataclass
class Collection:
    """The rollouts of one iteration.

    Attributes:
        groups: usable groups, in the order in which they were sampled; may be empty.
        dropped: groups left out because they were unanimous (dynamic sampling only), by task:
            [all succeeded, none did].
        tried: episodes of all groups that ran to the end, with the dropped ones.
        failures: rollouts whose simulation broke, one line each; their groups are not used.
        seconds: wall time of the collection.
        lost_workers: workers that died or hung, one line each; their rollouts were run again.
        phases: how `seconds` divide into phases.
        abandoned: the run was asked to stop in the middle; the collection is not complete.
    """

    groups: list[Group] = field(default_factory=list)
    dropped: dict[str, list[int]] = field(default_factory=dict)
    tried: list[Episode] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0
    lost_workers: list[str] = field(default_factory=list)
    phases: Phases = field(default_factory=Phases)
    abandoned: bool = False

    @property
    def episodes(self) -> list[Episode]:
        """Episodes of all groups."""
        return [episode for group in self.groups for episode in group.episodes]

    @property
    def advantages(self) -> list[float]:
        """Advantages of `episodes`, in their order."""
        return [advantage for group in self.groups for advantage in group.advantages]

    def metrics(self) -> dict[str, Any]:
        """Metrics of the collection (docs/metrics.md); `tasks` holds [successes, rollouts] by task."""
        tasks: dict[str, list[int]] = {}
        for episode in self.tried:
            counts = tasks.setdefault(episode.rollout.task.name, [0, 0])
            counts[0] += episode.success
            counts[1] += 1
        return {
            "tasks": tasks,
            "states": len(
                {(episode.rollout.task.name, episode.rollout.init_index) for episode in self.tried}
            ),
            "rollouts": len(self.tried),
            "successes": sum(episode.success for episode in self.tried),
            "trajectories": len(self.episodes),
            "solved": sum(episode.success for episode in self.episodes),
            "groups": len(self.groups),
            "unanimous_groups": sum(group.unanimous for group in self.groups),
            "dropped_groups": sum(map(sum, self.dropped.values())),
            "dropped_by_task": self.dropped,
            "failed_rollouts": self.failures,
            "lost_workers": self.lost_workers,
            "control_steps": sum(episode.steps for episode in self.tried),
            "rollout_seconds": self.seconds,
            "phases": dataclasses.asdict(self.phases),
            "advantages": distribution(self.advantages),
        }


def merge_metrics(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Merge `Collection.metrics` of several ranks: counts are added, the slowest rank sets the time.

    Raises:
        BrokenSimulationsError: every group has a rollout whose simulation broke.
    """
    merged = METRICS.merge(parts)
    if not merged["rollouts"]:
        broken = [line.partition(": ")[2] for line in merged["failed_rollouts"]]
        refuse_broken("rollouts", broken, len(broken))
    tried = merged["groups"] + merged["dropped_groups"]
    merged["dropped_share"] = merged["dropped_groups"] / max(1, tried)
    if "skipped_by_task" in merged:
        merged["skipped_states"] = sum(map(sum, merged["skipped_by_task"].values()))
    if "skipped_states" in merged:
        came_up = merged["skipped_states"] + merged["states"]
        merged["skipped_share"] = merged["skipped_states"] / max(1, came_up)
    return merged


class RolloutGenerator:
    """Collects groups of rollouts.

    A group starts either from K states of one task (one baseline for the task's batch) or K times from one
    state (RIPT's own group); the loader decides.

    Args:
        env_runner: runs the episodes.
        init_state_dataloader: endless; each batch is the states from which a group starts. They share its
            `rollouts_per_env` rollouts evenly: one state, K times, or K states of a task. A batch is a list of
            starts, or one of a PyTorch loader with indices of `init_state_dataset` in "index".
        init_state_dataset: the data set of a PyTorch loader.
        rollouts_per_env: rollouts of a group, K.
        num_envs: environments used at once; None for all that the runner has.
        max_steps: control steps an episode may take; None for the runner's own limit.
        agent_gpus: GPU on which the policy acts, at most one: a rank acts on its own GPU, and torchrun starts a rank
            for each GPU.
        num_groups: groups to collect in an iteration.
        max_groups: most groups tried, unless all were dropped; dynamic sampling or broken simulations may reach it.
        enable_dynamic_sampling: drop unanimous groups and try others instead.
        stats: success history of the states, which the loader's sampler also uses; None makes one from the next
            three arguments.
        rollout_skip_threshold: a state that was solved on so many visits in a row is skipped for a round.
        enable_rollout_stats_tracking: keep the success history in a file, not only in memory.
        rollout_stats_path: that file, which grows from run to run (`pi0.ript.rollout_stats`).
        use_val_init: `validation_states` draws states for periodic evaluation.
        shuffle_advantages: assign the advantages of a group to its episodes at random: a control that shows
            whether learning depends on the reward.
        reward: score of an episode; None: 1 for success, else 0.
        seed: seed of the policy's noise, together with step, task, state and repetition.
    Raises:
        InputError: several `agent_gpus`.
        StatsError: the statistics file exists and is not one.
    """

    def __init__(
        self,
        env_runner: LIBEROEnvRunner,
        *,
        init_state_dataloader: Iterable[Sequence[Start] | dict[str, Any]],
        init_state_dataset: InitStates | None = None,
        rollouts_per_env: int,
        num_envs: int | None = None,
        max_steps: int | None = None,
        agent_gpus: Sequence[int] | None = None,
        num_groups: int,
        max_groups: int,
        seed: int,
        enable_dynamic_sampling: bool = False,
        stats: RolloutStats | None = None,
        rollout_skip_threshold: int = 2,
        enable_rollout_stats_tracking: bool = False,
        rollout_stats_path: str | Path | None = None,
        use_val_init: bool = False,
        shuffle_advantages: bool = False,
        reward: Callable[[Episode], float] | None = None,
    ):
        if agent_gpus is not None and len(agent_gpus) > 1:
            raise InputError(
                f"agent_gpus = {list(agent_gpus)}: a rank acts on one GPU; start one rank for each with "
                f"torchrun --nproc_per_node={len(agent_gpus)}"
            )
        self.env_runner = env_runner
        self._batches = iter(init_state_dataloader)
        self._states = init_state_dataset
        self._rollouts_per_env = rollouts_per_env
        self.num_envs = num_envs
        self.max_steps = max_steps
        self.use_val_init = use_val_init
        self.stats = stats or RolloutStats(
            rollout_stats_path if enable_rollout_stats_tracking else None, rollout_skip_threshold
        )
        self.num_groups = num_groups
        self.max_groups = max_groups
        self.seed = seed
        self.enable_dynamic_sampling = enable_dynamic_sampling
        self.shuffle_advantages = shuffle_advantages
        self.reward = reward or BinarySuccessReward()

    def _next_group(self) -> Sequence[Start]:
        batch = next(self._batches)
        if isinstance(batch, dict):
            assert self._states is not None, "batches with an index need init_state_dataset"
            batch = [self._states.start(int(index)) for index in batch["index"]]
        return list(batch) * (self._rollouts_per_env // len(batch))

    def generate_rollouts(self, policy: Policy, step: int, record: int = 0) -> Collection:
        """Collect one iteration's groups with `policy`.

        It always ends: with exactly `num_groups` whole groups, or with fewer after `max_groups` tries, or after twice
        as many if dynamic sampling has dropped every group. A group with a broken simulation is a failed try: it is
        reported, and another group replaces it. With dynamic sampling, a policy that always or never succeeds gives
        an empty collection.

        Args:
            policy: the policy that acts.
            step: number of the iteration; with the seed it decides the noise.
            record: draw a video frame every this many control steps.
        """
        start, losses = time.monotonic(), len(self.env_runner.pool.losses)
        collection = Collection()
        tried, limit = 0, self.max_groups
        while len(collection.groups) < self.num_groups and tried < limit:
            wanted = min(self.num_groups - len(collection.groups), limit - tried)
            try:
                for episodes in self._run_groups(policy, step, tried, wanted, record):
                    self._add(collection, episodes)
            except Interrupted:
                # Other ranks may wait for this one, so the caller decides together with them.
                collection.abandoned = True
                break
            collection.phases += self.env_runner.pool.phases
            tried += wanted
            if tried == limit == self.max_groups and not collection.groups and collection.dropped:
                print(f"all {tried} groups tried were unanimous: trying as many other states")
                limit *= 2
        collection.seconds = time.monotonic() - start
        collection.lost_workers = [str(loss) for loss in self.env_runner.pool.losses[losses:]]
        return collection

    def describe(self, metrics: dict[str, Any]) -> list[str]:
        """Lines about the groups of an iteration on all ranks: tried, kept, dropped; and skipped states."""
        lines = []
        tried = metrics["groups"] + metrics["dropped_groups"]
        if tried:  # 0 if the run was asked to stop before
            lines.append(f"batches sampled: {tried} groups tried, {metrics['groups']} kept")
        for name, (solved, failed) in metrics["dropped_by_task"].items():
            lines.append(f"dropped groups of {name}: {solved} all solved, {failed} all failed")
        for name, (count,) in metrics["skipped_by_task"].items():
            lines.append(f"skipped states of {name}: {count}, solved on each of their last visits")
        return lines

    def record(self, collection: Collection) -> None:
        """Add to the statistics how often each state was solved. All its rollouts in an iteration are one visit."""
        visits: dict[str, list[bool]] = {}
        for episode in collection.tried:
            rollout = episode.rollout
            visits.setdefault(state_name(rollout.task, rollout.init), []).append(episode.success)
        for name, outcomes in visits.items():
            self.stats.record(name, sum(outcomes), len(outcomes))
        self._save_stats()

    def validation_states(self, count: int) -> list[InitStatePool] | None:
        """`count` states of each task for periodic evaluation; None for LIBERO's recorded ones, or if it is 0."""
        return self.env_runner.validation_states(count) if self.use_val_init and count else None

    def cleanup(self) -> None:
        """Write the statistics that are not written yet, close the environments and end their processes."""
        self._save_stats()
        self.env_runner.cleanup()

    def _save_stats(self) -> None:
        try:
            self.stats.save()
        except StatsError as error:
            print(f"statistics not saved: {error}")

    def _run_groups(
        self, policy: Policy, step: int, first: int, count: int, record: int
    ) -> list[list[Episode]]:
        rollouts: list[Rollout] = []
        groups: list[range] = []
        for number in range(first, first + count):
            starts = self._next_group()
            groups.append(range(len(rollouts), len(rollouts) + len(starts)))
            for repetition, (states, index) in enumerate(starts):
                key = (TRAINING, self.seed, step, number, states.task.index, index, repetition)
                rollouts.append(self.env_runner.rollout(states, index, key, record, self.max_steps))
        episodes: dict[int, Episode] = {}
        with progress(total=len(rollouts), label=f"rollouts {step}", unit="episode") as bar:
            for index, episode in self.env_runner.run_policy_in_env(policy, rollouts, num_envs=self.num_envs):
                episodes[index] = episode
                bar.update(1, f"{sum(e.success for e in episodes.values())} solved")
        return [[episodes[index] for index in group] for group in groups]

    def _add(self, collection: Collection, episodes: list[Episode]) -> None:
        failures = [f"{episode.rollout}: {episode.failure}" for episode in episodes if episode.failure]
        for failure in failures:
            print(f"rollout failed, its group is left out: {failure}")
        if failures:
            collection.failures += failures
            return
        advantages = leave_one_out_advantages([self.reward(episode) for episode in episodes])
        if self.shuffle_advantages:
            np.random.default_rng(episodes[0].rollout.noise_key).shuffle(advantages)
        group = Group(episodes, advantages)
        collection.tried += episodes
        if self.enable_dynamic_sampling and group.unanimous:
            counts = collection.dropped.setdefault(episodes[0].rollout.task.name, [0, 0])
            counts[0 if episodes[0].success else 1] += 1
        else:
            collection.groups.append(group)
