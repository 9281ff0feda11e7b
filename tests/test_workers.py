"""Worker processes without a simulator: calls, arrays, random numbers, and every way in which a worker is lost."""

import gc
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from pi0.workers import pool as pool_module
from pi0.workers import process as process_module
from pi0.workers.arrays import arrays_in, nbytes
from pi0.workers.pool import ATTEMPTS, Loss, WorkerPool, usable_cores
from pi0.workers.process import WorkerError, WorkerInputError
from tests.support.tiny_worker import count_of

ROOT = Path(__file__).resolve().parents[1]
TINY = "tests.support.tiny_worker:Tiny"
TABLE = {"numbers": ((3, 5), np.float32), "flags": ((7,), np.uint8), "steps": ((2,), np.int64)}


def make_pool(folder, workers: int = 2, seed: int = 0, **settings) -> WorkerPool:
    streams = np.random.SeedSequence(seed)
    return WorkerPool(TINY, str(folder), TABLE, workers, streams=streams, **settings)


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    pool = make_pool(tmp_path_factory.mktemp("pool"))
    yield pool
    pool.close()


@pytest.fixture(autouse=True)
def losses(request):
    """Losses of the test; every worker that was lost is named in its place."""
    if "pool" not in request.fixturenames:
        return []
    workers = request.getfixturevalue("pool")
    workers.losses.clear()
    return workers.losses


def results(pool, function, argument_lists, **settings):
    by_index = dict(pool.call(function, argument_lists, **settings))
    return [by_index[index] for index in range(len(argument_lists))]


