"""Stage 13: signals, kills, full disks, bad updates. Real processes, real signals, real LIBERO."""

import contextlib
import importlib.util
import json
import os
import pty
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.utils.data import DistributedSampler

from pi0 import PI0Policy
from pi0.base.paths import REPO_ROOT
from pi0.libero.suites import find_tasks
from pi0.ript.cfg_adapter import PI0_CFG_Adapter
from pi0.ript.rollout_stats import RolloutStats, SamplerState
from pi0.training.checkpoint_store import CheckpointStore
from pi0.training.state import Place
from tests.support.episodes import make_episode, states_of
from tests.support.programs import children_of
from tests.support.stage_13_runs import (
    CHECKPOINT,
    SCRIPT,
    SHORT,
    SMALL,
    STEPS,
    assert_same,
    finish,
    outcome,
    ranks_of,
    run_of,
    start,
    steps_saved,
    wait_until,
)


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("stage_13", REPO_ROOT / SCRIPT)
    stage = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(stage)
    return stage


# Signals -----------------------------------------------------------------------------------------------


@pytest.mark.runs
@pytest.mark.parametrize(
    ("number", "moment"), [(signal.SIGINT, "rollouts 1:"), (signal.SIGTERM, "update:")], ids=["int", "term"]
)
@pytest.mark.tried(
    "SIGINT or SIGTERM, in rollouts and in an update",
    "A checkpoint, status 0; a resumed run ends with the same bits",
)
def test_a_signal_stops_the_run_with_a_checkpoint_and_exit_status_0(straight, tmp_path, number, moment):
    process = start(tmp_path)
    log = lambda: next(iter(tmp_path.glob("run-*/train_rank0.log")), None)
    saved = 1 if moment == "rollouts 1:" else 0
    wait_until(lambda: saved in steps_saved(tmp_path), process)
    if moment == "update:":  # the rollouts are over
        wait_until(lambda: log() and "rollouts 0:" in log().read_text(), process)
    asked = time.monotonic()
    process.send_signal(number)
    output = finish(process, timeout=30)
    assert time.monotonic() - asked < 30
    assert f"{number.name}: stopping after a checkpoint" in output
    assert "stopped; --resume continues from" in output
    assert no_process_has(tmp_path)
    if moment == "update:":
        finish(start(tmp_path, "--resume"))
        assert_same(tmp_path, straight[0])


@pytest.mark.runs
@pytest.mark.parametrize("nohup", [False, True], ids=["hup", "nohup"])
@pytest.mark.tried("The terminal is closed (SIGHUP)", "As SIGTERM; with `nohup` the run goes on")
def test_a_closed_terminal_stops_the_run_with_a_checkpoint_unless_it_was_started_with_nohup(tmp_path, nohup):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**SMALL, "output_dir": str(tmp_path)}))
    command = [sys.executable, SCRIPT, "--config_path", str(tmp_path / "config.yaml"), *SHORT]
    number, terminal = pty.fork()
    if number == 0:  # in a session whose terminal this is
        os.chdir(REPO_ROOT)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored if the tests themselves run with nohup
        ignored = (
            ["sh", "-c", 'trap "" HUP; exec "$@"', "sh"] if nohup else []
        )  # as nohup, but with this terminal
        os.execvp([*ignored, *command][0], [*ignored, *command])
    reader = threading.Thread(target=drain, args=(terminal,), daemon=True)
    reader.start()
    try:
        limit = time.monotonic() + 200
        while 1 not in steps_saved(tmp_path):
            assert time.monotonic() < limit and os.waitpid(number, os.WNOHANG) == (0, 0)
            time.sleep(0.05)
        os.kill(number, signal.SIGSTOP)  # so that the run is not over before its terminal is
        os.close(terminal)
        os.kill(number, signal.SIGCONT)
        _, status = os.waitpid(number, 0)
    except BaseException:
        os.kill(number, signal.SIGKILL)
        raise
    assert os.waitstatus_to_exitcode(status) == 0
    log = (run_of(tmp_path) / "train_rank0.log").read_text()
    assert ("SIGHUP: stopping after a checkpoint" in log) == (not nohup)
    assert ("stopped; --resume continues from" in log) == (not nohup)
    assert (run_of(tmp_path) / "results.json").exists() == nohup
    assert no_process_has(tmp_path)


