"""The memory of what is solved: what is skipped, what is written, and who may write at the same time."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from pi0.base.paths import REPO_ROOT
from pi0.ript.rollout_stats import RolloutStats, StatsError


def test_a_state_solved_on_each_of_its_last_visits_is_skipped_once_and_then_visited_again():
    stats = RolloutStats(None, skip_threshold=2)
    stats.record("a", 4, 4)
    assert not stats.skip("a")
    stats.record("a", 4, 4)
    assert stats.skip("a")
    assert not stats.skip("a")
    stats.record("a", 4, 4)
    assert not stats.skip("a"), "solved once since it was skipped"
    stats.record("a", 4, 4)
    assert stats.skip("a")


def test_one_failed_rollout_makes_a_state_worth_visiting():
    stats = RolloutStats(None, skip_threshold=2)
    for successes in (4, 4, 3):
        stats.record("a", successes, 4)
    assert not stats.skip("a")
    assert not stats.skip("never visited")


def test_the_file_grows_from_run_to_run_and_is_remembered(tmp_path):
    file = tmp_path / "deep" / "rollout_stats.json"
    for _ in range(2):
        stats = RolloutStats(file, skip_threshold=2)
        stats.record("libero_spatial/3/ab", 2, 2)
        stats.save()
        stats.save()  # nothing new: nothing is written twice
    assert json.loads(file.read_text())["states"] == {"libero_spatial/3/ab": [[2, 2], [2, 2]]}
    assert RolloutStats(file, skip_threshold=2).skip("libero_spatial/3/ab")


WRITER = """
import sys
from pi0.ript.rollout_stats import RolloutStats
stats = RolloutStats(sys.argv[1], 2)
for number in range(int(sys.argv[3])):
    stats.record(f"shared/{number % 7}", 1, 2)
    stats.record(f"own of {sys.argv[2]}", 2, 2)
    stats.save()
    print(number + 1, flush=True)
"""


def writer(file, name: str, count: int) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(file), name, str(count)],
        cwd=REPO_ROOT, env={**os.environ, "PYTHONPATH": str(REPO_ROOT)}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.runs
def test_processes_that_share_a_file_lose_no_visit(tmp_path):
    file = tmp_path / "stats.json"
    writers = [writer(file, name, 40) for name in "abc"]
    for process in writers:
        assert process.wait(120) == 0
    states = json.loads(file.read_text())["states"]
    assert [len(states[f"own of {name}"]) for name in "abc"] == [40, 40, 40]
    assert sum(len(states[f"shared/{number}"]) for number in range(7)) == 120


@pytest.mark.runs
def test_a_killed_writer_leaves_a_whole_file_and_holds_nobody_up(tmp_path):
    file = tmp_path / "stats.json"
    victim = writer(file, "victim", 100_000)
    reported = [victim.stdout.readline() for _ in range(5)][-1]
    time.sleep(0.013)
    victim.send_signal(signal.SIGKILL)
    reported = int((victim.communicate()[0].split() or [reported])[-1])
    before = len(json.loads(file.read_text())["states"]["own of victim"])
    assert before >= reported
    assert writer(file, "next", 3).wait(60) == 0
    states = json.loads(file.read_text())["states"]
    assert len(states["own of next"]) == 3
    assert len(states["own of victim"]) == before


@pytest.mark.parametrize("content", ["{", "[]", '{"format": 99, "states": {}}', '{"format": 1}'])
def test_a_file_of_another_kind_is_named_and_left_alone(tmp_path, content):
    file = tmp_path / "stats.json"
    file.write_text(content)
    with pytest.raises(StatsError, match=r"stats\.json .*rollout_stats_path"):
        RolloutStats(file, 2)
    assert file.read_text() == content


def test_what_cannot_be_written_is_kept_for_the_next_time(tmp_path):
    folder = tmp_path / "folder"
    folder.write_text("a file where the folder should be")
    stats = RolloutStats(folder / "stats.json", 2)
    stats.record("a", 1, 1)
    with pytest.raises(StatsError, match="cannot write"):
        stats.save()
    folder.unlink()
    stats.save()
    assert json.loads((folder / "stats.json").read_text())["states"] == {"a": [[1, 1]]}


def test_a_checkpoint_brings_back_what_is_skipped():
    stats = RolloutStats(None, skip_threshold=2)
    stats.record("a", 1, 1)
    stats.record("a", 1, 1)
    again = RolloutStats(None, skip_threshold=2)
    again.load_state_dict(json.loads(json.dumps(stats.state_dict())))
    assert again.skip("a")


def test_what_is_done_again_after_a_kill_is_counted_once(tmp_path):
    file = tmp_path / "stats.json"
    stats = RolloutStats(file, skip_threshold=2)
    stats.record("a", 1, 2)
    stats.save()
    stats.record("b", 2, 2)
    checkpoint = json.loads(json.dumps(stats.state_dict()))
    for name in "bc":  # visits after the checkpoint, which is made with one unwritten
        stats.record(name, 0, 2)
        stats.save()
    again = RolloutStats(file, skip_threshold=2)
    again.load_state_dict(checkpoint)
    again.save()
    for name in "bca":
        again.record(name, 0, 2)
        again.save()
    expected = {"a": [[1, 2], [0, 2]], "b": [[2, 2], [0, 2]], "c": [[0, 2]]}
    assert json.loads(file.read_text())["states"] == expected
    assert again.history == expected


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 3)])
def test_another_number_of_ranks_counts_all_their_visits(tmp_path, before, after):
    file = tmp_path / "stats.json"
    states = []
    for rank in range(before):
        stats = RolloutStats(file, skip_threshold=2)
        stats.record(f"of {rank}", 1, 2)
        stats.save()
        states.append(stats.state_dict())
    expected = {f"of {rank}": [[1, 2]] for rank in range(before)}
    states = json.loads(json.dumps(states))
    for rank in range(after):
        stats = RolloutStats(file, skip_threshold=2)
        stats.join_state_dicts(json.loads(json.dumps(states)))
        assert stats.history == {f"of {rank}": [[1, 2]] for rank in range(before)}
        for name in ("of 0", f"new of {rank}"):
            stats.record(name, 2, 2)
            expected.setdefault(name, []).append([2, 2])
        stats.save()
    assert json.loads(file.read_text())["states"] == expected
