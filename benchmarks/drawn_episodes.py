"""Episodes of a policy from drawn states, for benchmarks that look into them."""

from __future__ import annotations

from collections.abc import Sequence

from pi0 import PI0Policy
from pi0.libero.environments import Environments
from pi0.libero.episodes import Episode
from pi0.libero.settings import TaskConfig
from pi0.policy.acting import ActingPolicy


def drawn_episodes(
    policy: PI0Policy,
    suite: str,
    tasks: Sequence[str],
    count: int,
    seed: int,
    max_episode_length: int | None = None,
) -> list[Episode]:
    """`count` episodes of each task, without broken ones, in the order of tasks and states.

    Args:
        policy: it acts.
        suite: of the tasks.
        tasks: by index or name; none: the whole suite.
        count: from so many states.
        seed: of states and noise. Practice with the same seed has the same states.
        max_episode_length: control steps; None: as many as the suite allows.
    """
    task = TaskConfig(
        benchmark_name=suite,
        task_names_to_use=list(tasks),
        assets="standins",
        max_episode_length=max_episode_length,
    )
    with Environments(task, policy.config) as environments:
        rollouts = [
            environments.rollout(states, index, (seed, states.task.index, index))
            for states in environments.training_states(count, seed)
            for index in range(len(states))
        ]
        done = dict(environments.run_policy(ActingPolicy(policy), rollouts))
    return [done[number] for number in sorted(done) if done[number].failure is None]