def drain(terminal: int) -> None:
    """Read a terminal to its end, as one that shows what is written."""
    with contextlib.suppress(OSError):
        while os.read(terminal, 4096):
            pass


@pytest.mark.runs
def test_two_processes_stop_together_when_one_is_asked(tmp_path):
    process = start(tmp_path, "--override", "training.use_fsdp=true", processes=2)
    wait_until(lambda: 1 in steps_saved(tmp_path), process)
    second = ranks_of(tmp_path)[1]
    asked = time.monotonic()
    os.kill(second, signal.SIGTERM)
    output = finish(process, timeout=30)
    assert time.monotonic() - asked < 30
    assert "stopped; --resume continues from" in output
    assert no_process_has(tmp_path)


@pytest.mark.runs
def test_ctrl_c_for_the_launcher_stops_all_ranks_and_the_run_can_be_resumed(tmp_path):
    process = start(tmp_path, *SHORT, processes=2)
    wait_until(lambda: 1 in steps_saved(tmp_path), process)
    asked = time.monotonic()
    process.send_signal(signal.SIGINT)  # its ranks are in sessions of their own, and it tells them
    output, _ = process.communicate(timeout=30)
    assert time.monotonic() - asked < 30
    assert "stopped; --resume continues from" in output
    wait_until_nothing_has(tmp_path)
    finish(start(tmp_path, "--resume", *SHORT, processes=2))
    assert len(outcome(tmp_path)["rows"]) == STEPS


WAITS_IN_A_COLLECTIVE = """
import datetime, torch.distributed as dist
from pi0.training.interrupts import Interrupts
interrupts = Interrupts()
interrupts.install()
store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
print("waiting", flush=True)
try:
    store.wait(["what nobody sets"], datetime.timedelta(seconds=20))
except dist.DistError:
    print("stop asked:", interrupts.stop_asked)
"""


