"""How the threads of an operation on the CPU wait for each other: awake while cores are free, asleep beside a neighbour.

PyTorch divides an operation among threads that meet at its end, a thousand times in a minibatch of the quickstart. Who
comes first spins for some milliseconds before it sleeps (300,000 rounds in GNU's OpenMP runtime, libgomp). Alone that is
best: if threads slept at once, a minibatch would take half as long again. Beside another busy process it is worst: the
thread that spins holds the core which the awaited one needs, a thousand times. No number of rounds is good in both
cases (docs/performance.md), and libgomp reads the number only when it is loaded.

But libgomp makes only 100 rounds while it has more threads than there are cores (its manual: GOMP_SPINCOUNT). So a watch
looks ten times a second whether threads of this process wait for a core. While they do, it keeps more threads than there
are cores, which sleep. Operations are divided as before, so they compute the same numbers to the bit.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from pathlib import Path

import torch

LOOK_EVERY_S = 0.1
# Share of the time between two looks in which some thread waited for a core. On 2 cores it was 0.21 and more beside one
# busy thread, and 0.07 and less alone.
CROWDED = 0.15
# Who has set one of these has decided how threads wait.
USERS_OWN = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
TASKS = Path("/proc/self/task")

_starting = threading.Lock()
_watch: CoreWatch | None = None


def watch_cores() -> CoreWatch | None:
    """Watch from now on, once in a process; returns the watch.

    None if there is nothing to watch: operations have one thread, the user has set how threads wait, or the OpenMP
    runtime is not libgomp.
    """
    global _watch
    with _starting:
        users_own = any(name in os.environ for name in USERS_OWN)
        if _watch is None and torch.get_num_threads() > 1 and not users_own:
            openmp = _libgomp()
            if openmp is not None:
                _watch = CoreWatch(openmp)
                threading.Thread(target=_watch.keep_looking, name="core watch", daemon=True).start()
    return _watch


def watched() -> bool:
    """Whether this process has a watch."""
    return _watch is not None


class CoreWatch:
    """Lets the threads of operations sleep while they wait if, and as long as, cores are scarce.

    Args:
        openmp: libgomp, as `_libgomp` returns it.
    """

    def __init__(self, openmp: ctypes.CDLL):
        self._openmp = openmp
        self._waits = CoreWaits()
        self._team: SleepingTeam | None = None

    @property
    def crowded(self) -> bool:
        """Whether cores were scarce at the last look."""
        return self._team is not None

    def keep_looking(self) -> None:
        """Look for ever."""
        while True:
            time.sleep(LOOK_EVERY_S)
            self.look(self._waits.share())

    def look(self, share: float) -> None:
        """Change how threads wait, if `share` of the last moments, as `CoreWaits.share` returns it, asks for it."""
        if share > CROWDED and self._team is None:
            self._team = SleepingTeam(self._openmp)
        elif share <= CROWDED and self._team is not None:
            self._team.end()
            self._team = None


class CoreWaits:
    """How long the threads of this process were ready to run and had no core (Linux counts it for each thread)."""

    def __init__(self) -> None:
        self._looked, self._waited = time.monotonic(), self._read()

    def share(self) -> float:
        """Share of the time since the last call in which the thread that waited longest did so."""
        before, looked = self._waited, self._looked
        self._looked, self._waited = time.monotonic(), self._read()
        longest = max(now - before.get(task, 0) for task, now in self._waited.items())
        return longest / 1e9 / (self._looked - looked)

    @staticmethod
    def _read() -> dict[str, int]:
        """Nanoseconds by the thread's id."""
        waited = {}
        for task in os.listdir(TASKS):
            try:
                with open(f"{TASKS}/{task}/schedstat", "rb", buffering=0) as file:
                    waited[task] = int(file.read().split()[1])
            except (FileNotFoundError, ProcessLookupError):  # it has just ended
                pass
        return waited


class SleepingTeam:
    """More threads of libgomp than there are cores. They do nothing but sleep, until `end`."""

    def __init__(self, openmp: ctypes.CDLL):
        self._openmp = openmp
        self._there, self._over = threading.Event(), threading.Event()
        self._leader = threading.Thread(target=self._lead, name="sleeping team", daemon=True)
        self._leader.start()
        self._there.wait()

    def end(self) -> None:
        """End the threads: libgomp keeps a team as long as the thread that has made it."""
        self._over.set()
        self._leader.join()

    def _lead(self) -> None:
        nothing = ctypes.cast(ctypes.CDLL(None).free, ctypes.c_void_p)  # free(NULL) does nothing
        self._openmp.GOMP_parallel(nothing, None, self._openmp.omp_get_num_procs() + 1, 0)
        self._there.set()
        self._over.wait()


def _libgomp() -> ctypes.CDLL | None:
    """The OpenMP runtime of PyTorch, if it is libgomp on Linux with counts of waiting; None otherwise."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    if not library.exists() or not (TASKS.parent / "schedstat").exists():
        return None
    linked = ctypes.CDLL(str(library))  # it also finds the functions of the libraries that this one needs
    # LLVM's and Intel's runtimes have GNU's functions, too, but wait in ways of their own.
    if not hasattr(linked, "GOMP_parallel") or hasattr(linked, "kmp_set_blocktime"):
        return None
    linked.GOMP_parallel.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    linked.GOMP_parallel.restype = None
    return linked
