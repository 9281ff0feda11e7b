"""One worker process as its trainer sees it: a socket, shared arrays, a deadline."""

from __future__ import annotations

import logging
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from pi0.base.errors import InputError, MachineError
from pi0.base.paths import REPO_ROOT
from pi0.workers.arrays import ArrayTable, SharedArrays

logger = logging.getLogger(__name__)

STALL_S = 60  # whole seconds; a message that stops half way for longer will never be complete
STOP_S = 5.0  # time a worker has to end by itself


class WorkerError(RuntimeError):
    """What a worker was asked to do raised an error, or a worker was lost."""


class WorkerInputError(WorkerError, InputError):
    """What a worker was asked to do met an error that a user can repair."""


class LostWorkersError(WorkerError, MachineError):
    """Workers are lost time and again."""


class LostWorkerError(Exception):
    """A worker will not answer any more; the message says why."""


class WorkerProcess:
    """A worker process (`pi0.workers.serve`), started at once.

    Attributes:
        number: its place in the pool.
        arrays: shared with it, by name; all 0 at first.
        deadline: when it counts as hung, on the clock of `time.monotonic`; infinite while it owes no answer.
        limit_s: seconds that it has for the answer it owes.
        work: in words, what it was asked last.
        report: what its object's `report()` gave with its last answer; None before the first.

    Args:
        worker, spec, table, environment: as in `pi0.workers.pool.WorkerPool`.
        stream: of its random numbers.
        common: the arrays that all workers share; not closed here.
    """

    def __init__(
        self,
        number: int,
        worker: str,
        spec: Any,
        table: ArrayTable,
        stream: np.random.SeedSequence,
        environment: Mapping[str, str],
        common: SharedArrays,
    ):
        self.number = number
        self.deadline, self.limit_s = float("inf"), float("inf")
        self.work: tuple[str, ...] = ()
        self.report: Any = None
        ours, theirs = socket.socketpair()
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            ours.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", STALL_S, 0))
        own = SharedArrays(f"pi0-worker-{number}", table)
        self.arrays = own.arrays
        descriptors = [theirs.fileno(), own.descriptor, common.descriptor]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pi0.workers.serve", *map(str, descriptors)],
            pass_fds=descriptors,
            stdin=subprocess.DEVNULL,
            # One thread each: the processes are the parallelism. This package comes first, so that a worker finds
            # the same one whatever its directory.
            env={
                **environment,
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "OPENBLAS_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join(filter(None, [str(REPO_ROOT), os.environ.get("PYTHONPATH")])),
            },
            process_group=0,  # Ctrl+C is for the trainer, which then closes the socket
        )
        theirs.close()
        own.close()
        self.connection = Connection(ours.detach())
        self._send((worker, spec, table, common.table, stream))

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def busy(self) -> bool:
        """Whether it owes an answer."""
        return self.deadline < float("inf")

    def send(
        self, function: str | Callable[..., Any], arguments: tuple, limit_s: float, work: tuple[str, ...]
    ) -> None:
        """Ask it to call `function`, which it answers within `limit_s` seconds or counts as hung."""
        self.deadline, self.limit_s, self.work = time.monotonic() + limit_s, limit_s, work
        self._send((function, arguments))

    def receive(self) -> Any:
        """Its answer, when there is one to read.

        Raises:
            WorkerError: what it called raised an error; a `WorkerInputError` if a user can repair it.
            LostWorkerError: it ended, stopped within its answer, or sent what cannot be read.
        """
        self.deadline = float("inf")
        try:
            content = self.connection.recv_bytes()
        except BlockingIOError:
            raise LostWorkerError(f"hung within an answer for {STALL_S} s") from None
        except (EOFError, OSError):
            raise LostWorkerError(f"ended ({self._exit()})") from None
        try:
            answer, error, trace, self.report = pickle.loads(content)
        except Exception as error:  # noqa: BLE001 bytes that are no pickle can raise anything
            raise LostWorkerError(f"sent what cannot be read ({error})") from None
        if error is not None and trace is None:
            raise WorkerInputError(f"worker {self.number}: {error}")
        if error is not None:
            logger.error("worker %d:\n%s", self.number, trace)
            raise WorkerError(f"worker {self.number}: {error}")
        return answer

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()
        self.connection.close()
        self._process.wait()

    def close(self) -> None:
        """Ask it to end; `wait` sees to it."""
        self.connection.close()

    def wait(self) -> None:
        """Return when it has ended, by itself or, after `STOP_S` seconds, killed."""
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _send(self, content: Any) -> None:
        try:
            self.connection.send(content)
        except BlockingIOError:  # it reads no more
            self.deadline, self.limit_s = time.monotonic(), STALL_S
        except (BrokenPipeError, ConnectionResetError):
            pass  # its end of the socket reads as closed, which is where a dead worker is noticed

    def _exit(self) -> str:
        self.wait()  # its socket is closed, so it is about to end
        code = self._process.returncode
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"
