"""The worker's side: `python -m pi0.workers.serve SOCKET OWN COMMON`, started by `pi0.workers.process` and nobody else.

The first message says which object to make (see `pi0.workers.pool.WorkerPool`); each later one calls one of its
methods, or a function with it, and gets one answer. The process ends when the socket closes: no worker outlives its
trainer.
"""

from __future__ import annotations

import importlib
import mmap
import os
import pickle
import select
import sys
import threading
import time
import traceback
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from pi0.base.errors import InputError
from pi0.base.paths import writing_cache
from pi0.workers.arrays import arrays_in, nbytes

GRACE_S = 5.0  # for what is still being done when the trainer ends


def serve(socket_fd: int, own_fd: int, common_fd: int) -> None:
    """Answer calls until the trainer closes the socket."""
    threading.Thread(target=_end_after_trainer, args=(socket_fd,), daemon=True).start()
    connection = Connection(socket_fd)
    try:
        first = connection.recv_bytes()
        try:
            worker = _make(first, own_fd, common_fd)
        except Exception as error:  # noqa: BLE001 whatever it is, the first call hears of it
            connection.recv_bytes()
            connection.send_bytes(_failed(error, None, "it could not start: "))
            return
        try:
            while True:
                connection.send_bytes(_answer(worker, connection.recv_bytes()))
        finally:
            worker.close()
    except (EOFError, ConnectionError):
        pass  # the trainer has ended, or wants no more


def _make(content: bytes, own_fd: int, common_fd: int) -> Any:
    path, spec, own, common, stream = pickle.loads(content)
    module, _, name = path.partition(":")
    maker = getattr(importlib.import_module(module), name)
    arrays = {
        name: array
        for descriptor, table in ((own_fd, own), (common_fd, common))
        for name, array in arrays_in(mmap.mmap(descriptor, nbytes(table)), table).items()
    }
    return maker(spec, arrays, np.random.default_rng(stream))


def _answer(worker: Any, request: bytes) -> bytes:
    """Pickled result, error in one line, its traceback unless a user can repair it, and the worker's report."""
    try:
        function, arguments = pickle.loads(request)
        with writing_cache():  # where libraries of the worker keep what they compile
            if isinstance(function, str):
                result = getattr(worker, function)(*arguments)
            else:
                result = function(worker, *arguments)
        return pickle.dumps((result, None, None, worker.report()), pickle.HIGHEST_PROTOCOL)
    except Exception as error:  # noqa: BLE001 whatever it is, the trainer hears of it and decides
        return _failed(error, worker.report())


def _failed(error: Exception, report: Any, what: str = "") -> bytes:
    mendable = isinstance(error, InputError)
    line = f"{what}{error}" if mendable else f"{what}{type(error).__name__}: {error}"
    trace = None if mendable else traceback.format_exc()
    return pickle.dumps((None, line, trace, report), pickle.HIGHEST_PROTOCOL)


def _end_after_trainer(socket_fd: int) -> None:
    """End this process when the trainer has closed its end, even in the middle of a call."""
    closed = select.poll()
    closed.register(socket_fd, 0)  # a closed end is always told
    closed.poll()
    time.sleep(GRACE_S)
    os._exit(1)


if __name__ == "__main__":
    serve(*map(int, sys.argv[1:]))
