"""The environments that tools/setup.py makes, and the lists of their packages."""

import ctypes.util

from pi0.doctor import locked_versions
from tools import setup


def test_what_both_environments_have_has_one_version():
    project, upstream = locked_versions(setup.PROJECT.lock), locked_versions(setup.UPSTREAM.lock)
    shared = project.keys() & upstream.keys()
    assert "torch" in shared
    assert {name: upstream[name] for name in shared} == {name: project[name] for name in shared}


def test_only_the_project_s_environment_asks_for_libraries_that_draw(monkeypatch):
    monkeypatch.setattr(ctypes.util, "find_library", lambda name: None)
    assert {"libegl1", "libosmesa6"} <= set(setup.missing_system_packages(setup.PROJECT, browser=False))
    assert set(setup.missing_system_packages(setup.UPSTREAM, browser=False)) <= {"python3.11-venv"}
