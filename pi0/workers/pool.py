"""A pool of worker processes: what is asked of them, what they answer, and what becomes of those that are lost."""

from __future__ import annotations

import logging
import math
import os
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np

from pi0.base.errors import interrupt_afterwards
from pi0.workers.arrays import ArrayTable, SharedArrays
from pi0.workers.process import LostWorkerError, LostWorkersError, WorkerError, WorkerProcess

logger = logging.getLogger(__name__)

CHECK_S = 1.0  # longest time from one call of `WorkerPool.check` to the next
ATTEMPTS = 3  # times a piece of work is given to a worker before it counts as failed


def usable_cores() -> int:
    """Cores for this process's workers: those it may run on, less what other ranks of this machine use."""
    cores = len(os.sched_getaffinity(0))
    try:  # a container's share, in microseconds of CPU time and of wall time
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, max(1, int(quota) // int(period))) if quota != "max" else cores
    except (OSError, ValueError):
        pass  # no such limit here
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


@dataclass(frozen=True)
class Loss:
    """A worker that was replaced, why, and what it was doing."""

    worker: int
    cause: str
    work: tuple[str, ...]

    def __str__(self) -> str:
        return f"worker {self.worker} {self.cause} while it ran {', '.join(self.work) or 'nothing'}"


class WorkerPool:
    """Worker processes, each of which holds one object and answers calls of its methods.

    A worker that ends, hangs or sends what cannot be read is replaced at once by a new process with a new object,
    cleared arrays and random numbers that none had before.

    Attributes:
        losses: every worker that was replaced, in order.
        common: the arrays that all workers share with this process, by name; a replacement finds them as they are.

    Args:
        worker: what makes the object, as `module:name`; called in the process as `name(spec, arrays, random)`, with a
            `numpy.random.Generator`. The object has two methods besides those that are called: `report()`, whose
            result comes with every answer (`reports`), and `close()`, called before the process ends.
        spec: anything that can be pickled.
        table: the arrays each worker shares with this process.
        workers: number of processes; None for `usable_cores`.
        streams: where random numbers come from. Each worker and each of its replacements gets a stream of its own;
            the same seed gives the same ones. Two pools that share a seed need two of its children.
        limit_s: seconds after which a worker that has not answered counts as hung.
        check: called every second or sooner while workers are waited for; what it raises ends the waiting.
        environment: variables of the processes, unless they are set already.
        common: the arrays that all workers share; each gets them beside its own, so no name may be in both.
    """

    def __init__(
        self,
        worker: str,
        spec: Any,
        table: ArrayTable,
        workers: int | None = None,
        *,
        streams: np.random.SeedSequence,
        limit_s: float = 180.0,
        check: Callable[[], None] = lambda: None,
        environment: Mapping[str, str] | None = None,
        common: ArrayTable | None = None,
    ):
        self.spec = spec
        self.limit_s = limit_s
        self.check = check
        self.losses: list[Loss] = []
        self._made_of = worker, spec, table
        self._environment = environment or {}
        self._common = SharedArrays("pi0-workers", common or {})
        self.common = self._common.arrays
        self._streams = streams.spawn(workers or usable_cores())
        self._workers: list[WorkerProcess] = []
        # It also ends them where nobody closes the pool, as when Ctrl+C comes before a `with` has it.
        self._end = weakref.finalize(self, _end, self._workers)
        for number in range(len(self._streams)):
            self._start(number)

    @property
    def arrays(self) -> list[dict[str, np.ndarray]]:
        """The arrays of each worker, shared with it, by name."""
        return [worker.arrays for worker in self._workers]

    @property
    def processes(self) -> list[int]:
        """Process ids of the workers."""
        return [worker.pid for worker in self._workers]

    @property
    def reports(self) -> list[Any]:
        """What each worker's `report()` gave with its last answer; None where it has not answered yet."""
        return [worker.report for worker in self._workers]

    def send(
        self,
        number: int,
        function: str | Callable[..., Any],
        arguments: tuple = (),
        limit_s: float | None = None,
        work: tuple[str, ...] | None = None,
    ) -> None:
        """Give a worker something to do, within `answers`.

        Args:
            number: which worker; one that owes no answer.
            function: name of a method of its object, or a function that is called with the object first and that it
                can import.
            limit_s: seconds it has for it; None for the pool's own limit.
            work: what that is, in words, for a `Loss`; None for the function's name.
        """
        name = function if isinstance(function, str) else function.__name__
        self._workers[number].send(function, arguments, limit_s or self.limit_s, work or (name,))

    def next_outcome(self, patience_s: float = math.inf) -> tuple[int, Any] | None:
        """What becomes of something that was sent: (worker, outcome) as in `answers`; the next one that is there.

        Returns None if no worker owes an answer, or none has come in `patience_s` seconds.
        """
        end = time.monotonic() + patience_s
        while busy := [worker for worker in self._workers if worker.busy]:
            self.check()
            patience = min(min(worker.deadline for worker in busy), end) - time.monotonic()
            ready = wait([worker.connection for worker in busy], min(CHECK_S, max(0.0, patience)))
            now = time.monotonic()  # an answer that comes while another is handled is in time
            for worker in busy:
                if worker.connection in ready:
                    return worker.number, self._outcome(worker)
            for worker in busy:
                if now >= worker.deadline:
                    return worker.number, self.lose(worker.number, f"hung for {worker.limit_s:.0f} s")
            if now >= end:
                return None
        return None

    @contextmanager
    def answers(self) -> Iterator[Iterator[tuple[int, Any]]]:
        """What becomes of all that is sent within, as (worker, outcome) in the order in which it comes.

        An outcome is the answer; or a `WorkerError`, not raised, where the function raised an error and the worker
        lives on; or a `Loss` where the worker was lost and replaced. The iterator ends when no worker owes an answer.
        Workers that still owe one at the end of the block are replaced: what they would answer is of no use.
        """
        try:
            yield self._outcomes()
        finally:
            for worker in self._workers:
                if worker.busy:
                    self._replace(worker.number)

    def call(
        self,
        function: str | Callable[..., Any],
        argument_lists: Sequence[tuple],
        limit_s: float | None = None,
    ) -> Iterator[tuple[int, Any]]:
        """Call a function (see `send`) with each arguments, spread over the workers.

        Where a worker is lost, another one takes its place and its call.

        Yields:
            (index into `argument_lists`, result), in order of completion. The worker's arrays are as the call left
            them until the next one is asked for.
        Raises:
            WorkerError: the function raised an error.
            LostWorkersError: workers were lost in it `ATTEMPTS` times.
        """
        waiting = deque(range(len(argument_lists)))
        attempts = [0] * len(argument_lists)
        calls: dict[int, int] = {}

        def start_next(number: int) -> None:
            if waiting:
                index = calls[number] = waiting.popleft()
                attempts[index] += 1
                self.send(number, function, argument_lists[index], limit_s)

        with self.answers() as answers:
            for number in range(len(self._workers)):
                start_next(number)
            for number, outcome in answers:
                index = calls.pop(number)
                if isinstance(outcome, WorkerError):
                    raise outcome
                if not isinstance(outcome, Loss):
                    yield index, outcome
                elif attempts[index] < ATTEMPTS:
                    waiting.appendleft(index)
                else:
                    raise LostWorkersError(
                        f"{outcome}, {ATTEMPTS} times; look for what ends it, such as too little memory"
                    )
                start_next(number)

    def lose(self, number: int, cause: str) -> Loss:
        """Replace a worker that is of no use any more, and keep account of it."""
        loss = Loss(number, cause, self._workers[number].work)
        self.losses.append(loss)
        logger.warning("%s", loss)
        self._replace(number)
        return loss

    def close(self) -> None:
        """End the workers; one that still owes an answer at once."""
        self._end()
        self._common.close()

    def _start(self, number: int) -> None:
        (stream,) = self._streams[number].spawn(1)  # the next one: a replacement's is another
        with interrupt_afterwards():  # else the process is there and nobody knows of it
            worker = WorkerProcess(number, *self._made_of, stream, self._environment, self._common)
            self._workers[number : number + 1] = [worker]

    def _replace(self, number: int) -> None:
        self._workers[number].kill()
        self._start(number)

    def _outcomes(self) -> Iterator[tuple[int, Any]]:
        while (outcome := self.next_outcome()) is not None:
            yield outcome

    def _outcome(self, worker: WorkerProcess) -> Any:
        try:
            return worker.receive()
        except WorkerError as error:
            return error
        except LostWorkerError as lost:
            return self.lose(worker.number, str(lost))


def _end(workers: list[WorkerProcess]) -> None:
    for worker in workers:
        if worker.busy:
            worker.kill()
        else:
            worker.close()
    for worker in workers:
        worker.wait()
    workers.clear()
