"""Evaluation of a policy: episodes on initial states that are never trained on, and their scores."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from pi0.base.errors import InputError, MachineError
from pi0.base.progress import progress
from pi0.base.stats import format_rate, wilson_interval
from pi0.libero.changes import KINDS
from pi0.libero.environments import EVALUATION, VALIDATION_STATES, Environments
from pi0.libero.episodes import ACTION_DIM, STATE_DIM, Episode, Rollout
from pi0.libero.init_states import InitStatePool
from pi0.libero.rollouts import Policy
from pi0.ranks import collectives
from pi0.training.interrupts import Interrupted


class Kept(Protocol):
    """Episodes of earlier runs of an evaluation, and where finished ones go (`pi0.libero.kept.KeptEpisodes`)."""

    def outline(self, rollout: Rollout) -> dict[str, Any] | None:
        """`success` and `steps` of a rollout; None if it is still to be run."""

    def add(self, episode: Episode) -> Episode:
        """Keep an episode; it is returned as an outline."""


LARGEST_BROKEN_SHARE = 0.1  # of episodes; if more broke, the command ends with an error


class BrokenSimulationsError(MachineError):
    """So many episodes broke that the rest says little about the policy."""


@dataclass(frozen=True)
class EvaluationResult:
    """Episodes of an evaluation. Those whose simulation broke say nothing of the policy, so no rate counts them.

    Attributes:
        episodes: episodes in order of task and initial state.
        protocol: everything that the score depends on besides the policy.
    """

    episodes: list[Episode]
    protocol: dict

    @property
    def outcomes(self) -> list[bool]:
        """Success of each episode that ran to its end."""
        return [episode.success for episode in self.episodes if episode.failure is None]

    @property
    def broken(self) -> list[str]:
        """What broke each of the other episodes."""
        return [episode.failure for episode in self.episodes if episode.failure is not None]

    @property
    def success_rate(self) -> float | None:
        """Share of successful episodes, 0 to 1; None if all broke."""
        return sum(self.outcomes) / len(self.outcomes) if self.outcomes else None

    def __str__(self) -> str:
        rate = format_rate(sum(self.outcomes), len(self.outcomes))
        return f"{rate}; {describe_broken(self.broken, len(self.episodes))}" if self.broken else rate

    def to_dict(self) -> dict:
        """Outlines of the episodes, and the protocol, for JSON; `restore_result` reads it."""
        outlines = [
            {
                "task": episode.rollout.task.index,
                "state": episode.rollout.init_index,
                "success": episode.success,
                "steps": episode.steps,
                "failure": episode.failure,
                "conditions": episode.conditions,
            }
            for episode in self.episodes
        ]
        return {"episodes": outlines, "protocol": self.protocol}

    def score(self) -> dict[str, Any]:
        """The evaluation as numbers: counts and 95% Wilson intervals, for each task and for all.

        An episode that broke is in "outcomes" without success or failure (None), and counted nowhere. Of variants there
        are also numbers for each kind of change, and of a task whose goal has several conditions for each of those.
        """

        def rate(outcomes: list[bool]) -> dict[str, Any]:
            low, high = wilson_interval(sum(outcomes), len(outcomes))
            return {
                "successes": sum(outcomes),
                "episodes": len(outcomes),
                "success_rate": sum(outcomes) / len(outcomes) if outcomes else None,
                "interval_95": [low, high],
            }

        kinds, conditions = self.by_kind(), self.by_condition()

        def of_task(name: str, outcomes: list[bool]) -> dict[str, Any]:
            parts = {words: rate(held) for words, held in conditions.get(name, {}).items()}
            return {**rate(outcomes), **({"conditions": parts} if parts else {})}

        return {
            **rate(self.outcomes),
            "tasks": {name: of_task(name, outcomes) for name, outcomes in self.by_task().items()},
            **({"kinds": {kind: rate(outcomes) for kind, outcomes in kinds.items()}} if kinds else {}),
            "broken": self.broken,
            "outcomes": [
                {
                    "task": e.rollout.task.index,
                    "state": e.rollout.init_index,
                    "success": e.success if e.failure is None else None,
                    "steps": e.steps,
                    **(
                        {"kind": e.rollout.task.change.kind, "name": e.rollout.task.name}
                        if e.rollout.task.change
                        else {}
                    ),
                }
                for e in self.episodes
            ],
        }

    def by_kind(self) -> dict[str, list[bool]]:
        """Outcomes of variants by kind of change, in the order of `KINDS`; empty if there are none."""
        kinds: dict[str, list[bool]] = {}
        for episode in self.episodes:
            change = episode.rollout.task.change
            if change is not None:
                outcomes = kinds.setdefault(change.kind, [])
                if episode.failure is None:
                    outcomes.append(episode.success)
        return {kind: kinds[kind] for kind in KINDS if kind in kinds}

    def by_task(self) -> dict[str, list[bool]]:
        """Outcomes by task name; the list is empty if all episodes of a task broke. Variants count for LIBERO's task."""
        tasks: dict[str, list[bool]] = {}
        for episode in self.episodes:
            outcomes = tasks.setdefault(_base_name(episode), [])
            if episode.failure is None:
                outcomes.append(episode.success)
        return tasks

    def by_condition(self) -> dict[str, dict[str, list[bool]]]:
        """For each task whose goal has several conditions: whether each of them held when the episodes ended."""
        tasks: dict[str, dict[str, list[bool]]] = {}
        for episode in self.episodes:
            if episode.failure is None and len(episode.conditions) > 1:
                of_task = tasks.setdefault(_base_name(episode), {})
                for words, held in episode.conditions.items():
                    of_task.setdefault(words, []).append(held)
        return tasks


