"""What costs how much, which files go first, and runs that several files compare others with."""

import ctypes
import fcntl
import gc
import os
import signal
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # as many test processes as cores: one thread for each

import pytest

from tests.support import programs
from tests.support.boundary import COSTS, Boundary
from tests.support.stage_13_runs import finish, outcome, start

# Those that start many processes, so that neither of two test processes is left with one at the end.
LONGEST = (
    "test_production_stage",
    "test_commands",
    "test_resume",
    "test_dataset_stage",
    "test_distributed",
    "test_stages",
)

BOUNDARY = Boundary()
programs.install()


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: (*LONGEST, item.path.stem).index(item.path.stem))


def pytest_collection_finish():
    # What was imported stays, so later collections need not examine it: they take 20 ms instead of 300.
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    BOUNDARY.closed = not any(item.get_closest_marker(mark) for mark in COSTS)
    try:
        return (yield)
    finally:
        BOUNDARY.closed = False
        if item.get_closest_marker("engine"):
            gc.collect()  # a scene is 50 MB and full of cycles


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    try:
        return (yield)
    finally:
        BOUNDARY.check()


@pytest.fixture(autouse=True, scope="module")
def _freed_memory_is_returned():
    """After each file: a policy's update in this process makes malloc keep what it frees (`pi0/training/memory.py`)."""
    yield
    gc.collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):  # glibc
        libc.malloc_trim(0)


@pytest.fixture
def signals_as_before():
    """For tests in whose process a trainer runs: it takes over these signals."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    signal.set_wakeup_fd(-1)
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def boundary():
    return BOUNDARY


@pytest.fixture
def fresh_python():
    """Start Python for real where it is otherwise forked (`tests/support/programs.py`)."""
    with programs.fresh_python():
        yield


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """`once(name, make)`: a folder that `make(folder)` has filled, in one of the test processes for all of them."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent

    def folder_of(name: str, make: Callable[[Path], None]) -> Path:
        folder, filled = shared / name, shared / f"{name}.filled"
        with (shared / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not filled.exists():
                make(folder)
                filled.touch()
        return folder

    return folder_of


@pytest.fixture(scope="session")
def straight(once):
    """A run without interruption: its folder, and what it printed."""

    def make(folder: Path) -> None:
        output = finish(start(folder))
        assert any("loss" in row for row in outcome(folder)["rows"]), (
            "a run that learns nothing proves nothing"
        )
        (folder / "output").write_text(output)

    folder = once("straight", make)
    return folder, (folder / "output").read_text()


@pytest.fixture(scope="session")
def straight_of_two(once):
    """The same of two processes: its folder."""
    return once("straight_of_two", lambda folder: finish(start(folder, processes=2)))
