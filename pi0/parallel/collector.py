"""The trainer's side of the workers: slices are asked for, come back filled, and are filled again where one is lost."""

from __future__ import annotations

import math
import mmap
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from pi0.base.errors import InputError, MachineError
from pi0.parallel.actor import Filled, Task
from pi0.parallel.policy import views
from pi0.parallel.slices import publish
from pi0.parallel.worker import Player, PlayerSpec
from pi0.workers.arrays import arrays_in, nbytes
from pi0.workers.pool import ATTEMPTS, Loss, WorkerPool
from pi0.workers.process import WorkerError, WorkerInputError

START_S = 120.0  # for a worker to import what it needs and to start its game
WORKER = "pi0.parallel.worker:worker_process"


class SliceError(MachineError):
    """A slice failed time and again."""


class Collector:
    """Workers that fill slices in processes of their own.

    Attributes:
        arrays: the shared memory (`Layout`).
        states: where each worker's next slice begins.
        numbers: how many slices each worker has filled.
        respawns: why workers were replaced, in words.

    Args:
        spec: what the workers play.
        deadline_s: longest time for a slice.
        memory_mb: a worker that uses more is replaced.
        check: called while the trainer waits; what it raises ends the waiting.
    """

    def __init__(
        self,
        spec: PlayerSpec,
        *,
        deadline_s: float,
        memory_mb: float = math.inf,
        check: Callable[[], None] = lambda: None,
    ):
        layout = spec.layout
        self.layout = layout
        self.states: list[Mapping[str, Any]] = [{} for _ in range(layout.workers)]
        self.numbers = [0] * layout.workers
        self.respawns: list[str] = []
        self._deadline_s = deadline_s
        self._memory_mb = memory_mb
        self._check = check
        # Workers that must be told where their next slice begins.
        self._without_state = set(range(layout.workers))
        self._asked: dict[int, Task] = {}
        self._failures: dict[int, int] = {}
        self._open(spec)

    def _open(self, spec: PlayerSpec) -> None:
        self._pool = WorkerPool(
            WORKER,
            spec,
            {},
            self.layout.workers,
            streams=np.random.SeedSequence(0),  # not used: see `Player`
            limit_s=self._deadline_s,
            check=self._check,
            common=self.layout.table,
        )
        self.arrays = self._pool.common

    @property
    def processes(self) -> list[int]:
        """Process ids of the workers."""
        return self._pool.processes

    @property
    def reports(self) -> list[Any]:
        """What each worker last said of its memory (MB) and CPU time (s); None before its first answer."""
        return self._pool.reports

    @property
    def workers_asked(self) -> set[int]:
        """Workers that are filling a slice."""
        return set(self._asked)

    def begin(self, seed: int, generations: Sequence[int]) -> None:
        """Start every worker's game and its first episode.

        Raises:
            InputError: a worker failed to start, with the cause; or two have the same random stream.
        """
        for worker in range(self.layout.workers):
            self._pool.send(worker, "begin", (seed, worker, generations[worker]), START_S)
        while (outcome := self._pool.next_outcome()) is not None:
            worker, state = outcome
            if isinstance(state, Loss | WorkerError):
                raise InputError(_failed_to_start(worker, state, self.layout.workers))
            self.states[worker] = state
            self._without_state.discard(worker)
        require_distinct([state["random"] for state in self.states])

    def resume(self, states: Sequence[Mapping[str, Any]], numbers: Sequence[int]) -> None:
        """Continue from the states before each worker's next slice."""
        self.states, self.numbers = list(states), list(numbers)
        self._without_state = set(range(self.layout.workers))

    def publish(self, weights: np.ndarray, version: int) -> None:
        """Give workers the weights of a version (`ActorCritic.flat`), in place of those of the version before the last."""
        publish(self.layout, self.arrays, views(weights, self.layout.actions), version)

    def ask(self, worker: int, buffer: int, steps: int, version: int, exploration: float) -> None:
        """Ask for a worker's next slice; see `Task`."""
        task = Task(worker, self.numbers[worker], buffer, steps, version, exploration)
        self._asked[worker] = task
        self._failures[worker] = 0
        self._send(worker)

    def next_filled(self, patience_s: float = math.inf) -> Filled | None:
        """A slice that was filled, in the order in which they come; None if none is asked for or comes in time.

        Raises:
            SliceError: the same slice failed `ATTEMPTS` times.
            InputError: a worker met an error that a user can repair.
        """
        while (outcome := self._pool.next_outcome(patience_s)) is not None:
            worker, filled = outcome
            if isinstance(filled, WorkerInputError):
                raise filled
            if isinstance(filled, Loss | WorkerError):
                self._failed(worker, filled)
                continue
            self._take(filled)
            memory = (self.reports[worker] or {}).get("memory_mb", 0.0)
            if memory > self._memory_mb:
                self._pool.lose(worker, f"uses {memory:.0f} MB, more than worker_memory_mb")
                self.respawns.append(f"worker {worker} used {memory:.0f} MB")
                self._without_state.add(worker)
            return filled
        return None

    def drop(self) -> None:
        """Wait for what was asked for, and forget it: the states are still those before it."""
        states, numbers = list(self.states), list(self.numbers)
        while self.next_filled() is not None:
            pass
        self.resume(states, numbers)

    def close(self) -> None:
        """End the workers."""
        self._pool.close()

    def _take(self, filled: Filled) -> None:
        del self._asked[filled.worker]
        self.states[filled.worker] = filled.state
        self.numbers[filled.worker] += 1

    def _send(self, worker: int) -> None:
        task = self._asked[worker]
        if worker in self._without_state:
            task = replace(task, state=self.states[worker])
            self._without_state.discard(worker)
        name = f"slice {task.number} of worker {worker}"
        self._pool.send(worker, "fill", (task,), work=(name,))

    def _failed(self, worker: int, failure: Loss | WorkerError) -> None:
        """Ask for the same slice again, from its first state: whoever fills it, it is the same."""
        task = self._asked[worker]
        self._failures[worker] += 1
        self.respawns.append(str(failure))
        if not isinstance(failure, Loss):  # it lives on, but nobody knows in what state
            self._pool.lose(worker, "raised an error")
        if self._failures[worker] == ATTEMPTS:
            del self._asked[worker]
            raise SliceError(
                f"slice {task.number} of worker {worker} failed {ATTEMPTS} times, the last time so: {failure}"
            )
        self._without_state.add(worker)
        self._send(worker)


