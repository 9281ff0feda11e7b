"""What costs how much, which files go first, and runs that several files compare others with."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # as many test processes as cores: one thread for each

import pytest

from tests.support import programs
from tests.support.boundary import COSTS, Boundary
from tests.support.stage_13_runs import finish, outcome, start

# Those that start many processes, so that neither of two test processes is left with one at the end.
LONGEST = ("test_production_stage", "test_resume", "test_stages", "test_dataset_stage", "test_distributed")

BOUNDARY = Boundary()
programs.install()


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: (*LONGEST, item.path.stem).index(item.path.stem))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    BOUNDARY.closed = not any(item.get_closest_marker(mark) for mark in COSTS)
    try:
        return (yield)
    finally:
        BOUNDARY.closed = False


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    try:
        return (yield)
    finally:
        BOUNDARY.check()


@pytest.fixture
def boundary():
    return BOUNDARY


@pytest.fixture
def fresh_python(monkeypatch):
    """Start Python for real where it is otherwise forked (`tests/support/programs.py`)."""
    monkeypatch.setattr(programs.Program, "fresh", True)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run without interruption."""
    folder = tmp_path_factory.mktemp("straight")
    output = finish(start(folder))
    assert any("loss" in row for row in outcome(folder)["rows"]), "a run that learns nothing proves nothing"
    return folder, output


@pytest.fixture(scope="module")
def straight_of_two(tmp_path_factory):
    """The same of two processes."""
    folder = tmp_path_factory.mktemp("straight_of_two")
    finish(start(folder, processes=2))
    return folder