def ended(pid: int) -> bool:
    """Whether a process has ended, whoever is to collect it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


# Arrays -------------------------------------------------------------------------------------------------


def test_arrays_lie_side_by_side_in_one_block_and_are_what_the_table_says():
    block = bytearray(nbytes(TABLE))
    arrays = arrays_in(block, TABLE)
    assert {name: (a.shape, a.dtype) for name, a in arrays.items()} == {
        name: (shape, np.dtype(dtype)) for name, (shape, dtype) in TABLE.items()
    }
    for number, array in enumerate(arrays.values(), start=1):
        array[...] = number
    assert [array.min() for array in arrays.values()] == [1, 2, 3]
    assert [array.max() for array in arrays.values()] == [1, 2, 3]
    starts = [array.__array_interface__["data"][0] for array in arrays.values()]
    assert all((b - a) % 64 == 0 for a, b in pairwise(starts))
    assert len(block) == 3 * 64


def test_a_table_without_arrays_needs_a_block_all_the_same():
    assert arrays_in(bytearray(nbytes({})), {}) == {}
    assert nbytes({"scalar": ((), np.float64), "none": ((0, 4), np.float64)}) == 64


def test_both_sides_see_what_the_other_writes_and_no_worker_sees_anothers(pool):
    for number, arrays in enumerate(pool.arrays, start=1):
        arrays["numbers"][:] = number
    assert sorted(results(pool, "double", [(), ()])) == [15.0, 30.0]
    assert [arrays["numbers"].tolist() for arrays in pool.arrays] == [[[2.0] * 5] * 3, [[4.0] * 5] * 3]


# Calls --------------------------------------------------------------------------------------------------


def test_every_call_gets_its_own_answer_and_all_workers_take_part(pool):
    before = pool.reports
    assert results(pool, "add", [(number, 100) for number in range(20)]) == list(range(100, 120))
    counts = [now - (was or 0) for was, now in zip(before, pool.reports, strict=True)]
    assert sum(counts) == 20
    assert min(counts) > 0
    assert results(pool, "add", []) == []


def test_one_worker_answers_in_order(tmp_path):
    pool = make_pool(tmp_path, workers=1)
    assert [index for index, _ in pool.call("add", [(1, 1)] * 5)] == list(range(5))
    pool.close()


def test_a_function_is_called_with_the_workers_object(pool):
    counts = pool.reports
    assert sorted(results(pool, count_of, [(100,), (100,)])) == sorted(100 + count for count in counts)


@pytest.mark.usefixtures("fresh_python")
def test_a_worker_has_one_thread_its_own_group_and_imports_nothing_that_it_does_not_need(tmp_path):
    pool = make_pool(tmp_path, 2)
    for index, seen in pool.call("environment", [(), ()]):
        assert seen["variables"]["OMP_NUM_THREADS"] == "1", index
        assert seen["group"] in pool.processes
        assert not {"torch", "mujoco", "scipy"} & set(seen["modules"])
    pool.close()


def test_variables_of_the_environment_are_the_users_first(tmp_path, monkeypatch):
    monkeypatch.setenv("TINY_SPEED", "mine")
    pool = make_pool(tmp_path, 1, environment={"TINY_SPEED": "given", "TINY_COLOUR": "given"})
    ((_, seen),) = pool.call("environment", [()])
    assert (seen["variables"]["TINY_SPEED"], seen["variables"]["TINY_COLOUR"]) == ("mine", "given")
    pool.close()


def test_an_error_is_raised_with_its_name_and_the_worker_lives_on(pool, losses):
    processes = pool.processes
    with pytest.raises(WorkerError, match=r"worker \d: ValueError: no such level"):
        results(pool, "fail", [()])
    with pytest.raises(WorkerError, match=r"AttributeError: 'Tiny' object has no attribute 'jump'"):
        results(pool, "jump", [()])
    with pytest.raises(WorkerError, match="PicklingError|AttributeError.*lambda"):
        results(pool, "give_back_what_cannot_be_sent", [()])
    assert (pool.processes, losses) == (processes, [])


def test_what_a_user_can_repair_is_an_error_of_the_input_without_a_traceback(pool, losses, caplog):
    with pytest.raises(WorkerInputError, match=r"^worker \d: no such disk; mount it$"):
        results(pool, "refuse", [()])
    with pytest.raises(
        WorkerInputError, match=r"^worker \d: .*the cache: No space left on device; set PI0_CACHE_DIR"
    ):
        results(pool, "write_to_a_full_disk", [()])
    assert (caplog.text, losses) == ("", [])


def test_what_cannot_be_sent_is_an_error_here_and_leaves_the_pool_usable(pool):
    with pytest.raises((AttributeError, TypeError), match="pickle"):
        results(pool, "add", [(1, 2), (lambda: None, 2)])
    assert results(pool, "add", [(1, 2), (3, 4)]) == [3, 7]


def test_a_worker_that_cannot_start_says_why(tmp_path):
    for worker, spec, why in [
        (TINY, "no such game", "it could not start: FileNotFoundError: no such game"),
        ("tests.support.tiny_worker:Giant", "", "it could not start: AttributeError: .*Giant"),
        ("tests.support.no_such_module:Tiny", "", "it could not start: ModuleNotFoundError"),
    ]:
        pool = WorkerPool(worker, spec, TABLE, 1, streams=np.random.SeedSequence(0))
        with pytest.raises(WorkerError, match=f"worker 0: {why}"):
            results(pool, "add", [(1, 2)])
        pool.close()


# Losses -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "cause"),
    [
        ("die", "ended (SIGKILL)"),
        ("exit", "ended (exit code 7)"),
        ("die_within_the_answer", "ended (SIGKILL)"),
        ("send_garbage", "sent what cannot be read (invalid load key, '?'.)"),
        ("send_what_is_not_there", "sent what cannot be read (No module named 'no_such_module')"),
    ],
)
def test_a_call_whose_worker_is_lost_is_made_again_by_a_new_one(pool, losses, tmp_path, method, cause):
    processes = pool.processes
    calls = [(method, str(tmp_path / str(number))) for number in range(4)]
    assert results(pool, "the_first_time", calls) == [path for _, path in calls]
    assert [(loss.cause, loss.work) for loss in losses] == [(cause, ("the_first_time",))] * 4
    assert not set(processes) & set(pool.processes)
    assert all(ended(pid) for pid in processes)


def test_a_worker_that_hangs_is_replaced_when_its_time_is_over(pool, losses, tmp_path):
    calls = [("hang", str(tmp_path / "once"))]
    assert results(pool, "the_first_time", calls, limit_s=4.0) == [str(tmp_path / "once")]
    assert [str(loss) for loss in losses] == ["worker 0 hung for 4 s while it ran the_first_time"]


def test_a_worker_that_hangs_within_its_answer_is_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(process_module, "STALL_S", 1)
    pool = make_pool(tmp_path, workers=1)
    path = str(tmp_path / "once")
    assert results(pool, "the_first_time", [("hang_within_the_answer", path)]) == [path]
    assert [loss.cause for loss in pool.losses] == ["hung within an answer for 1 s"]
    pool.close()


def test_a_worker_that_reads_no_more_is_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(process_module, "STALL_S", 1)
    pool = make_pool(tmp_path, workers=1)
    assert results(pool, "add", [(1, 2)]) == [3]
    os.kill(pool.processes[0], signal.SIGSTOP)
    large = np.zeros(2**20)  # more than a socket holds
    (total,) = results(pool, "add", [(large, large)])
    assert total.shape == large.shape
    assert [loss.cause for loss in pool.losses] == ["hung for 1 s"]
    pool.close()


def test_a_worker_that_closes_its_socket_and_stays_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(process_module, "STOP_S", 0.5)
    pool = make_pool(tmp_path, workers=1)
    processes = pool.processes
    path = str(tmp_path / "once")
    assert results(pool, "the_first_time", [("close_the_socket_and_stay", path)]) == [path]
    assert [loss.cause for loss in pool.losses] == ["ended (SIGKILL)"]
    assert ended(processes[0])
    pool.close()


def test_a_call_that_ends_every_worker_ends_with_the_cause(pool, losses):
    with pytest.raises(WorkerError, match=r"ended \(SIGKILL\) while it ran die, 3 times"):
        results(pool, "die", [()])
    assert len(losses) == ATTEMPTS
    assert results(pool, "add", [(1, 2)]) == [3]


def test_a_worker_killed_while_nobody_asks_is_noticed_by_the_next_who_does(pool, losses):
    os.kill(pool.processes[1], signal.SIGKILL)
    time.sleep(0.1)
    assert results(pool, "add", [(number, 0) for number in range(4)]) == list(range(4))
    assert [str(loss) for loss in losses] == ["worker 1 ended (SIGKILL) while it ran add"]


def test_who_answers_while_the_trainer_is_busy_is_not_taken_for_hung(pool, losses):
    assert results(pool, "add", [(1, 2), (3, 4)]) == [3, 7]  # both have started
    with pool.answers() as answers:
        pool.send(0, "add", (1, 2))
        pool.send(1, "sleep", (0.5,), limit_s=1.0)
        seen = []
        for number, outcome in answers:
            seen.append((number, outcome))
            time.sleep(1.5)
    assert seen == [(0, 3), (1, 0.5)]
    assert losses == []


def test_the_scheduler_is_told_of_losses_and_errors_and_continues(pool, losses):
    with pool.answers() as answers:
        pool.send(0, "fail")
        pool.send(1, "die", work=("level 1", "level 2"))
        outcomes = {}
        for number, outcome in answers:
            outcomes.setdefault(number, []).append(outcome)
            if not isinstance(outcome, int):
                pool.send(number, "add", (number, 10))  # the same worker, or the one in its place
    assert [type(outcome) for outcome in outcomes[0]] == [WorkerError, int]
    assert outcomes[1] == [Loss(1, "ended (SIGKILL)", ("level 1", "level 2")), 11]
    assert str(losses[0]) == "worker 1 ended (SIGKILL) while it ran level 1, level 2"


def test_a_scheduler_may_give_up_a_worker_itself(pool, losses):
    processes = pool.processes
    loss = pool.lose(0, "plays badly")
    assert (losses, loss.cause) == ([loss], "plays badly")
    assert pool.processes[0] != processes[0]
    assert results(pool, "add", [(1, 2)]) == [3]


@pytest.mark.parametrize("leave", ["break", "error", "check"])
def test_workers_that_still_owe_an_answer_are_replaced_and_others_are_kept(pool, losses, monkeypatch, leave):
    assert results(pool, "add", [(1, 2), (3, 4)]) == [3, 7]
    processes = pool.processes
    with pytest.raises(ZeroDivisionError), pool.answers() as answers:
        pool.send(0, "add", (1, 2))
        pool.send(1, "sleep", (600,))
        for number, outcome in answers:
            assert (number, outcome) == (0, 3)
            if leave == "break":
                break
            if leave == "check":
                monkeypatch.setattr(pool, "check", lambda: 1 / 0)
            else:
                1 / 0  # noqa: B018
        if leave == "break":
            raise ZeroDivisionError
    assert pool.processes[0] == processes[0]
    assert pool.processes[1] != processes[1]
    assert losses == [], "nothing was lost: it was given up"
    monkeypatch.undo()
    assert results(pool, "add", [(1, 2), (3, 4)]) == [3, 7]


def test_waiting_is_interrupted_to_check_whether_it_should_end(tmp_path):
    checks = []
    pool = make_pool(tmp_path, 1, check=lambda: checks.append(time.monotonic()))
    assert results(pool, "sleep", [(2.5,)]) == [2.5]
    assert len(checks) >= 3
    assert max(b - a for a, b in pairwise(checks)) < 2.0
    pool.close()


def test_a_replaced_worker_begins_with_a_new_object_and_cleared_arrays(pool):
    assert results(pool, "add", [(1, 2), (3, 4)]) == [3, 7]
    pool.arrays[0]["numbers"][:] = 1
    assert pool.reports[0] > 0
    pool.lose(0, "was told to go")
    assert pool.reports[0] is None
    assert not pool.arrays[0]["numbers"].any()
    results(pool, count_of, [(0,), (0,)])
    assert pool.reports[0] == 0


# Random numbers -----------------------------------------------------------------------------------------


class StreamOnly:
    """In place of a process: only what it would draw."""

    busy = False

    def __init__(self, number, worker, spec, table, stream, environment, common):
        self.work = ()
        self.random = np.random.default_rng(stream)

    def kill(self) -> None:
        pass

    close = wait = kill


def drawn(streams: np.random.SeedSequence, workers: int, generations: int, count: int) -> np.ndarray:
    """The first numbers of every process of a pool whose workers are lost time and again, [G, W, count]."""
    pool = WorkerPool("", None, {}, workers, streams=streams)
    numbers = []
    for _ in range(generations):
        numbers.append([w.random.integers(2**63, size=count) for w in pool._workers])
        for number in range(workers):
            pool.lose(number, "was told to go")
    return np.array(numbers)


def test_no_two_streams_meet(monkeypatch):
    monkeypatch.setattr(pool_module, "WorkerProcess", StreamOnly)
    shared = np.random.SeedSequence(5)
    pools = [np.random.SeedSequence(seed) for seed in range(5)]  # several runs
    pools += [np.random.SeedSequence((5, rank)) for rank in (1, 2, 3)]  # several ranks
    pools += shared.spawn(2)  # several pools of one run
    numbers = np.concatenate([drawn(streams, 16, 4, 1000).ravel() for streams in pools])
    assert len(numbers) == 10 * 16 * 4 * 1000
    assert len(np.unique(numbers)) == len(numbers)


def test_the_same_seed_gives_the_same_streams_whoever_is_lost_first(monkeypatch):
    monkeypatch.setattr(pool_module, "WorkerProcess", StreamOnly)
    first, again = (drawn(np.random.SeedSequence(3), 4, 3, 10) for _ in range(2))
    assert np.array_equal(first, again)
    assert np.array_equal(first[:, :2], drawn(np.random.SeedSequence(3), 2, 3, 10)), "however many workers"
    pool = WorkerPool("", None, {}, 4, streams=np.random.SeedSequence(3))
    pool.lose(2, "alone")
    assert np.array_equal(pool._workers[2].random.integers(2**63, size=10), first[1, 2])


def test_processes_draw_from_these_streams(tmp_path, monkeypatch):
    real = make_pool(tmp_path, workers=2, seed=11)
    seen = []
    for _ in range(2):
        with real.answers() as answers:
            for number in range(2):
                real.send(number, "draw", (100,))
            seen.append([numbers for _, numbers in sorted(answers)])
        for number in range(2):
            real.lose(number, "was told to go")
    real.close()
    monkeypatch.setattr(pool_module, "WorkerProcess", StreamOnly)
    assert np.array_equal(seen, drawn(np.random.SeedSequence(11), 2, 2, 100))


# The end ------------------------------------------------------------------------------------------------


def test_workers_end_with_the_pool_and_close_what_they_hold(tmp_path):
    pool = make_pool(tmp_path, workers=2)
    assert results(pool, "add", [(1, 2), (3, 4)]) == [3, 7]
    workers, processes = list(pool._workers), pool.processes
    pool.close()
    assert [worker._process.returncode for worker in workers] == [0, 0]
    assert {file.name for file in tmp_path.iterdir()} == {f"closed-{pid}" for pid in processes}
    assert pool.processes == []


def test_no_worker_outlives_a_trainer_that_is_killed(tmp_path):
    trainer = f"""
