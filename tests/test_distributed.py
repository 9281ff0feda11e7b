"""Stage 10: the spec's own numbers, one gradient from many ranks, ranks without anything, ranks that die."""

import contextlib
import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from safetensors.torch import load_file

from pi0 import PI0Policy
from pi0.base.paths import REPO_ROOT
from pi0.libero.environments import Environments
from pi0.libero.settings import TaskConfig
from pi0.libero.stepping import state_hash
from pi0.libero.suites import suite_tasks
from pi0.model.config import Pi0Config
from pi0.policy.acting import ActingPolicy
from pi0.ript.config import load_config
from pi0.ript.env_runner import LIBEROEnvRunner
from pi0.ript.rollout_generator import merge_metrics
from tests.support.episodes import states_of
from tests.support.ranks import error_line, free_port, torchrun, two_hosts
from tests.support.short_practice import shortened
from tests.support.stage_13_runs import finish, ranks_of

SCRIPT = "10_train_with_distributed.py"
CHECKPOINT = REPO_ROOT / "checkpoints" / "pi0_tiny_libero_spatial"
TASKS = suite_tasks("libero_spatial")
SHORT = str(REPO_ROOT / "tests" / "support" / "short_practice.py")
SMALL = [
    f"policy_path={CHECKPOINT}", "task.assets=standins", "algo.rloo_batch_size=4", "algo.data_batch_size=8",
    "algo.train_init_states=8", "algo.num_epochs=1", "algo.minibatch_size=6", "training.num_train_steps=2",
    "evaluation.episodes=4", "features.save_video=false", "task.num_parallel_envs=1",
]  # fmt: skip


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("stage_10", REPO_ROOT / SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


stage = load_script()


def train(processes: int, output_dir: Path, tasks: list[int], *overrides: str) -> tuple[str, Path]:
    """A run of stage 10 with short episodes: what it printed, and its folder."""
    config = "configs/multi_task_distributed.yaml"
    settings = [*SMALL, f"output_dir={output_dir}", f"task.task_names_to_use={tasks}", *overrides]
    output = finish(torchrun(processes, SHORT, SCRIPT, "--config_path", config, "--override", *settings))
    (run_dir,) = output_dir.glob("multi_task_distributed-*")
    return output, run_dir


# The spec's numbers ------------------------------------------------------------------------------------


def test_nine_tasks_are_given_to_two_ranks_in_turns():
    given = [[task.index for task in stage.get_distributed_tasks(TASKS[:9], rank, 2)] for rank in (0, 1)]
    assert given == [[0, 2, 4, 6, 8], [1, 3, 5, 7]]


def test_one_task_on_two_ranks_leaves_the_second_without():
    given = [[task.index for task in stage.get_distributed_tasks([TASKS[9]], rank, 2)] for rank in (0, 1)]
    assert given == [[9], []]


@pytest.fixture
def runner():
    task = TaskConfig(task_names_to_use=list(range(9)), image_size=32, assets="standins")
    with LIBEROEnvRunner(task, Pi0Config.preset("pi0_tiny", cameras=("base_0_rgb",))) as runner:
        yield runner


@pytest.mark.runs
def test_six_iterations_take_the_tasks_of_each_rank_in_turns(runner):
    turns = []
    for rank in (0, 1):
        runner.assigned_tasks = stage.get_distributed_tasks(runner.tasks, rank, 2)
        runner.task_cursor = 0
        for _ in range(6):
            turns.append(runner.set_current_task_by_cursor().index)
            runner.advance_task_cursor()
    assert turns == [0, 2, 4, 6, 8, 0, 1, 3, 5, 7, 1, 3]


@pytest.fixture
def dataset(runner):
    runner.assigned_tasks = stage.get_distributed_tasks(runner.tasks, 1, 2)
    pools = [states_of(task, 10) for task in runner.assigned_tasks]
    runner.set_current_task_by_cursor()
    return stage.DistributedInitialStateDataset(pools, 4, runner)


@pytest.mark.runs
def test_ten_states_taken_four_at_a_time_go_round_in_a_ring(dataset):
    ring = dataset.rings[0]
    taken = [[index for _, index in ring.sample_batch_circular(4)] for _ in range(3)]
    assert taken == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 0, 1]]
    assert ring.init_state_cursor == 12


@pytest.mark.runs
def test_no_two_environments_start_alike(dataset):
    states = dataset.rings[0].get_states_for_envs(2, 4)
    assert [index for _, index in states] == list(range(8))