def _base_name(episode: Episode) -> str:
    """Name of LIBERO's task of which an episode's task is perhaps a variant."""
    task = episode.rollout.task
    return task.change.base if task.change else task.name


def paired_outcomes(before: EvaluationResult, after: EvaluationResult) -> tuple[list[bool], list[bool]]:
    """Outcomes of the episodes that ran to their end in both of two evaluations on the same states and noise."""
    pairs = [
        (first.success, second.success)
        for first, second in zip(before.episodes, after.episodes, strict=True)
        if first.failure is None and second.failure is None
    ]
    return [first for first, _ in pairs], [second for _, second in pairs]


def describe_broken(broken: Sequence[str], total: int) -> str:
    """How many of `total` episodes broke, which is not 0, and the most frequent cause."""
    ((cause, count),) = Counter(broken).most_common(1)
    return f"{len(broken)} of {total} broken and not counted; most frequent cause ({count} times): {cause}"


def refuse_broken(what: str, broken: Sequence[str], total: int) -> None:
    """Raise if more than a tenth of the `total` episodes of `what` broke.

    Raises:
        BrokenSimulationsError: they did.
    """
    if len(broken) > LARGEST_BROKEN_SHARE * total:
        raise BrokenSimulationsError(
            f"{what}: {describe_broken(broken, total)}; repair the machine (python -m pi0.doctor) and repeat"
        )


