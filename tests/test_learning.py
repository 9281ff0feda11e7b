"""Tables of benchmarks/learning.py and benchmarks/acrlpd_learning.py, and the critics that the runs take."""

import json

import pytest

from benchmarks import acrlpd_learning
from benchmarks.learning import critic_of, table
from pi0.base.errors import InputError


def write_run(folder, successes, history):
    """Results of a run of four episodes of one task, of which one was solved before."""

    def score(solved):
        outcomes = [{"task": 3, "success": number < solved} for number in range(4)]
        return {"successes": solved, "episodes": 4, "outcomes": outcomes}

    folder.mkdir(parents=True)
    results = {"before": score(1), "after": score(successes), "seconds": 300, **history}
    (folder / "results.json").write_text(json.dumps(results))


def test_the_table_has_minutes_of_iterations_without_scores(tmp_path):
    phases = {"inference": 20.0, "physics": 30.0, "update": 40.0}
    write_run(tmp_path / "weighted-seed0", 4, {"history": [{"phases": phases}] * 2})
    write_run(tmp_path / "cloning-seed0", 2, {})
    lines = table(tmp_path).splitlines()
    (practice,) = (line for line in lines if line.startswith("| weighted-seed0 |"))
    assert "4/4" in practice
    assert practice.endswith("| 5.0 | 3.0 |")
    (control,) = (line for line in lines if line.startswith("| cloning-seed0 |"))
    assert control.endswith("| 5.0 | 0.0 |")
    assert "| weighted | 1 | 1/4 | 4/4 | +75.0 points |" in lines
    assert "| cloning | 3 | 1/4 | 2/4 |" in lines
    assert lines[-2:] == ["|---|---|---|---|---|---|---|", "| weighted | 1.3 | 1.0 | 0.7 | 0.0 | 0.0 | 0.0 |"]


def test_an_empty_folder_and_critics_that_are_not_there_are_named(tmp_path):
    with pytest.raises(InputError, match="holds no finished run"):
        table(tmp_path)
    with pytest.raises(InputError, match=r"no critics of seed 2: python benchmarks/acrlpd_learning.py"):
        critic_of(2, tmp_path)
    newest = tmp_path / "critics-seed2" / "run-20261130-020000" / "critic"
    for run in ("run-20261129-010000", "run-20261130-020000"):
        (tmp_path / "critics-seed2" / run / "critic").mkdir(parents=True)
    assert critic_of(2, tmp_path) == newest


def test_successes_of_a_suite_are_counted_by_task_and_score_and_broken_episodes_are_not():
    def score(*outcomes):
        return {"outcomes": [{"task": task, "success": success} for task, success in outcomes]}

    run = {
        "before": score((3, True), (12, False), (12, None)),
        "scores": {"best of 8": score((3, False), (12, True), (12, True))},
    }
    assert acrlpd_learning.by_task([run, run])[2:] == [
        "|---|---|---|",
        "| 3 | 2/2 | 0/2 |",
        "| 12 | 0/2 | 4/4 |",
    ]
    assert acrlpd_learning.by_task([]) == []


def test_full_runs_are_compared_with_ript_of_the_same_seeds_after_as_many_rollouts():
    def full(seed, *rates):
        names = ("offline, one sample", "one sample")
        training = {"seed": seed, "num_train_steps": 4, "offline_iterations": 2, "rollouts": 200}
        scores = {name: {"success_rate": rate} for name, rate in zip(names, rates, strict=True)}
        return {"config": {"training": training, "data": {"rollouts": 400}}, "scores": scores}

    def ript(seed, rollouts, rate):
        history = [{"rollouts": rollouts // 2}] * 2
        return {"config": {"training": {"seed": seed}}, "history": history, "after": {"success_rate": rate}}

    kinds = {
        "short": [ript(1, 384, 0.5), ript(0, 384, 0.8)],
        "weighted": [ript(0, 832, 0.9), ript(1, 832, 0.9), ript(7, 832, 0.1)],
    }
    said = acrlpd_learning.beside_ript([full(0, 0.9, 1.0), full(1, 0.8, 0.9), full(5, 0, 0)], kinds)
    # Two seeds: the interval is 12.706 (Student's t, one degree of freedom) standard errors on each side.
    assert said.splitlines()[2:] == [
        "| offline, one sample | 400 | short | 384 | +10, +30 | +20.0 (-107.1 to +147.1) |",
        "| one sample | 800 | weighted | 832 | +10, +0 | +5.0 (-58.5 to +68.5) |",
    ]
    assert acrlpd_learning.beside_ript([], kinds) is None
    assert acrlpd_learning.beside_ript([full(0, 0.9, 1.0)], {}) is None


def test_curves_are_means_over_seeds_after_each_part_with_ript_beside_them():
    def full(seed, first, last):
        training = {"seed": seed, "num_train_steps": 4, "offline_iterations": 2, "rollouts": 200}
        rates = {"critics, best of 8": first, "best of 8": last}
        return {
            "config": {"training": training, "data": {"rollouts": 400}},
            "before": {"success_rate": 0.5},
            "scores": {name: {"success_rate": rate} for name, rate in rates.items()},
            "minutes": dict(zip(rates, (4.0 + seed, 10.0 + seed), strict=True)),
        }

    history = [{"rollouts": 192, "phases": {"inference": 60.0, "update": 30.0}}] * 2
    ript = {"history": history, "before": {"success_rate": 0.5}, "after": {"success_rate": 0.75}}
    runs = {"full": [full(0, 0.5, 0.75), full(2, 0.75, 1.0)]}
    assert acrlpd_learning.curves(runs, {"short": [ript]}) == {
        "ACRLPD, best of N": [(0, 0, 50), (5, 400, 62.5), (11, 800, 87.5)],
        "RIPT, one sample": [(0, 0, 50), (3, 384, 75)],
    }