@pytest.mark.runs
def test_a_signal_is_heard_while_python_waits_for_others():
    process = subprocess.Popen(
        [sys.executable, "-c", WAITS_IN_A_COLLECTIVE],
        cwd=REPO_ROOT, env={**os.environ, "PYTHONPATH": str(REPO_ROOT)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout.readline() == "waiting\n"
    asked = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.stderr.readline() == "\n"
    assert process.stderr.readline().startswith("SIGTERM: stopping after a checkpoint")
    assert time.monotonic() - asked < 2
    time.sleep(1.1)  # sooner it would be the same request
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=5)
    assert process.returncode == 128 + signal.SIGTERM


ASKED_TO_STOP = """
import os, signal, time
from pi0.training.interrupts import Interrupted, Interrupts
interrupts = Interrupts()
interrupts.install()
os.kill(os.getpid(), signal.SIGTERM)
while not interrupts.stop_asked:
    time.sleep(0.01)
started = time.monotonic()
try:
    while True:
        interrupts.check_together(patience_s=0.5)
        time.sleep(0.01)
except Interrupted:
    print(time.monotonic() - started)
"""


@pytest.mark.runs
def test_an_update_may_continue_for_a_while_after_a_request_to_stop():
    done = subprocess.run([sys.executable, "-c", ASKED_TO_STOP], cwd=REPO_ROOT, env=with_path(),
                          capture_output=True, text=True, check=True, timeout=60)  # fmt: skip
    assert 0.5 <= float(done.stdout) < 5


@pytest.mark.runs
def test_a_stop_saves_what_no_checkpoint_has(tmp_path):
    process = start(tmp_path, *SHORT, "training.save_freq=100")
    wait_until(lambda: any(path.read_text() for path in tmp_path.glob("run-*/metrics.jsonl")), process)
    process.send_signal(signal.SIGTERM)
    output = finish(process, timeout=30)
    saved = steps_saved(tmp_path)
    assert saved[0] == 0
    assert saved[1] in (1, 2)
    assert (
        f"stopped; --resume continues from {run_of(tmp_path) / 'checkpoints'}/step-00000{saved[1]}" in output
    )


@pytest.mark.soak  # tests/test_iteration.py shows it in one process
def test_a_long_update_is_abandoned_after_ten_seconds_and_what_is_lost_is_said(tmp_path):
    # The first iteration makes four updates at most, the second at least four of four seconds.
    few = [
        "--override",
        "training.save_freq=100",
        "training.save_best=false",
        "algo.num_epochs=4",
        "algo.minibatch_size=100",
    ]
    process = start(tmp_path, *few, script=("tests/support/slow_updates.py", "4"), env=with_path())
    log = lambda: next(iter(tmp_path.glob("run-*/train_rank0.log")), None)
    wait_until(lambda: log() and "rollouts 1:" in log().read_text(), process)
    time.sleep(2.0)  # the update has begun
    asked = time.monotonic()
    process.send_signal(signal.SIGTERM)
    output = finish(process, timeout=30)
    assert time.monotonic() - asked >= 8.0
    assert re.search(r"continues from .*/step-000000; 1 iterations after it must be repeated", output)
    assert steps_saved(tmp_path) == [0]


@pytest.mark.runs
def test_a_score_that_a_stop_cut_short_is_made_up_for_and_counts_for_its_checkpoint(tmp_path):
    few = ["--override", "evaluation.periodic_episodes=8", "task.max_episode_length=60"]
    process = start(tmp_path, *few)
    log = lambda: next(iter(tmp_path.glob("run-*/train_rank0.log")), None)
    wait_until(lambda: log() and "iteration 1:" in log().read_text(), process)
    process.send_signal(signal.SIGTERM)
    finish(process, timeout=30)
    checkpoint = run_of(tmp_path) / "checkpoints" / "step-000002"
    assert json.loads((checkpoint / "manifest.json").read_text())["score"] is None
    finish(start(tmp_path, "--resume", *few))
    (evaluation,) = outcome(tmp_path)["evaluations"]
    assert (evaluation["step"], evaluation["episodes"]) == (2, 8)
    assert json.loads((checkpoint / "manifest.json").read_text())["score"] == evaluation["success_rate"]


@pytest.mark.runs
def test_the_same_signal_again_stops_at_once(tmp_path):
    process = start(tmp_path)
    wait_until(lambda: 0 in steps_saved(tmp_path), process)
    process.send_signal(signal.SIGINT)
    time.sleep(1.1)  # sooner it would be the same request
    asked = time.monotonic()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=5)
    assert time.monotonic() - asked < 3
    # 0, or while Python ends the system's own -2, if the first had already been enough
    assert process.returncode in (130, 0, -signal.SIGINT)


@pytest.mark.runs
def test_sigusr1_makes_a_checkpoint_and_the_run_continues(tmp_path):
    process = start(tmp_path, *SHORT, "training.save_freq=100", "training.save_best=false")
    wait_until(lambda: 0 in steps_saved(tmp_path), process)
    process.send_signal(signal.SIGUSR1)
    finish(process)
    assert steps_saved(tmp_path) == [1, STEPS]  # the one asked for, and the end
    assert len(outcome(tmp_path)["rows"]) == STEPS


def with_path() -> dict[str, str]:
    """The environment for a script that is not at the top."""
    return {**os.environ, "PYTHONPATH": str(REPO_ROOT)}


def wait_until_nothing_has(folder: Path) -> None:
    limit = time.monotonic() + 30
    while not no_process_has(folder):
        assert time.monotonic() < limit
        time.sleep(0.1)