class SerialCollector(Collector):
    """The same workers, one after another in this process; with the same numbers, to the bit."""

    def _open(self, spec: PlayerSpec) -> None:
        # Aligned as what processes share is, since a sum may be rounded differently elsewhere.
        self.arrays = arrays_in(mmap.mmap(-1, nbytes(self.layout.table)), self.layout.table)
        self._player = Player(spec, self.arrays)
        self._waiting: deque[Task] = deque()

    @property
    def processes(self) -> list[int]:
        """None: there are no other processes."""
        return []

    @property
    def reports(self) -> list[Any]:
        """None."""
        return []

    def begin(self, seed: int, generations: Sequence[int]) -> None:
        """Start every worker's first episode."""
        with threadpool_limits(1, "blas"):
            self.states = [
                self._player.begin(seed, worker, generation) for worker, generation in enumerate(generations)
            ]
        require_distinct([state["random"] for state in self.states])

    def next_filled(self, patience_s: float = math.inf) -> Filled | None:
        """Fill the slice that has waited longest."""
        self._check()
        if not self._waiting:
            return None
        with threadpool_limits(
            1, "blas"
        ):  # a worker has one thread, and another number could give other bits
            filled = self._player.fill(self._waiting.popleft())
        self._take(filled)
        return filled

    def close(self) -> None:
        """End the games."""
        self._player.close()

    def _send(self, worker: int) -> None:
        self._waiting.append(replace(self._asked[worker], state=self.states[worker]))


def require_distinct(streams: Sequence[str]) -> None:
    """Raise `InputError` if two workers have the same random stream."""
    first: dict[str, int] = {}
    for worker, stream in enumerate(streams):
        if stream in first:
            raise InputError(
                f"workers {first[stream]} and {worker} have identical random sequences; "
                "python -m pi0.parallel.test_parallel shows all of them"
            )
        first[stream] = worker


def _failed_to_start(worker: int, failure: Loss | WorkerError, workers: int) -> str:
    cause = str(failure).removeprefix(f"worker {worker}: ").removeprefix("it could not start: ")
    if isinstance(failure, Loss):
        mend = f"if its memory was too little, start fewer than {workers} workers (--n_workers)"
    elif isinstance(failure, WorkerInputError):
        return f"Worker {worker} failed to start: {cause}"
    else:
        mend = "its traceback is above; --workers 0 runs it in this process, under a debugger if you like"
    return f"Worker {worker} failed to start: {cause}; {mend}"
