"""Metrics: what is declared decides how ranks merge them, what they are called elsewhere, and what the docs say."""

import re

import numpy as np
import pytest

from pi0.base.paths import REPO_ROOT
from pi0.report.declaration import FILE, Curve, Declaration, Metric, Plot, distribution
from pi0.report.record import read_run
from pi0.ript.metrics import METRICS


def test_the_documentation_lists_every_metric_with_its_unit_and_meaning_and_no_other():
    document = (REPO_ROOT / "docs" / "metrics.md").read_text()
    rows = re.findall(r"^\| `(.+?)` \| (.+?) \| (.+?) \|$", document, re.MULTILINE)
    assert rows == [(metric.name, metric.unit, metric.meaning) for metric in METRICS.metrics]
    assert document.count("\n| ") == len(rows) + 1, "its head and nothing else"


def test_a_run_keeps_its_declaration_and_reads_it_back_as_it_was(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    for declared in (Declaration((), (Metric("a", "", ""),), "steps"), METRICS):
        declared.write(tmp_path)
        assert read_run(tmp_path).declaration == declared
    written = (tmp_path / FILE).stat()
    METRICS.write(tmp_path)
    assert (tmp_path / FILE).stat().st_ino == written.st_ino, "what has not changed is not written"


def test_each_metric_merges_as_it_is_declared():
    declared = Declaration(
        (),
        (
            Metric("first", "", ""),
            Metric("sum", "", "", "sum"),
            Metric("lines", "", "", "sum"),
            Metric("max", "", "", "max"),
            Metric("tasks", "", "", "by task"),
            Metric("scores", "", "", "distribution"),
            Metric("times/act", "", "", "max"),
            Metric("times/wait", "", "", "max-er"),
            Metric("max-er", "", "", "max"),
        ),
    )
    parts = [
        {
            "first": 1, "sum": 2, "lines": ["a"], "max": 3.0, "tasks": {"b": [1, 2]}, "scores": distribution([1.0, 3.0]),
            "times": {"act": 5.0, "wait": 1.0}, "max-er": 7.0,
        },
        {
            "first": 9, "sum": 3, "lines": ["c"], "max": 1.0, "tasks": {"a": [0, 1], "b": [1, 1]},
            "scores": distribution([]), "times": {"act": 6.0, "wait": 2.0}, "max-er": 6.0,
        },
    ]  # fmt: skip
    assert declared.merge(parts) == {
        "first": 1, "sum": 5, "lines": ["a", "c"], "max": 3.0, "tasks": {"a": [0, 1], "b": [2, 3]},
        "scores": distribution([1.0, 3.0]), "times": {"act": 6.0, "wait": 1.0}, "max-er": 7.0,
    }  # fmt: skip


def test_a_merged_distribution_is_that_of_all_values():
    random = np.random.default_rng(0)
    for _ in range(100):
        values = [random.normal(size=random.integers(4)).tolist() for _ in range(3)]
        merged = METRICS.merge([{"advantages": distribution(part)} for part in values])
        assert merged["advantages"] == pytest.approx(distribution([*values[0], *values[1], *values[2]]))


def test_metrics_keep_both_counts_of_every_rate():
    flat = METRICS.flatten(
        {"step": 3, "tasks": {"a": [1, 4]}, "rollouts": 4, "successes": 1, "lost_workers": ["x"]}
    )
    assert flat == {
        "step": 3, "successes/a": 1, "rollouts/a": 4, "success_rate/a": 0.25, "rollouts": 4, "successes": 1,
        "success_rate": 0.25, "lost_workers": 1,
    }  # fmt: skip
    assert METRICS.flatten({"tasks": {"a": [0, 0]}, "rollouts": 0, "successes": 0}).keys() == {
        "successes/a", "rollouts/a", "rollouts", "successes",
    }  # fmt: skip
    assert METRICS.flatten({"dropped_by_task": {"a": [3, 7]}, "skipped_by_task": {"a": [12]}}) == {
        "dropped_by_task/a/solved": 3, "dropped_by_task/a/failed": 7, "skipped_by_task/a": 12,
    }  # fmt: skip
    assert METRICS.flatten({"memory": {"gpu_mb": None, "other_ranks": {"1": {"rss_mb": 2.5}}}}) == {
        "memory/other_ranks/1/rss_mb": 2.5
    }


def test_what_nobody_declared_does_not_merge_and_is_not_lost():
    row = {"step": 1, "phases": {"render": 1.0, "nap": 2.0}, "mood": 0.5}
    assert METRICS.undeclared(row) == ["phases/nap", "mood"]
    with pytest.raises(ValueError, match="not declared.*: phases/nap, mood"):
        METRICS.merge([row])
    assert METRICS.flatten(row) == {"step": 1, "phases/render": 1.0, "phases/nap": 2.0, "mood": 0.5}


@pytest.mark.parametrize(
    ("metrics", "problem"),
    [
        ([Metric("a", "", ""), Metric("a", "", "")], "a is declared twice"),
        ([Metric("a", "", "", "median")], "merged by median"),
        ([Metric("a", "", "", curves=(Curve("else", "a"),))], "a is shown in a plot that is not declared"),
    ],
)
def test_a_declaration_that_contradicts_itself_is_refused(metrics, problem):
    with pytest.raises(ValueError, match=problem):
        Declaration((Plot("plot", "Plot"),), tuple(metrics))