import numpy as np
from pi0.workers.pool import WorkerPool
pool = WorkerPool({TINY!r}, {str(tmp_path)!r}, {{}}, 2, streams=np.random.SeedSequence(0))
list(pool.call("add", [(1, 2), (3, 4)]))
with pool.answers() as answers:
    pool.send(1, "sleep", (600,))  # one is busy, one has nothing to do
    print(*pool.processes, flush=True)
    next(answers)
"""
    with subprocess.Popen(
        [sys.executable, "-c", trainer], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        processes = [int(pid) for pid in process.stdout.readline().split()]
        assert len(processes) == 2
        assert not any(ended(pid) for pid in processes)
        process.kill()
    until = time.monotonic() + 60
    while not all(ended(pid) for pid in processes):
        assert time.monotonic() < until
        time.sleep(0.1)


pytestmark = pytest.mark.engine


def test_by_default_there_is_a_worker_on_each_core(monkeypatch):
    cores = len(os.sched_getaffinity(0))
    assert 1 <= usable_cores() <= cores
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(4 * cores))
    assert usable_cores() == 1


@pytest.mark.parametrize("moment", ["_execute_child", "__init__"])
def test_ctrl_c_while_a_process_is_made_leaves_no_process(tmp_path, monkeypatch, moment):
    made, original = [], getattr(subprocess.Popen, moment)

    def interrupted(self, *args, **options):
        original(self, *args, **options)
        made.append(self.pid)
        signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored here
    monkeypatch.setattr(subprocess.Popen, moment, interrupted)
    try:
        with pytest.raises(KeyboardInterrupt):
            make_pool(tmp_path)
    finally:
        assert signal.signal(signal.SIGINT, before) is signal.default_int_handler
    gc.collect()
    assert len(made) == 1
    assert not Path(f"/proc/{made[0]}").exists()  # it has ended and its status was collected


def test_a_pool_that_nobody_closes_leaves_no_process(tmp_path):
    pool = make_pool(tmp_path)
    processes = pool.processes
    del pool
    gc.collect()
    assert not [pid for pid in processes if Path(f"/proc/{pid}").exists()]