def no_process_has(folder: Path) -> bool:
    """Whether nothing that was started for `folder` still runs."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (
                str(folder).encode() in (process / "cmdline").read_bytes()
                and int(process.name) != os.getpid()
            ):
                return False
        except OSError:
            continue
    return True


@pytest.mark.soak
@pytest.mark.usefixtures("fresh_python")
def test_twenty_kills_at_random_moments_lose_nothing_but_the_work_since_the_last_checkpoint(
    straight, tmp_path
):
    moments = random.Random(0)
    kills, verified, whole_runs, seen = 0, 0, 0, 0
    while kills < 20:
        runs = list(tmp_path.glob("run-*/checkpoints/step-*"))
        process = start(tmp_path, *(["--resume"] if runs else []))
        time.sleep(moments.uniform(2.0, 10.0))
        if process.poll() is not None:
            break
        process.kill()
        process.communicate()
        kills += 1
        for store in tmp_path.glob("run-*/checkpoints"):
            newest, damaged = CheckpointStore(store, 2).newest_valid()
            assert damaged == []
            if newest is not None:
                assert int(newest.name[-6:]) >= seen
                seen = int(newest.name[-6:])
                verified += 1
        for run_dir in tmp_path.glob("run-*"):  # killed before its first checkpoint: nothing to resume
            if not list(run_dir.glob("checkpoints/step-*")):
                shutil.rmtree(run_dir)
        if seen == STEPS:  # start over: the rest is the final evaluation
            for run_dir in tmp_path.glob("run-*"):
                shutil.rmtree(run_dir)
            whole_runs, seen = whole_runs + 1, 0
    if list(tmp_path.glob("run-*")):
        finish(start(tmp_path, "--resume"))
        assert_same(tmp_path, straight[0])
    assert kills == 20
    assert verified >= 10, "most kills came before there was anything to lose"
    print(
        f"{kills} kills, {verified} of them with checkpoints there, the newest of which verified each time; "
        f"{whole_runs} runs got through all their iterations"
    )


# What goes wrong ---------------------------------------------------------------------------------------


def test_what_several_ranks_remember_is_joined_for_another_number_of_ranks():
    stage = load_script()
    pools = [states_of(task, 4) for task in find_tasks("libero_spatial", [0, 1])]

    def sampler_of(rank: int, ranks: int):
        dataset, stats = stage.LiberoInitStateDataset(pools), RolloutStats(None, skip_threshold=2)
        ring = DistributedSampler(dataset, ranks, rank, shuffle=False)
        return stage.TaskAwareSampler(dataset, ring, 1, stats)

    def part(sampler) -> SamplerState:
        return SamplerState(sampler.turns, sampler.rings, sampler.stats)

    def cursors(sampler) -> list[int]:
        return [ring.init_state_cursor for ring in sampler.rings]

    old = [sampler_of(rank, 2) for rank in (0, 1)]
    solved = set()
    for sampler in old:
        for _ in range(3):
            (index,) = sampler.smart_sample_group()
            for _ in range(2):
                sampler.stats.record(sampler.names[index], 1, 1)
            solved.add(sampler.names[index])
    assert len(solved) == 6
    states = json.loads(json.dumps([part(sampler).state_dict() for sampler in old]))
    joined = sampler_of(0, 1)
    part(joined).join_state_dicts(states, Place(rank=0, world_size=1, step=3))
    assert joined.turns.credit == old[0].turns.credit != [0.0, 0.0]
    assert cursors(joined) == [0, 0], "rings begin again"
    assert {name for name in joined.names if joined.stats.skip(name)} == solved
    again = sampler_of(1, 2)
    part(again).load_state_dict(states[1])
    assert part(again).state_dict() == part(old[1]).state_dict()
    assert cursors(again) == [2, 1]


@pytest.mark.runs
def test_a_killed_rollout_worker_changes_nothing(straight, tmp_path):
    process = start(tmp_path, "--override", "training.num_train_steps=1")
    wait_until(lambda: 0 in steps_saved(tmp_path), process)
    time.sleep(1.0)
    workers = [pid for pid, arguments in children_of(process.pid).items() if "worker" in arguments]
    os.kill(workers[0], signal.SIGKILL)
    output = finish(process)
    assert "SIGKILL" in output
    row = json.loads((run_of(tmp_path) / "metrics.jsonl").read_text())
    assert row["lost_workers"] != []
    undisturbed = outcome(straight[0])["rows"][0]
    assert undisturbed["loss"] > 0
    assert {**undisturbed, "lost_workers": row["lost_workers"]}.items() <= row.items()


@pytest.mark.soak  # tests/test_iteration.py shows it in one process
def test_a_single_gradient_that_is_not_finite_is_left_out_and_counted(tmp_path):
    output = finish(start(tmp_path, script=("tests/support/spoilt_gradients.py", "1"), env=with_path()))
    assert "1 gradients were not finite and were left out" in output
    rows = outcome(tmp_path)["rows"]
    assert [row["bad_updates"] for row in rows] == [1, 0, 0]
    assert rows[-1]["rollbacks"] == 0
    assert STEPS in steps_saved(tmp_path), "what came after it was finite"
    assert all(row["updates"] > 0 for row in rows)


@pytest.mark.soak  # tests/test_iteration.py shows it without a simulator
@pytest.mark.parametrize("processes", [1, 2])
def test_after_several_gradients_that_are_not_finite_the_run_goes_back_and_on(tmp_path, processes):
    # One update an iteration: the third iteration's is the third in a row.
    few = ["--override", "training.max_bad_updates=3", "algo.num_epochs=1", "algo.minibatch_size=100"]
    script = ("tests/support/spoilt_gradients.py", "3")
    output = finish(start(tmp_path, *few, processes=processes, script=script, env=with_path()))
    assert "step 2: 3 gradients in a row are not finite; back to the last good checkpoint" in output
    for step in (1, 2):  # weights that give no gradient may be spoilt
        assert f"no checkpoint of step {step}: the last gradient was not finite" in output
    assert "step-000000, 0 iterations done" in output
    rows = outcome(tmp_path)["rows"]
    assert [row["rollbacks"] for row in rows] == [1] * STEPS
    assert all(row["updates"] > 0 for row in rows)


FOUR_UPDATES = ["--override", "algo.num_epochs=4", "algo.minibatch_size=100", "training.max_bad_updates=3"]


@pytest.mark.soak  # tests/test_iteration.py shows it in one process
def test_a_second_rollback_takes_an_earlier_checkpoint(tmp_path):
    # The last update of the first iteration: the checkpoint after it is whole, and its gradients overflow.
    output = finish(
        start(
            tmp_path, *FOUR_UPDATES, script=("tests/support/spoilt_weights.py", "4", "1e12"), env=with_path()
        )
    )
    assert re.findall(r"continuing from .*/step-00000(\d)", output) == ["1", "0"]
    first, again = re.findall(r"iteration 0: .* loss (\S+)", output)
    assert first != again, "the update's noise is drawn again"
    rows = outcome(tmp_path)["rows"]
    assert [row["rollbacks"] for row in rows] == [2] * STEPS
    assert all(row["bad_updates"] == 0 for row in rows)


@pytest.mark.soak  # tests/test_iteration.py shows it in one process
def test_weights_that_are_no_numbers_are_in_no_checkpoint(tmp_path):
    output = finish(
        start(
            tmp_path, *FOUR_UPDATES, script=("tests/support/spoilt_weights.py", "4", "nan"), env=with_path()
        )
    )
    assert "step 0: the weights are not finite; back to the last good checkpoint" in output
    assert [row["rollbacks"] for row in outcome(tmp_path)["rows"]] == [1] * STEPS


@pytest.mark.soak  # tests/test_iteration.py shows it in one process
def test_gradients_that_are_not_finite_are_counted_rolled_back_and_in_the_end_reported(tmp_path):
    overrides = ["algo.lr=1e30", "training.max_rollbacks=1", "training.max_bad_updates=2"]
    process = start(tmp_path, "--override", *overrides)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "back to the last good checkpoint" in output
    assert "again and again; start a new run with a lower algo.lr" in output
    assert "Traceback" not in output
    newest, _ = CheckpointStore(run_of(tmp_path) / "checkpoints", 2).newest_valid()
    weights = load_file(newest / "training.safetensors")
    assert all(torch.isfinite(weight).all() for weight in weights.values())


@pytest.mark.runs
@pytest.mark.tried(
    "The disk is full during a run",
    "Training goes on; at the end the missing results are named, none of them is listed, status 1",
)
def test_a_full_disk_keeps_training_and_says_so(tmp_path):
    def small_files() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))

    output, _ = (process := start(tmp_path, *SHORT, preexec_fn=small_files)).communicate(timeout=400)
    assert process.returncode == 1 and "Traceback" not in output
    assert "step 1: checkpoint of step 1 is not saved: " in output or re.search(
        r"step 1: .* is not written: ", output
    )
    assert "policy not written: " in output and "make room" in output
    listed = re.findall(rf"^  {run_of(tmp_path)}/(.+)$", output, re.MULTILINE)
    assert "results.json" in listed and "policy" not in listed
    assert re.search(r"^error: these results are not written, .*:\n  policy: ", output, re.MULTILINE)
    results = json.loads((run_of(tmp_path) / "results.json").read_text())
    assert len(results["history"]) == STEPS


RESULTS = ("final_training_results.json", "results.json", "before_after.mp4", "report.html")


@pytest.mark.runs
@pytest.mark.tried("Results cannot be written at the end", "Each is named; the others are there; status 1")
def test_results_that_cannot_be_written_are_named_and_end_the_run_with_an_error(tmp_path):
    process = start(tmp_path, *SHORT, "training.num_train_steps=1", "features.save_video=true")
    wait_until(lambda: 0 in steps_saved(tmp_path), process)
    for name in RESULTS:
        (run_of(tmp_path) / name).mkdir()  # in the file's way
    output, _ = process.communicate(timeout=400)
    assert re.findall(r"^(\S+) not written: ", output, re.MULTILINE) == list(RESULTS)
    said = output[output.index("error: these results are not written") :]
    assert re.findall(r"^  (\S+): ", said, re.MULTILINE) == list(RESULTS)
    assert process.returncode == 1 and "Traceback" not in output
    assert 1 in steps_saved(tmp_path)


HALF_A_LINE = """
import resource, signal, sys
from pathlib import Path
from pi0.training.metrics import append_line
path = Path(sys.argv[1])
append_line(path, {"step": 0})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 8, -1))
try:
    append_line(path, {"step": 1})