@pytest.mark.runs
def test_every_task_has_a_ring_of_its_own(dataset, runner):
    dataset.smart_sample_group()
    runner.advance_task_cursor()
    task = runner.set_current_task_by_cursor()
    assert [(pool.task, index) for pool, index in dataset.smart_sample_group()] == [
        (task, n) for n in range(4)
    ]


@pytest.mark.runs
def test_smart_sampling_names_states_and_passes_over_solved_ones_for_one_round(dataset):
    for _ in range(2):
        dataset.streaks.record((dataset.pools[0].task, 1), solved=True)
    sampled = dataset.smart_sample_init_state()
    assert [index for (_, index), _ in sampled] == [0, 2, 3, 4]
    assert [name for _, name in sampled] == [
        state_hash(pool.states[index].state) for (pool, index), _ in sampled
    ]
    assert dataset.take_skipped() == 1
    assert dataset.take_skipped() == 0
    dataset.rings[0].init_state_cursor = 0
    assert [index for (_, index), _ in dataset.smart_sample_init_state()] == [0, 1, 2, 3]


# One gradient ------------------------------------------------------------------------------------------


@pytest.mark.runs
@pytest.mark.parametrize(
    ("mode", "episodes"),
    [
        ("weighted", "5"),
        ("weighted", "5,2"),
        ("weighted", "0,4"),
        ("weighted", "2,0,7"),
        ("guidance", "3,1"),
        ("ratio", "0,4"),
    ],
)
def test_ranks_together_have_the_gradient_of_one_process_over_all_episodes(mode, episodes):
    ranks = len(episodes.split(","))
    output = finish(torchrun(ranks, "tests/support/rank_gradient.py", str(CHECKPOINT), mode, episodes))
    worst, size = map(float, re.search(r"worst difference (\S+) of gradients up to (\S+)", output).groups())
    assert size > 1e-2
    assert worst <= 1e-6 * size  # float32: summing three ranks in another order moves the last bits


# Whole runs --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def three_ranks(tmp_path_factory):
    """A run of two tasks on three ranks."""
    return train(3, tmp_path_factory.mktemp("three"), [3, 8], "evaluation.episodes=6")


@pytest.mark.runs
def test_a_rank_without_tasks_learns_what_the_other_collected(three_ranks):
    output, run_dir = three_ranks
    assert "tasks of the ranks: [3, 8, None]" in output
    assert "rank 1: 1 tasks, 8 trajectories" in output
    assert "rank 2: 0 tasks, 0 trajectories" in output
    results = json.loads((run_dir / "results.json").read_text())
    assert [row["rollouts"] for row in results["history"]] == [16, 16]
    assert all(row["updates"] for row in results["history"])
    assert results["after"]["episodes"] == 6


@pytest.mark.runs
@pytest.mark.parametrize("script", [SCRIPT, "11_train_with_logging.py"])
def test_ranks_learn_one_policy_with_noise_of_their_own_and_one_of_them_writes(tmp_path, script):
    settings = [
        *SMALL, f"output_dir={tmp_path / 'runs'}", "task.task_names_to_use=[3,8]", "evaluation.episodes=2",
        "algo.gradient_accumulation_steps=2", "training.num_train_steps=1", "features.save_video=true",
    ]  # fmt: skip
    arguments = ["--config_path", "configs/multi_task_distributed.yaml", "--override", *settings]
    finish(torchrun(2, SHORT, "tests/support/rank_stage.py", str(tmp_path), script, *arguments))
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    (first,), (second,) = (rank["updates"] for rank in ranks)
    assert first["weights"] == second["weights"]
    assert ranks[0]["seed"] != ranks[1]["seed"]
    assert first["met"] == second["met"]
    assert sum(first["met"]) == first["reported"]["updates"] < len(first["met"])
    shares = [np.mean(update["losses"]) for update in (first, second)]
    assert first["reported"]["loss"] == second["reported"]["loss"] == pytest.approx(np.mean(shares))
    assert shares[0] != pytest.approx(shares[1])
    assert [rank["wrote"] for rank in ranks] == [["write_report", "film_before_after"], []]
    assert [rank["has left"] for rank in ranks] == [True, True]


@pytest.mark.runs
def test_three_ranks_collect_exactly_and_end_together_with_fewer_tasks(three_ranks):
    output, run_dir = three_ranks
    collected = re.findall(r"rank (\d): (\d+) tasks, (\d+) trajectories", output)
    assert collected == 2 * [("0", "1", "8"), ("1", "1", "8"), ("2", "0", "0")]
    assert load_file(run_dir / "policy" / "model.safetensors")