def evaluate(
    environments: Environments,
    policy: Policy,
    episodes: int,
    seed: int,
    record: int = 0,
    label: str = "evaluation",
    initial_states: list[InitStatePool] | None = None,
    filmed: int | None = None,
    kept: Kept | None = None,
) -> EvaluationResult:
    """Evaluate a policy on the evaluation states of all tasks, or on other `initial_states`.

    Two policies evaluated with the same `episodes` and `seed` get the same states and the same noise. In a
    distributed run all ranks call it, each runs its share, and each gets the whole result.

    Args:
        environments: tasks and workers.
        policy: the policy that acts.
        episodes: number of episodes in all, spread evenly over the tasks; at most 50 a task.
        seed: seed of the policy's noise.
        record: draw a video frame every this many control steps; 0: none.
        label: text of the progress bar.
        initial_states: states to use instead of the evaluation states, a pool for each task.
        filmed: draw frames only in the first so many episodes of each task, of variants of each kind; None: in all.
        kept: episodes that an earlier run has finished are not run again, and the result holds outlines.
    Raises:
        InputError: more episodes than there are states.
        Interrupted: the run was asked to stop.
    """
    # Only rank 0 makes them: if a request to stop ended its workers' call, ranks that wait for it would wait for ever.
    pools = initial_states or collectives.on_rank_zero(environments.evaluation_states)
    counts = [episodes // len(pools) + (index < episodes % len(pools)) for index in range(len(pools))]
    for states, count in zip(pools, counts, strict=True):
        if count > len(states):
            raise InputError(
                f"{states.task.name} has {len(states)} evaluation states, but {count} are needed; use fewer episodes"
            )
    rollouts = [
        environments.rollout(states, index, (EVALUATION, seed, states.task.index, index), record)
        for states, count in zip(pools, counts, strict=True)
        for index in range(count)
    ]
    if filmed is not None:
        rollouts = _filmed_first(rollouts, filmed)
    rank, world_size = collectives.rank_and_world_size()
    share = range(rank, len(rollouts), world_size)
    known = {index: None if kept is None else kept.outline(rollouts[index]) for index in share}
    results = {
        index: _restored(environments, rollouts[index], outline)
        for index, outline in known.items()
        if outline is not None
    }
    # Variants that share a scene come together, so that few scenes are open at a time.
    scenes = {rollout.task.scene: number for number, rollout in reversed([*enumerate(rollouts)])}
    waiting = sorted(
        set(share) - results.keys(), key=lambda index: (scenes[rollouts[index].task.scene], index)
    )
    with (
        progress(total=len(share), label=label, unit="episode", initial=len(results)) as bar,
        suppress(Interrupted),
    ):
        for index, episode in environments.run_policy(policy, [rollouts[index] for index in waiting]):
            results[waiting[index]] = episode if kept is None else kept.add(episode)
            bar.update(1, f"{sum(e.success for e in results.values())} solved")
    environments.interrupts.check_together(abandoned=len(results) < len(share))
    if world_size > 1:
        outlines = {index: episode.outline() for index, episode in results.items()}
        results = {index: episode for part in collectives.gather(outlines) for index, episode in part.items()}
    evaluated = pools[0].kind == "evaluation"
    init_states = environments.evaluation_source if evaluated else VALIDATION_STATES
    return EvaluationResult(
        [results[index] for index in range(len(rollouts))],
        environments.protocol(episodes=episodes, seed=seed, init_states=init_states),
    )


def _filmed_first(rollouts: list[Rollout], count: int) -> list[Rollout]:
    """The rollouts, of which only the first `count` of each task, or of each kind of variants, are filmed."""
    seen: Counter = Counter()
    chosen = []
    for rollout in rollouts:
        change = rollout.task.change
        group = rollout.task if change is None else change.kind
        chosen.append(rollout if seen[group] < count else replace(rollout, record=0))
        seen[group] += 1
    return chosen


def _restored(environments: Environments, rollout: Rollout, outline: dict[str, Any]) -> Episode:
    """An episode of which only its outline is known."""
    return Episode(
        rollout,
        images={},
        states=np.zeros((0, STATE_DIM), np.float32),
        actions=np.zeros((0, environments.pool.spec.chunk, ACTION_DIM), np.float32),
        executed=np.array([outline["steps"]]),
        success=outline["success"],
        failure=outline["failure"],
        conditions=outline.get("conditions", {}),  # outlines of earlier versions have none
    )


def restore_result(environments: Environments, content: dict) -> EvaluationResult:
    """Restore an evaluation of recorded states from `EvaluationResult.to_dict`; a collective."""
    pools = {pool.task.index: pool for pool in collectives.on_rank_zero(environments.evaluation_states)}
    seed = content["protocol"]["seed"]
    episodes = []
    for outline in content["episodes"]:
        task, state = outline["task"], outline["state"]
        rollout = environments.rollout(pools[task], state, (EVALUATION, seed, task, state))
        episodes.append(_restored(environments, rollout, outline))
    return EvaluationResult(episodes, content["protocol"])
