"""How threads wait for each other: spinning alone, asleep beside a neighbour, with the same numbers; or as the user says."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from pi0.base.paths import REPO_ROOT
from pi0.model import cpu_waiting
from pi0.model.cpu_waiting import CROWDED, CoreWaits, CoreWatch
from tests.support.ranks import torchrun
from tests.support.stage_13_runs import finish

CORES = len(os.sched_getaffinity(0))
several_cores = pytest.mark.skipif(CORES < 2, reason="threads of one core never spin")


@pytest.fixture
def openmp():
    return cpu_waiting._libgomp()


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


def settled(number: int) -> bool:
    """Whether there are so many threads before long; one that has ended is still listed for a moment."""
    limit = time.monotonic() + 10
    while threads() != number and time.monotonic() < limit:
        time.sleep(0.01)
    return threads() == number


# The decision ---------------------------------------------------------------------------------------------


def test_more_threads_than_cores_are_kept_while_one_waits_for_a_core(openmp):
    watch, before = CoreWatch(openmp), threads()
    for share, crowded in ((0.0, False), (CROWDED + 0.01, True), (1.0, True), (CROWDED, False), (0.9, True)):
        watch.look(share)
        assert watch.crowded == crowded
        assert settled(before + crowded * (openmp.omp_get_num_procs() + 1))
    watch.look(0.0)
    assert settled(before)


def test_the_share_is_that_of_the_thread_that_waited_longest_since_the_last_look(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(cpu_waiting, "TASKS", tmp_path)
    monkeypatch.setattr(cpu_waiting.time, "monotonic", lambda: now[0])

    def write(**waited_s: float) -> None:
        for task, seconds in waited_s.items():
            (tmp_path / task).mkdir(exist_ok=True)
            (tmp_path / task / "schedstat").write_text(f"123 {round(seconds * 1e9)} 45\n")

    write(one=5.0, two=7.0)
    waits = CoreWaits()
    write(one=5.1, two=7.5)
    now[0] += 2.0
    assert waits.share() == pytest.approx(0.25)
    write(one=5.2, three=0.3)  # two waits no more, three is new
    now[0] += 1.0
    assert waits.share() == pytest.approx(0.3)
    (tmp_path / "one" / "schedstat").unlink()  # ends between the list and the look
    now[0] += 1.0
    assert waits.share() == 0.0


def test_this_kernel_counts_waiting():
    assert CoreWaits._read().keys() == set(os.listdir("/proc/self/task"))


@pytest.fixture
def two_threads(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(cpu_waiting, "_watch", None)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("name, value", [("OMP_WAIT_POLICY", "ACTIVE"), ("GOMP_SPINCOUNT", "300000")])
def test_a_user_who_has_set_how_threads_wait_decides(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    assert cpu_waiting.watch_cores() is None


@pytest.mark.usefixtures("two_threads")
def test_one_thread_waits_for_no_other(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert cpu_waiting.watch_cores() is None


@pytest.mark.usefixtures("two_threads")
def test_another_openmp_runtime_is_left_alone(monkeypatch, tmp_path):
    monkeypatch.setattr(torch, "__file__", str(tmp_path / "__init__.py"))  # as on other systems
    assert cpu_waiting.watch_cores() is None


# The effect -----------------------------------------------------------------------------------------------


def on_two_threads(what: str) -> dict:
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.waiting_threads", what],
        cwd=REPO_ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=120,
    )
    return json.loads(done.stdout)


@several_cores
@pytest.mark.runs
@pytest.mark.usefixtures("fresh_python")
def test_threads_beside_a_sleeping_team_use_no_processor_time_to_wait_and_compute_the_same():
    seen = on_two_threads("rest")
    for spinning in (seen["spinning"], seen["spinning_again"]):
        assert spinning > 3 * seen["sleeping"], seen
    assert len(seen["gradients"]) > 50
    assert seen["gradients"] == seen["gradients_asleep"]


@several_cores
@pytest.mark.runs
@pytest.mark.usefixtures("fresh_python")
@pytest.mark.tried(
    "Another process is busy on all cores",
    "Threads of an operation sleep instead of spinning; the same numbers, and the times of docs/performance.md",
)
def test_busy_processes_on_all_cores_are_noticed():
    seen = on_two_threads("neighbours")
    assert seen["crowded"], seen


# Every command --------------------------------------------------------------------------------------------

WRAPPER = "tests/support/two_threads.py"
ACT = (
    "-m pi0.evaluate --policy_path checkpoints/pi0_tiny_libero_spatial --tasks 3 --episodes 1 --workers 1"
    " --assets standins --max_episode_length 2 --settle_steps 0 --output {out}"
)
CLONE = (
    "-m pi0.warmstart --tasks 3 --max-minutes 0 --score-every 1 --score-episodes 1 --batch-size 4 --workers 1"
    " --demonstrations 1 --frame-every 9 --output {out}"
)
TRAIN = (
    "13_train_production_ready.py --config_path configs/minimal_test.yaml --override training.num_train_steps=1"
    " task.task_names_to_use=[3] task.max_episode_length=2 task.settle_steps=0 task.num_parallel_envs=1"
    " algo.rloo_batch_size=2 algo.data_batch_size=2 algo.train_init_states=4 algo.max_sampling_attempts=1"
    " evaluation.episodes=1 evaluation.periodic_episodes=0 features.save_video=false logging.use_wandb=false"
    " output_dir={out} algo.rollout_stats_path={out}/stats.json"
)


def finished(process: subprocess.Popen) -> list[str]:
    """What its processes said of the watch."""
    return [line for line in finish(process).splitlines() if line.startswith("cores are ")]


def run(command: str, out: Path, **variables: str) -> list[str]:
    process = subprocess.Popen(
        [sys.executable, WRAPPER, *command.format(out=out).split()],
        cwd=REPO_ROOT,
        env={**os.environ, "PYTHONPATH": str(REPO_ROOT), **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return finished(process)


@pytest.mark.runs
@pytest.mark.parametrize("command", [ACT, CLONE], ids=["acting", "cloning"])
def test_a_command_that_computes_watches_the_cores(command, tmp_path):
    assert run(command, tmp_path) == ["cores are watched"]


@pytest.mark.runs
def test_so_does_every_rank_of_a_training_that_has_several_threads(tmp_path):
    ranks = torchrun(2, WRAPPER, *TRAIN.format(out=tmp_path).split())
    assert finished(ranks) == 2 * ["cores are watched"]


@pytest.mark.runs
def test_no_command_does_against_the_user(tmp_path):
    assert run(ACT, tmp_path, OMP_WAIT_POLICY="ACTIVE") == ["cores are not watched"]