@pytest.mark.runs
def test_scores_do_not_depend_on_the_number_of_ranks(three_ranks, monkeypatch):
    _, run_dir = three_ranks
    outcomes = json.loads((run_dir / "results.json").read_text())["before"]["outcomes"]
    config = load_config(run_dir / "config.yaml")
    policy = PI0Policy.from_pretrained(CHECKPOINT)
    monkeypatch.setattr(Environments, "run_policy", shortened())
    with LIBEROEnvRunner(config.task, policy.config) as runner:
        alone = runner.run(ActingPolicy(policy), 6, config.evaluation.seed).score()["outcomes"]
    assert alone == outcomes
    assert {outcome["success"] for outcome in outcomes} == {True, False}


@pytest.mark.runs
def test_a_rank_takes_its_tasks_in_turns_and_counts_are_those_of_all_ranks(tmp_path):
    short = ("algo.data_batch_size=4", "algo.train_init_states=4", "evaluation.episodes=1")
    output, run_dir = train(2, tmp_path, [3, 8, 0], *short)
    assert re.findall(r"^tasks of the ranks: (.*)$", output, re.MULTILINE) == ["[3, 8]", "[0, 8]"]
    assert output.count("rank 1: 1 tasks, 4 trajectories") == 2
    history = json.loads((run_dir / "results.json").read_text())["history"]
    assert [sum(count for _, count in row["tasks"].values()) for row in history] == [8, 8]


def test_metrics_of_several_ranks_become_one():
    parts = [
        {
            "tasks": {"a": [1, 4]}, "rollouts": 4, "groups": 1, "dropped_groups": 1, "dropped_by_task": {"a": [1, 0]},
            "skipped_by_task": {"a": [2]}, "states": 2, "lost_workers": ["one"], "rollout_seconds": 5.0,
            "phases": {"physics": 4.0}, "advantages": distribution([1.0, -1.0, 0.0]),
        },
        {
            "tasks": {"a": [2, 4], "b": [0, 4]}, "rollouts": 8, "groups": 2, "dropped_groups": 0, "dropped_by_task": {},
            "skipped_by_task": {"b": [1]}, "states": 3, "lost_workers": [], "rollout_seconds": 9.0,
            "phases": {"physics": 8.0}, "advantages": distribution([0.5]),
        },
    ]  # fmt: skip
    merged = merge_metrics(parts)
    assert merged["tasks"] == {"a": [3, 8], "b": [0, 4]}
    assert (merged["rollouts"], merged["groups"], merged["lost_workers"]) == (12, 3, ["one"])
    assert merged["dropped_by_task"] == {"a": [1, 0]}
    assert merged["skipped_by_task"] == {"a": [2], "b": [1]}
    assert (merged["skipped_states"], merged["skipped_share"]) == (3, 3 / 8)
    assert merged["dropped_share"] == 1 / 4
    assert (merged["rollout_seconds"], merged["phases"]) == (9.0, {"physics": 8.0}), "of the slowest"
    assert merged["advantages"] == pytest.approx(distribution([1.0, -1.0, 0.0, 0.5]))


def distribution(values: list[float]) -> dict[str, float]:
    return {
        "count": len(values), "mean": np.mean(values), "std": np.std(values), "min": min(values), "max": max(values),
        "positive": np.mean(np.array(values) > 0),
    }  # fmt: skip


# Ranks that die ----------------------------------------------------------------------------------------


def wait_for_ranks(output_dir: Path, ranks: int) -> None:
    """Until all ranks practise."""
    limit = time.monotonic() + 120
    while time.monotonic() < limit:
        if len(ranks_of(output_dir)) == ranks and list(output_dir.glob("*/")):
            return
        time.sleep(0.2)
    raise AssertionError("the ranks never started")


def long_run(output_dir: Path, script: str = SCRIPT) -> list[str]:
    settings = [*SMALL, f"output_dir={output_dir}", "training.num_train_steps=50"]
    return [script, "--config_path", "configs/multi_task_distributed.yaml", "--override", *settings]


@pytest.mark.runs
@pytest.mark.parametrize("script", [SCRIPT, "13_train_production_ready.py"])
@pytest.mark.tried("A rank is killed", "The others end within a minute, with its number")
def test_a_killed_rank_ends_the_others_within_a_minute_with_a_line_that_names_it(tmp_path, script):
    run = torchrun(2, *long_run(tmp_path, script))
    wait_for_ranks(tmp_path, 2)
    victim = ranks_of(tmp_path)[1]
    os.kill(victim, signal.SIGKILL)
    killed = time.monotonic()
    output, _ = run.communicate(timeout=60)
    assert time.monotonic() - killed < 60
    assert run.returncode != 0
    line = error_line(output)
    assert f"rank 1 (process {victim} on" in line
    assert ranks_of(tmp_path) == {}