except OSError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
append_line(path, {"step": 2})
"""


@pytest.mark.runs
def test_a_line_that_the_disk_has_no_room_for_leaves_the_others_whole(tmp_path):
    path = tmp_path / "metrics.jsonl"
    done = subprocess.run([sys.executable, "-c", HALF_A_LINE, str(path)], cwd=REPO_ROOT, env=with_path(),
                          capture_output=True, text=True, check=True, timeout=60)  # fmt: skip
    assert "No space left" in done.stdout
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 2]


OUT_OF_MEMORY = """
import resource, sys, torch
from tests.support.episodes import make_episode
from pi0 import PI0Policy
from pi0.ript.cfg_adapter import PI0_CFG_Adapter
torch.set_num_threads(1)
policy = PI0Policy.from_pretrained(sys.argv[1])
adapter = PI0_CFG_Adapter(policy, noise_samples=4)
episodes = [make_episode(True, [10] * 20, seed) for seed in range(12)]
batch = adapter.weigh(episodes, [1.0] * 12)
adapter.accumulate_gradient(batch[torch.arange(2)], torch.Generator().manual_seed(0), 1)  # what is allocated once
policy.zero_grad(set_to_none=True)
used = int(open("/proc/self/statm").read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[2]), -1))
loss = adapter.accumulate_gradient(batch, torch.Generator().manual_seed(0), 1)
assert all(p.grad is None or torch.isfinite(p.grad).all() for p in policy.parameters())
print("passes", adapter.passes, "loss", loss)
"""


@pytest.mark.runs
@pytest.mark.usefixtures("fresh_python")
def test_when_memory_runs_out_minibatches_go_through_in_more_passes():
    done = subprocess.run(
        [sys.executable, "-c", OUT_OF_MEMORY, str(CHECKPOINT), "700000000"],
        cwd=REPO_ROOT, env=with_path(), capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "memory ran out: minibatches are computed in 2 passes" in done.stdout
    assert int(re.search(r"passes (\d+)", done.stdout)[1]) >= 2


@pytest.mark.runs
@pytest.mark.usefixtures("fresh_python")
def test_when_one_ranks_memory_runs_out_all_continue_in_more_passes():
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [sys.executable, *launch, "tests/support/rank_memory.py", str(CHECKPOINT), "700000000"],
        cwd=REPO_ROOT, env={**os.environ, "PYTHONPATH": str(REPO_ROOT)},
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "memory ran out on rank 1: minibatches are computed in 2 passes" in done.stdout
    passes = re.findall(r"rank \d: (\d+) passes, loss", done.stdout)
    assert len(passes) == 2
    assert passes[0] == passes[1]


@pytest.mark.soak  # tests/test_iteration.py shows it without a limit of the system
def test_where_one_ranks_memory_runs_out_among_shards_a_resumed_run_keeps_its_passes(tmp_path):
    large = ["algo.minibatch_size=100", "algo.noise_samples=32", "algo.negative_weight=0.5"]
    settings = ["--override", "training.use_fsdp=true", "training.num_train_steps=1", *large]
    short = ("tests/support/rank_short_of_memory.py", "300000000")
    process = start(tmp_path, *settings, processes=2, script=short, env=with_path())
    output, _ = process.communicate(timeout=300)
    assert process.returncode != 0
    line = "error: step 0: memory ran out on rank 1; --resume continues with minibatches in 2 passes"
    assert line in output
    output = finish(start(tmp_path, "--resume", *settings, processes=2))
    newest, _ = CheckpointStore(run_of(tmp_path) / "checkpoints", 2).newest_valid()
    assert json.loads((newest / "run.json").read_text())["facts"]["passes"] == 2
    assert "loss" in json.loads((run_of(tmp_path) / "metrics.jsonl").read_text())


@pytest.mark.runs
@pytest.mark.parametrize("chunks", ["9,2", "3,0"])  # 4 passes
def test_shards_gather_the_gradient_of_whole_copies_in_several_passes(chunks):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [sys.executable, *launch, "tests/support/rank_shards.py", str(CHECKPOINT), chunks],
        cwd=REPO_ROOT, env={**os.environ, "PYTHONPATH": str(REPO_ROOT)},
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    difference, size = map(
        float, re.search(r"difference (\S+) of gradients up to (\S+)", done.stdout).groups()
    )
    assert size > 0.1
    assert difference < 1e-5 * size


def test_more_passes_give_the_same_gradient():
    policy = PI0Policy.from_pretrained(CHECKPOINT)
    adapter = PI0_CFG_Adapter(policy)
    batch = adapter.weigh([make_episode(True, [10, 10, 4], 0), make_episode(True, [10, 3], 1)], [1.0, 0.25])
    generator = torch.Generator().manual_seed(3)
    adapter.passes = 2
    loss = adapter.accumulate_gradient(batch, generator, 2)
    ours = [parameter.grad.clone() for parameter in policy.parameters() if parameter.grad is not None]
    policy.zero_grad(set_to_none=True)
    generator.manual_seed(3)
    parts = [batch[torch.arange(0, 3)], batch[torch.arange(3, 5)]]
    expected = (
        sum(adapter.minibatch_loss(part, generator) * part.weights.abs().sum() for part in parts)
        / batch.weights.abs().sum()
    )
    (expected / 2).backward()
    theirs = [parameter.grad for parameter in policy.parameters() if parameter.grad is not None]
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(ours, theirs, strict=True))


HOLDS_FREE_MEMORY = """
from pi0.training.memory import release, resident_mb
blocks = [bytes(60_000) for _ in range(4_000)]  # too small to be mapped by themselves
blocks = blocks[-1:]  # what malloc has below it stays
before = resident_mb()
release()
print(before - resident_mb())
"""


@pytest.mark.runs
@pytest.mark.usefixtures("fresh_python")
def test_free_memory_is_given_back():
    done = subprocess.run([sys.executable, "-c", HOLDS_FREE_MEMORY], cwd=REPO_ROOT, env=with_path(),
                          capture_output=True, text=True, check=True, timeout=60)  # fmt: skip
    assert float(done.stdout) > 100


KEEPS_FREED_MEMORY = """
import resource
import torch
from pi0.training.memory import release
release()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt  # pages that are new from the system
for number in range(15):
    if number == 10:
        before = faults()
    blocks = [torch.zeros(5_000_000) for _ in range(10)]  # 20 MB each: more than malloc keeps of itself
    del blocks
