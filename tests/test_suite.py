"""The tests themselves: what holds for their files."""

import ast
import multiprocessing
import os
import subprocess

import mujoco
import pytest

from pi0.base.paths import REPO_ROOT
from tests.support.boundary import Forbidden

FILES = sorted((REPO_ROOT / "tests").rglob("*.py"))


def imported(source: str) -> set[str]:
    """Every module that the code may import, with the names that it takes from packages."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module or ''}.{alias.name}" for alias in node.names} | {node.module or ""}
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_what_tests_share_is_in_tests_support_and_not_in_a_test_module(path):
    modules = [part for name in imported(path.read_text(encoding="utf-8")) for part in name.split(".")]
    assert [part for part in modules if (REPO_ROOT / "tests" / f"{part}.py").is_file()] == []


@pytest.mark.parametrize(
    "start",
    [
        lambda: subprocess.run(["true"], check=True),
        lambda: os.fork() or os._exit(0),
        multiprocessing.Process(target=print).start,
        lambda: mujoco.MjModel.from_xml_string("<mujoco/>"),
    ],
    ids=["program", "fork", "multiprocessing", "simulation"],
)
def test_a_test_without_a_mark_that_starts_a_process_or_simulates_fails(boundary, start):
    with pytest.raises(Forbidden, match="mark it engine, runs or soak"):
        start()
    with pytest.raises(Forbidden):  # also where the code under test has caught the error
        boundary.check()


@pytest.mark.runs
def test_a_marked_test_may(boundary):
    subprocess.run(["true"], check=True)
    boundary.check()