@pytest.mark.runs
def test_a_rank_that_is_silent_is_taken_for_dead():
    # As one behind a broken network, whose process nobody here can look at.
    process = torchrun(2, "tests/support/rank_silent.py", "4")
    silent = int(next(line for line in process.stdout if line.startswith("process ")).split()[1])
    end = threading.Timer(40.0, os.kill, (silent, signal.SIGKILL))  # if nobody notices
    end.start()
    line = next((line for line in process.stdout if line.startswith("error:")), "")
    end.cancel()
    os.kill(silent, signal.SIGKILL)
    process.communicate(timeout=60)
    assert re.fullmatch(
        rf"error: rank 1 \(process {silent} on .*\) has been silent for 4 s; rank 0 ends\n", line
    )
    assert process.returncode != 0


@pytest.mark.runs
@pytest.mark.usefixtures("fresh_python")
@pytest.mark.tried("All ranks refuse the same value", "The error is printed once")
def test_what_all_ranks_refuse_alike_is_said_once(tmp_path):
    settings = [*SMALL, f"output_dir={tmp_path}", "policy_path=/nowhere"]
    run = torchrun(2, SCRIPT, "--config_path", "configs/multi_task_distributed.yaml", "--override", *settings)
    output, _ = run.communicate(timeout=100)
    assert run.returncode != 0
    assert error_line(output) == "error: policy_path = '/nowhere': there is no such folder"