print(faults() - before)
"""


@pytest.mark.runs
@pytest.mark.usefixtures("fresh_python")
def test_between_releases_freed_memory_is_kept():
    done = subprocess.run([sys.executable, "-c", KEEPS_FREED_MEMORY], cwd=REPO_ROOT, env=with_path(),
                          capture_output=True, text=True, check=True, timeout=60)  # fmt: skip
    assert int(done.stdout) < 10_000  # of 244,000


@pytest.mark.soak
@pytest.mark.usefixtures("fresh_python")
def test_a_run_whose_memory_grows_says_so(tmp_path):
    script = ("tests/support/leaking_memory.py", "3", "3000")  # twice what trainer and worker take
    few = [
        "--override",
        "training.num_train_steps=4",
        "task.max_episode_length=10",
        "evaluation.periodic_episodes=0",
    ]
    output = finish(start(tmp_path, *few, script=script, env=with_path()))
    (line,) = re.findall(r"^memory has grown from .*$", output, re.MULTILINE)
    before, after = map(int, re.fullmatch(r".* from (\d+) to (\d+) MB since step 2", line).groups())
    assert before + 2900 < after < before + 3300


def test_memory_that_grows_is_reported(capsys):
    stage = load_script()

    def row(step: int, size: float) -> dict:
        use = {"rss_mb": size, "workers_mb": 0.0, "gpu_mb": None}
        return {"step": step, "memory": {**use, "other_ranks": {}}}

    stage.monitor_memory([row(n, 1000.0 + n) for n in range(50)])
    assert capsys.readouterr().out == ""
    stage.monitor_memory([row(0, 900.0), row(1, 990.0), row(2, 1000.0), row(3, 1600.0)])
    assert capsys.readouterr().out == "memory has grown from 1000 to 1600 MB since step 2\n"
    on_gpu = [row(n, 900.0) for n in range(5)]
    for size, step in zip([10.0, 10.0, 200.0, 210.0, 400.0], on_gpu, strict=True):
        step["memory"]["gpu_mb"] = size
    stage.monitor_memory(on_gpu)
    assert capsys.readouterr().out == "GPU memory has grown from 200 to 400 MB since step 2\n"
    # Another rank's, which has joined later.
    of_two = [row(n, 1000.0) for n in range(7)]
    for step, size in zip(of_two[4:], (500.0, 600.0, 900.0), strict=True):
        step["memory"]["other_ranks"] = {"1": {"rss_mb": size, "workers_mb": 0.0, "gpu_mb": None}}
    stage.monitor_memory(of_two)
    assert capsys.readouterr().out == "memory of rank 1 has grown from 500 to 900 MB since step 4\n"
