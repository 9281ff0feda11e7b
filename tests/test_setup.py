"""The environments that tools/setup.py makes, and the lists of their packages."""

import ctypes.util

import pytest

from pi0.doctor import locked_versions
from tools import setup


@pytest.mark.parametrize("other", [setup.UPSTREAM, setup.PEERS], ids=lambda other: other.folder.name)
def test_what_two_environments_have_has_one_version(other):
    project, others = locked_versions(setup.PROJECT.lock), locked_versions(other.lock)
    shared = project.keys() & others.keys()
    assert "torch" in shared
    assert {name: others[name] for name in shared} == {name: project[name] for name in shared}


def test_the_game_is_the_one_that_is_measured_and_nothing_of_the_project():
    game, peers = locked_versions(setup.GAME_LOCK), locked_versions(setup.PEERS.lock)
    assert {name: peers[name] for name in game} == game
    assert not game.keys() & locked_versions(setup.PROJECT.lock).keys()


def test_only_the_project_s_environment_asks_for_libraries_that_draw(monkeypatch):
    monkeypatch.setattr(ctypes.util, "find_library", lambda name: None)
    assert {"libegl1", "libosmesa6"} <= set(setup.missing_system_packages(setup.PROJECT, browser=False))
    assert set(setup.missing_system_packages(setup.UPSTREAM, browser=False)) <= {"python3.11-venv"}