@pytest.mark.runs
@pytest.mark.parametrize(
    "given, said",
    [
        ({"RANK": "0"}, "policy_path = '/nowhere': there is no such folder"),  # a single process
        ({"RANK": "0", "WORLD_SIZE": "1"}, "policy_path = '/nowhere': there is no such folder"),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"},
            "WORLD_SIZE = 2 is set, and LOCAL_RANK, MASTER_PORT not: start the ranks with torchrun, "
            + "which sets them all, or unset WORLD_SIZE",
        ),
    ],
    ids=["rank", "rank of one", "rank of two"],
)
@pytest.mark.parametrize("script", [SCRIPT, "13_train_production_ready.py"])
@pytest.mark.tried("`RANK=0` without the rest of what torchrun sets", "A single process, or one clear line")
def test_a_part_of_what_torchrun_sets_is_a_single_process_or_refused(tmp_path, script, given, said):
    arguments = [
        "--config_path",
        "configs/multi_task_distributed.yaml",
        "--override",
        f"output_dir={tmp_path}",
    ]
    run = subprocess.run(
        [sys.executable, script, *arguments, "policy_path=/nowhere"],
        cwd=REPO_ROOT, env=os.environ | given, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (run.returncode, run.stderr) == (1, f"error: {said}\n")


SLOW_TO_PRINT = """
import builtins, time
from pi0.base.errors import InputError
from pi0.ranks.watch import exit_with, join_ranks
join_ranks()
say = print
def print_slowly(*words, **options):
    time.sleep(2.5)
    say(*words, **options)
builtins.print = print_slowly
exit_with(InputError("all refuse this"))
"""


@pytest.mark.runs
def test_ranks_wait_for_the_one_that_prints_what_all_refuse(tmp_path):
    script = tmp_path / "refuses.py"
    script.write_text(SLOW_TO_PRINT)
    output, _ = (run := torchrun(2, str(script))).communicate(timeout=60)
    assert run.returncode != 0
    assert error_line(output) == "error: all refuse this"


@pytest.mark.runs
def test_two_hosts_train_together(tmp_path):
    settings = [
        *SMALL,
        f"output_dir={tmp_path}",
        "task.task_names_to_use=[3,8]",
        "training.num_train_steps=1",
        "evaluation.episodes=2",
    ]
    config = "configs/multi_task_distributed.yaml"
    arguments = [SHORT, SCRIPT, "--config_path", config, "--override", *settings]
    outputs = [finish(host) for host in two_hosts(free_port(), *arguments)]
    assert any("rank 1: 1 tasks, 8 trajectories" in output for output in outputs)
    assert len(list(tmp_path.glob("*/results.json"))) == 1


@pytest.mark.runs
def test_hosts_that_share_no_folder_have_each_a_log_and_one_has_the_results(tmp_path):
    folders = tmp_path / "one", tmp_path / "other"
    for folder in folders:
        folder.mkdir()
    arguments = [
        SHORT, "11_train_with_logging.py", "--config_path",
        str(REPO_ROOT / "configs/multi_task_distributed.yaml"), "--override", *SMALL, "output_dir=runs",
        "task.task_names_to_use=[3,8]", "training.num_train_steps=0", "evaluation.episodes=2", "logging.use_wandb=false",
    ]  # fmt: skip
    for host in two_hosts(free_port(), *arguments, folders=folders):
        finish(host)
    logs = {
        path.name: path.parents[2].relative_to(tmp_path).name
        for path in tmp_path.glob("*/runs/*/train_rank?.log")
    }
    assert sorted(logs) == ["train_rank0.log", "train_rank1.log"]
    assert sorted(logs.values()) == ["one", "other"]
    (results,) = tmp_path.glob("*/runs/*/results.json")
    assert results.with_name("train_rank0.log").is_file()


@pytest.mark.soak
@pytest.mark.parametrize("wrong", ["arguments", "configuration"])
def test_a_rank_that_ends_before_it_meets_the_others_is_named_by_them(tmp_path, wrong):
    port = free_port()
    agent = ("--nnodes=2", "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}", "--rdzv_id=test")
    script, *arguments = long_run(tmp_path)
    code = "import sys, runpy, pi0.ranks.watch as d; d.MEET_S = 5.0; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    (tmp_path / "impatient.py").write_text(code)
    whole = torchrun(1, str(tmp_path / "impatient.py"), script, *arguments, agent=agent)
    limit = time.monotonic() + 60
    while time.monotonic() < limit:  # the rendezvous is there, and not on the host that ends
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            break
        time.sleep(0.1)
    missing = ["--config_pth", "x"] if wrong == "arguments" else [*arguments, "evaluation.episodes=-1"]
    broken = torchrun(1, str(tmp_path / "impatient.py"), script, *missing, agent=agent)
    output, _ = whole.communicate(timeout=100)
    broken.communicate(timeout=60)
    assert whole.returncode != 0
    place = "start" if wrong == "arguments" else "watch"
    missing = rf"rank [01] has not come to the ranks' {place} within 5 s"
    launcher = (
        rf"the launcher on \S+ that connects the ranks was gone before all had come to the ranks' {place}"
    )
    assert re.search(rf"^error: ({missing}|{launcher})", output, re.MULTILINE)  # whichever is rank 0
    assert 'Traceback (most recent call last):\n  File "' + str(REPO_ROOT / script) not in output


@pytest.mark.soak
@pytest.mark.usefixtures("fresh_python")
def test_a_launcher_that_answers_no_more_is_noticed():
    # As one whose host is cut off: its connections stay open.
    hosts = two_hosts(free_port(), "tests/support/rank_silent.py", "4", "launcher")
    for host in hosts:
        next(line for line in host.stdout if line.startswith("process "))
    first = next(host for host in hosts if rank_under(host.pid) == 0)
    (second,) = [host for host in hosts if host is not first]
    os.kill(first.pid, signal.SIGSTOP)
    end = threading.Timer(60.0, second.kill)  # if nobody notices
    end.start()
    line = next((line for line in second.stdout if line.startswith("error:")), "")
    end.cancel()
    for host in hosts:
        host.kill()
        host.communicate(timeout=60)
    assert re.match(
        r"error: the launcher on .* that connects the ranks.* has been silent for 4 s; rank 1 ends", line
    )


def rank_under(launcher: int) -> int:
    """Rank of the process that a launcher has started."""
    (process,) = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    environment = Path(f"/proc/{process}/environ").read_bytes().decode().split("\0")
    return next(int(entry[5:]) for entry in environment if entry.startswith("RANK="))


@pytest.mark.soak
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.usefixtures("fresh_python")
@pytest.mark.tried("A host dies", "The other ends within a minute, with the rank")
def test_a_host_that_dies_ends_the_other_within_a_minute_with_a_line_that_names_its_rank(tmp_path, rank):
    hosts = two_hosts(free_port(), *long_run(tmp_path))
    wait_for_ranks(tmp_path, 2)
    victim = ranks_of(tmp_path)[rank]
    launcher = int(Path(f"/proc/{victim}/stat").read_text().rpartition(")")[2].split()[1])
    (left,) = [host for host in hosts if host.pid != launcher]
    # Launcher and rank at once, nobody says goodbye.
    os.kill(launcher, signal.SIGKILL)
    os.kill(victim, signal.SIGKILL)
    killed = time.monotonic()
    output, _ = left.communicate(timeout=60)
    assert time.monotonic() - killed < 60
    assert left.returncode != 0
    line = error_line(output)
    assert f"rank {rank} (process {victim} on" in line
    for host in hosts:
        host.communicate(timeout=60)
