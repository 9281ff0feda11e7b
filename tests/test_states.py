"""Tables of benchmarks/states.py."""

import json

import numpy as np
import pytest

from benchmarks.states import solved, table
from pi0.base.errors import InputError


def write_score(file, successes, task=3, states=None, key=None):
    outcomes = [
        {"task": task, "state": state, "success": success}
        for state, success in zip(states or range(len(successes)), successes, strict=True)
    ]
    outcomes.append({"task": task + 1, "state": 0, "success": True})
    file.write_text(json.dumps({key: {"outcomes": outcomes}} if key else {"outcomes": outcomes}))
    return file


def test_states_are_matched_by_number_in_scores_of_a_run_and_of_an_evaluation(tmp_path):
    run = write_score(tmp_path / "run.json", [True, False, True], key="after")
    score = write_score(tmp_path / "score.json", [False, True, True], states=[2, 0, 1])
    assert solved([run, score], 3).tolist() == [[True, False, True], [True, True, False]]


def test_the_table_counts_states_and_what_equal_states_would_give():
    outcomes = np.array([[True] * 10 + [False] * 10] * 3)
    lines = table(outcomes).splitlines()
    assert lines[0] == "solved in each score, of 20 states: 10, 10, 10"
    assert lines[4:8] == ["| 0 of 3 | 10 | 2.5 |", "| 1 of 3 | 0 | 7.5 |", "| 2 of 3 | 0 | 7.5 |", "| 3 of 3 | 10 | 2.5 |"]  # fmt: skip
    assert lines[-1] == "p = 0.0001 (10,000 shuffles)"


def test_equal_states_are_not_called_unequal():
    outcomes = np.random.default_rng(1).random((3, 50)) < 0.6
    assert float(table(outcomes).splitlines()[-1].split()[2]) > 0.05
    assert table(np.ones((2, 5), bool)).splitlines()[-1] == "p = 1 (10,000 shuffles)"


def test_scores_that_cannot_be_compared_are_refused(tmp_path):
    first = write_score(tmp_path / "first.json", [True, False])
    with pytest.raises(InputError, match="at least two scores"):
        solved([first], 3)
    with pytest.raises(InputError, match="has no episode of task 7"):
        solved([first, first], 7)
    other = write_score(tmp_path / "other.json", [True, False, True])
    with pytest.raises(InputError, match=r"other\.json and .*first\.json have different states of task 3"):
        solved([first, other], 3)
