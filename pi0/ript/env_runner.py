"""`LIBEROEnvRunner`: the environments of one rank of RIPT, with its task cursor and its open scenes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pi0.libero.environments import Environments, PolicySpec
from pi0.libero.episodes import Episode, Rollout
from pi0.libero.evaluation import EvaluationResult, evaluate, refuse_broken
from pi0.libero.init_states import InitStatePool
from pi0.libero.rollouts import Policy, RolloutPool
from pi0.libero.settings import TaskConfig
from pi0.libero.suites import Task, find_tasks
from pi0.libero.worker import Worker
from pi0.training.interrupts import Interrupts

# Result of `LIBEROEnvRunner.create_parallel_envs`: the pool, the task's index, the number of environments.
ParallelEnvs = tuple[RolloutPool, int, int]


class LIBEROEnvRunner(Environments):
    """Runs episodes of LIBERO tasks in parallel worker processes, task after task.

    Attributes:
        assigned_tasks: tasks that this rank practises; all of them unless the run is distributed.
        task_cursor: number of turns taken so far.
        current_task: the assigned task that has its turn.

    Args:
        task: which tasks and how they are simulated, the section `task` of a configuration.
        policy: the policy's cameras, image size and chunk length (`PI0Policy.config`).
        interrupts: requests to stop, as for `Environments`.
    Raises:
        InputError: as for `Environments`.
    """

    def __init__(self, task: TaskConfig, policy: PolicySpec, interrupts: Interrupts | None = None):
        super().__init__(task, policy, interrupts)
        self.assigned_tasks = self.tasks
        self.task_cursor = 0
        self.current_task: Task | None = None

    @property
    def created_envs(self) -> dict[int, ParallelEnvs]:
        """By task index, the environments whose scene is open in every worker; at most `max_open_tasks`."""
        open_everywhere = frozenset.intersection(*self.pool.open_tasks() or [frozenset()])
        count = len(self.pool.processes) * self.pool.spec.slots
        return {task.index: (self.pool, task.index, count) for task in self.tasks if task in open_everywhere}

    def set_current_task_by_cursor(self) -> Task | None:
        """Make the task at the cursor the current one; None if no task is assigned."""
        tasks = self.assigned_tasks
        self.current_task = tasks[self.task_cursor % len(tasks)] if tasks else None
        return self.current_task

    def advance_task_cursor(self) -> None:
        """Move on to the next assigned task."""
        self.task_cursor += 1

    def training_states(
        self, count: int, seed: int, tasks: Sequence[Task] | None = None
    ) -> list[InitStatePool]:
        """As `Environments.training_states`; `tasks` None means the assigned tasks."""
        return super().training_states(count, seed, self.assigned_tasks if tasks is None else tasks)

    def create_parallel_envs(self, task_name: str | int) -> ParallelEnvs:
        """Open a task's scene in every worker, if it is not open: (env, env_id, env_num).

        Rollouts open the scenes that they need. If a scene is opened before, the first of them do not wait. A scene
        stays open from step to step until `max_open_tasks` other scenes have been used, or until `cleanup`.
        """
        (task,) = find_tasks(self.benchmark_name, [task_name])
        if task.index not in self.created_envs:
            workers = len(self.pool.processes)
            list(self.pool.call(_open_scene, [(task,)] * workers))  # one call each, since all are idle
        return self.created_envs[task.index]

    def run_policy_in_env(
        self,
        policy: Policy,
        rollouts: Sequence[Rollout],
        created_env: ParallelEnvs | None = None,
        num_envs: int | None = None,
    ) -> Iterator[tuple[int, Episode]]:
        """`run_policy` in `created_env` (`create_parallel_envs`), or without one in the runner's own pool."""
        return self.run_policy(policy, rollouts, num_envs, created_env[0] if created_env else None)

    def run(
        self,
        policy: Policy,
        episodes: int,
        seed: int,
        record: int = 0,
        label: str = "evaluation",
        initial_states: list[InitStatePool] | None = None,
    ) -> EvaluationResult:
        """Score a policy on all tasks: `pi0.libero.evaluation.evaluate` on this runner.

        Raises:
            BrokenSimulationsError: every episode broke.
        """
        result = evaluate(self, policy, episodes, seed, record, label, initial_states)
        if not result.outcomes:
            refuse_broken(label, result.broken, len(result.episodes))
        return result

    def cleanup(self) -> None:
        """Close the environments and end the worker processes."""
        self.close()


def _open_scene(worker: Worker, task: Task) -> None:
    """Runs in a worker."""
    worker.open(task)
