"""Which task and state come next: turns of tasks, rings of states, streaks of solved visits."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Generic, TypeVar

from pi0.libero.episodes import Episode
from pi0.libero.suites import Task
from pi0.ript.env_runner import LIBEROEnvRunner

State = TypeVar("State", bound=Hashable)

# A task that always succeeds still gets a tenth as many turns as one that always fails.
SMALLEST_SHARE = 0.1


class TaskTurns:
    """Tasks take turns in proportion to how often they fail.

    Each task collects credit, its share of all failures, until it has the most; a turn costs 1. This is as fair as a
    random draw and needs no random numbers.

    Attributes:
        credit: credit of each task; the sum is 0 after each turn.
        success_rate: success rate of each task in its last turn, 0 to 1; 0.5 before the first.
    """

    def __init__(self, tasks: Sequence[Task]):
        self._tasks = list(tasks)
        self.credit = [0.0] * len(tasks)
        self.success_rate = [0.5] * len(tasks)

    def next_task(self) -> int:
        """Position of the task that has the next turn."""
        shares = [max(SMALLEST_SHARE, 1.0 - rate) for rate in self.success_rate]
        self.credit = [
            credit + share / sum(shares) for credit, share in zip(self.credit, shares, strict=True)
        ]
        task = self.credit.index(max(self.credit))
        self.credit[task] -= 1.0
        return task

    def state_dict(self) -> dict[str, list[float]]:
        """Credit and success rates."""
        return {"credit": list(self.credit), "success_rate": list(self.success_rate)}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        """Continue from `state_dict()`."""
        self.credit, self.success_rate = list(state["credit"]), list(state["success_rate"])

    def record(self, episodes: Sequence[Episode]) -> None:
        """Record how often each task has succeeded; a task without episodes keeps its rate."""
        for number, task in enumerate(self._tasks):
            outcomes = [episode.success for episode in episodes if episode.rollout.task == task]
            if outcomes:
                self.success_rate[number] = sum(outcomes) / len(outcomes)


class CursorTurns:
    """The task at a runner's task cursor has its turn until the runner advances the cursor.

    Args:
        env_runner: the runner; its `current_task` has the turn.
        tasks: all tasks that may have a turn.
    """

    def __init__(self, env_runner: LIBEROEnvRunner, tasks: Sequence[Task]):
        self._env_runner = env_runner
        self._tasks = list(tasks)

    def next_task(self) -> int:
        """Position of the runner's current task."""
        assert self._env_runner.current_task is not None, "a rank without tasks practises nothing"
        return self._tasks.index(self._env_runner.current_task)

    def record(self, episodes: Sequence[Episode]) -> None:
        """Do nothing: the cursor does not depend on success."""


class Ring(Generic[State]):
    """Initial states of a task in ring order: all of them come before any is repeated.

    Attributes:
        states: names of the states, in ring order.
        init_state_cursor: how many have come so far.
    """

    def __init__(self, states: Iterable[State]):
        self.states = list(states)
        self.init_state_cursor = 0

    def sample_batch_circular(self, batch_size: int) -> list[State]:
        """The next `batch_size` states, in ring order."""
        first = self.init_state_cursor
        self.init_state_cursor += batch_size
        return [self.states[(first + number) % len(self.states)] for number in range(batch_size)]

    def get_states_for_envs(self, num_parallel_envs: int, rloo_batch_size: int) -> list[State]:
        """States for all rollouts of all environments; no two are the same if there are enough states."""
        return self.sample_batch_circular(num_parallel_envs * rloo_batch_size)

    def sample_unsolved(self, count: int, skip: Callable[[State], bool]) -> tuple[list[State], int]:
        """The next `count` states that `skip` does not skip, and how many it skipped on the way."""
        chosen: list[State] = []
        skipped = 0
        while len(chosen) < count:
            for state in self.get_states_for_envs(1, count - len(chosen)):
                if skip(state):
                    skipped += 1
                else:
                    chosen.append(state)
        return chosen, skipped


class Streaks:
    """How often in a row each state was solved.

    A state that was solved on each of its last `threshold` visits is skipped at its next turn, once. Then it must be
    solved on as many visits again. So a solved state takes at most `threshold` of `threshold + 1` rounds, and if the
    policy forgets it, that is noticed a round later.
    """

    def __init__(self, threshold: int):
        self.threshold = threshold
        self.solved_in_a_row: dict[Hashable, int] = {}

    def record(self, state: Hashable, solved: bool) -> None:
        """Record a visit."""
        self.solved_in_a_row[state] = self.solved_in_a_row.get(state, 0) + 1 if solved else 0

    def record_episodes(self, episodes: Sequence[Episode]) -> None:
        """Record each episode as a visit of its state, named by task and index."""
        for episode in episodes:
            self.record((episode.rollout.task, episode.rollout.init_index), episode.success)

    def skip(self, state: Hashable) -> bool:
        """Whether the state, which has its turn, is skipped this time."""
        if self.solved_in_a_row.get(state, 0) < self.threshold:
            return False
        self.solved_in_a_row[state] = 0
        return True
