"""Episodes whose simulation broke: no rate counts them, what is printed names them, and too many are an error."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest

from pi0.base.paths import REPO_ROOT
from pi0.base.stats import wilson_interval
from pi0.libero.evaluation import (
    BrokenSimulationsError,
    EvaluationResult,
    describe_broken,
    paired_outcomes,
    refuse_broken,
)
from pi0.report.html_report import write_html_report
from pi0.ript.metrics import METRICS
from pi0.ript.results import check_machine, write_report
from pi0.ript.rollout_generator import Collection, merge_metrics
from pi0.training.metrics import append_line
from tests.support.episodes import make_episode
from tests.support.programs import children_of
from tests.support.stage_13_runs import SCRIPT

LOST = "gave up after 3 workers were lost"
SOLVED, FAILED = True, False


def scored(*outcomes: bool | str) -> EvaluationResult:
    """An evaluation of one task; a string is what broke the episode."""
    episodes = []
    for index, outcome in enumerate(outcomes):
        episode = make_episode(outcome is True, [10], seed=index, index=index).outline()
        episodes.append(replace(episode, failure=outcome if isinstance(outcome, str) else None))
    return EvaluationResult(episodes, {"suite": "libero_spatial"})


@pytest.mark.tried(
    "Some episodes of an evaluation break", "They are in no rate, no interval and no paired comparison"
)
def test_no_rate_and_no_interval_counts_them():
    result = scored(SOLVED, LOST, FAILED, "diverged", SOLVED)
    score = result.score()
    assert (score["successes"], score["episodes"], score["success_rate"]) == (2, 3, 2 / 3)
    assert score["interval_95"] == list(wilson_interval(2, 3))
    assert score["tasks"]["pick_up_the_bowl"]["episodes"] == 3
    assert score["broken"] == [LOST, "diverged"]
    assert [outcome["success"] for outcome in score["outcomes"]] == [True, None, False, None, True]


def test_an_evaluation_that_broke_altogether_has_no_rate():
    score = scored(LOST, LOST).score()
    assert (score["successes"], score["episodes"], score["success_rate"]) == (0, 0, None)
    assert score["tasks"]["pick_up_the_bowl"]["success_rate"] is None


def test_they_are_named_with_the_most_frequent_cause():
    words = "3 of 5 broken and not counted; most frequent cause (2 times): diverged"
    assert describe_broken(["diverged", LOST, "diverged"], 5) == words
    assert str(scored(SOLVED, LOST)).endswith(
        f"; 1 of 2 broken and not counted; most frequent cause (1 times): {LOST}"
    )
    assert "broken" not in str(scored(SOLVED, FAILED))


@pytest.mark.tried("More than a tenth of the episodes break", "Exit status 3 after the results are written")
def test_more_than_a_tenth_is_an_error_with_a_status_of_its_own():
    refuse_broken("evaluation", [], 0)
    refuse_broken("evaluation", [LOST], 10)
    with pytest.raises(
        BrokenSimulationsError, match="^evaluation: 2 of 10 broken.*repair the machine"
    ) as error:
        refuse_broken("evaluation", [LOST] * 2, 10)
    assert error.value.status == 3


def test_episodes_are_paired_that_ran_to_their_end_in_both():
    before = scored(SOLVED, LOST, FAILED, FAILED)
    after = scored(SOLVED, SOLVED, SOLVED, "diverged")
    assert paired_outcomes(before, after) == ([True, False], [True, True])


def rows(broken: int, ran: int) -> list[dict]:
    failures = [f"libero_spatial task 3 state {index}: diverged" for index in range(broken)]
    return [{"step": 0, "rollouts": ran, "successes": 1, "tasks": {}, "failed_rollouts": failures}]


def test_table_results_and_page_of_a_run_leave_them_out(tmp_path, capsys):
    before, after = scored(*[FAILED] * 9, LOST), scored(*[SOLVED] * 5, *[FAILED] * 5)
    METRICS.write(tmp_path)
    (tmp_path / "config.yaml").write_text("{}")
    append_line(tmp_path / "metrics.jsonl", rows(0, 8)[0])
    write_report(tmp_path, {}, before, after, rows(0, 8), seconds=1.0)
    printed = capsys.readouterr().out
    assert "0/9 (0.0%" in printed and "5/10 (50.0%" in printed
    assert f"before: 1 of 10 broken and not counted; most frequent cause (1 times): {LOST}" in printed
    change = json.loads((tmp_path / "results.json").read_text())["change"]
    assert (change["n"], change["difference"]) == (9, pytest.approx(5 / 9))
    page = write_html_report(tmp_path).read_text()
    assert "5 gained and 0 lost of 9" in page
    assert f"evaluation, before: {LOST}" in page


def test_a_run_without_a_pair_has_results_and_no_change(tmp_path, capsys):
    METRICS.write(tmp_path)
    (tmp_path / "config.yaml").write_text("{}")
    write_report(tmp_path, {}, scored(SOLVED, LOST), scored(LOST, SOLVED), rows(0, 8), seconds=1.0)
    assert "change: not known, no episode ran to its end both before and after" in capsys.readouterr().out
    assert json.loads((tmp_path / "results.json").read_text())["change"] is None
    assert "1/1 (100.0%" in write_html_report(tmp_path).read_text()


def test_a_run_ends_with_an_error_if_much_of_what_it_stands_on_broke():
    sound, weak = scored(*[SOLVED] * 10), scored(*[SOLVED] * 8, LOST, LOST)
    check_machine(sound, sound, rows(broken=1, ran=9))
    with pytest.raises(BrokenSimulationsError, match="^score before: 2 of 10"):
        check_machine(weak, sound, [])
    with pytest.raises(BrokenSimulationsError, match="^score after: 2 of 10"):
        check_machine(sound, weak, [])
    with pytest.raises(BrokenSimulationsError, match="^rollouts: 2 of 10 .* cause .2 times.: diverged"):
        check_machine(sound, sound, rows(broken=2, ran=8))


@pytest.mark.tried(
    "All rollouts of an iteration break", "The run ends with status 3 and learns nothing from them"
)
def test_an_iteration_whose_groups_all_broke_ends_the_run():
    sound = {**Collection().metrics(), "rollouts": 8, "groups": 1}
    broken = {**Collection().metrics(), "failed_rollouts": ["libero_spatial task 3 state 0: diverged"] * 3}
    merge_metrics([sound, broken])  # another rank has collected some
    with pytest.raises(BrokenSimulationsError, match="^rollouts: 6 of 6 broken.*diverged"):
        merge_metrics([broken, broken])


# Rollouts begin with so much standing still that no machine is fast enough to finish one between two kills.
EVALUATION = [
    "-m", "pi0.evaluate", "--settle_steps", "20000", "--policy_path", "checkpoints/pi0_tiny_libero_spatial", "--tasks", "3", "--episodes", "2",
    "--assets", "standins", "--workers", "1", "--output",
]  # fmt: skip
TRAINING = [
    SCRIPT, "--config_path", "configs/minimal_test.yaml", "--override", "evaluation.episodes=2", "task.assets=standins",
    "task.num_parallel_envs=1", "task.settle_steps=20000",
]  # fmt: skip


@pytest.mark.runs
@pytest.mark.parametrize(
    "command, age_s",
    [
        pytest.param(EVALUATION, 0.0, id="evaluation"),
        pytest.param(EVALUATION, 1.5, id="evaluation, later", marks=pytest.mark.soak),
        pytest.param(TRAINING, 0.0, id="training", marks=pytest.mark.soak),
        pytest.param(TRAINING, 1.5, id="training, later"),
    ],
)
@pytest.mark.tried(
    "A worker is killed every second and a half, or at once, in evaluation and in training",
    '"N of M broken and not counted" with the most frequent cause; exit status 3; stage 13 leaves a checkpoint',
)
def test_a_command_whose_workers_are_killed_again_and_again_has_no_score(tmp_path, command, age_s):
    place = [f"output_dir={tmp_path}"] if command is TRAINING else [str(tmp_path)]
    process = subprocess.Popen(
        [sys.executable, *command, *place],
        cwd=REPO_ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    ended = threading.Event()

    def kill_those_of_some_age() -> None:
        born: dict[int, float] = {}
        while not ended.wait(0.05):
            try:
                children = children_of(process.pid)
            except FileNotFoundError:  # it has just ended
                return
            for child, arguments in children.items():
                if (
                    "pi0.workers" in arguments
                    and time.monotonic() > born.setdefault(child, time.monotonic()) + age_s
                ):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(child, signal.SIGKILL)

    killer = threading.Thread(target=kill_those_of_some_age)
    killer.start()
    try:
        output, errors = process.communicate(timeout=200)
    finally:
        ended.set()
        killer.join()
    assert process.returncode == 3, errors[-3000:]
    assert "Traceback" not in errors
    assert re.search(r"^error: .*(SIGKILL|workers were lost)", errors, re.MULTILINE)
    assert "0/2" not in output
    assert (
        not list(tmp_path.rglob("results.json"))
        or '"success_rate": null' in (tmp_path / "results.json").read_text()
    )
