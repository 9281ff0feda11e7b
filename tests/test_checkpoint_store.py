"""A folder of checkpoints after kills, full disks and damage; random states through a file."""

import itertools
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import sys
import time
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from pi0.policy.folder import CheckpointError
from pi0.training.checkpoint_store import MANIFEST, CheckpointStore, load_state, save_state
from pi0.training.random_state import random_states, restore_random_states

# Children of a server that has loaded the imports start in milliseconds, and from a process without threads.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["pytest", "pi0.training.checkpoint_store", "pi0.training.random_state"])


def save(store, step, score=None, course=0):
    """A checkpoint of two files whose content tells the step and the course of training."""
    folder = store.begin(step)
    save_state(
        folder / "state.pt", {"step": step, "course": course, "weights": torch.full((5000,), float(step))}
    )
    (folder / "ranks").mkdir()
    (folder / "ranks" / "0.bin").write_bytes(bytes([step % 256]) * 30_000)
    return store.seal(step, score, {"step": step})


def names(store):
    return sorted(path.name for path in store.folder.iterdir())


@pytest.fixture
def store(tmp_path):
    return CheckpointStore(tmp_path / "checkpoints", keep=3)


# What is saved comes back


def test_checkpoint_holds_the_files_and_facts_that_were_written(store):
    path = save(store, 12, score=0.5)
    assert path == store.folder / "step-000012"
    assert store.verify(path) is None
    assert store.newest_valid() == (path, [])
    assert store.facts(path) == {"step": 12}
    assert torch.equal(load_state(path / "state.pt")["weights"], torch.full((5000,), 12.0))
    assert names(store) == ["step-000012"]


def test_nothing_is_found_before_the_first_checkpoint(store):
    assert store.newest_valid() == (None, [])
    store.begin(1)
    assert store.newest_valid() == (None, [])


def test_newest_is_by_number_also_beyond_six_digits(store):
    save(store, 999_999)
    newest = save(store, 1_000_000)
    assert store.newest_valid() == (newest, [])


def test_everything_is_on_the_disk_before_the_checkpoint_takes_its_name(store, monkeypatch):
    synced = []

    def fsync(descriptor, real=os.fsync):
        named = (store.folder / "step-000001").exists()
        synced.append((os.readlink(f"/proc/self/fd/{descriptor}"), named))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    save(store, 1)
    temporary = store.temporary(1)
    contents = {temporary / name for name in ("", "state.pt", "ranks", "ranks/0.bin", MANIFEST)}
    assert {path for path, named in synced if not named} == {str(path) for path in contents}
    assert [path for path, named in synced if named] == [str(store.folder)]


@pytest.mark.runs
def test_files_of_two_ranks_are_sealed_together(store):
    barrier = processes.Barrier(2)
    ranks = [processes.Process(target=save_as_rank, args=(store.folder, rank, barrier)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(30)
        assert rank.exitcode == 0
    newest, damaged = store.newest_valid()
    assert newest is not None and not damaged
    assert [load_state(newest / f"rank{rank}.pt") for rank in range(2)] == [{"rank": 0}, {"rank": 1}]
    assert set(json.loads((newest / MANIFEST).read_text())["files"]) == {"rank0.pt", "rank1.pt"}


def save_as_rank(folder, rank, barrier):
    store = CheckpointStore(folder, keep=1)
    if rank == 0:
        store.begin(4)
    barrier.wait(20)
    store = CheckpointStore(folder, keep=1)  # one made late must not clear the others' files away
    assert store.newest_valid() == (None, [])
    save_state(store.temporary(4) / f"rank{rank}.pt", {"rank": rank})
    barrier.wait(20)
    if rank == 0:
        store.seal(4)


# Which ones stay


def test_newest_and_best_stay(store):
    for step, score in enumerate([0.1, 0.9, 0.9, 0.2, 0.3, 0.4, None]):
        save(store, step, score)
    assert names(store) == ["step-000002", "step-000004", "step-000005", "step-000006"]


def test_without_scores_only_the_newest_stay(store):
    for step in range(5):
        save(store, step)
    assert names(store) == ["step-000002", "step-000003", "step-000004"]


def test_sealing_a_step_again_replaces_it(store):
    save(store, 1)
    save(store, 2, course=1)
    again = save(store, 2, course=2)
    assert store.newest_valid() == (again, [])
    assert load_state(again / "state.pt")["course"] == 2
    assert names(store) == ["step-000001", "step-000002"]


def test_damaged_checkpoint_that_was_skipped_does_not_take_a_sound_ones_place(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    for step in (1, 2, 5):
        save(store, step)
    (store.folder / "step-000005" / "state.pt").unlink()
    assert store.newest_valid()[0] == store.folder / "step-000002"
    save(store, 3)
    assert names(store) == ["step-000002", "step-000003"]


def test_a_run_that_went_back_leaves_what_it_did_before_behind(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    for step in (2, 9, 3):
        save(store, step, score=step / 10)
    assert names(store) == ["step-000002", "step-000003"]


def test_the_best_goes_like_any_other_where_it_is_not_wanted(tmp_path):
    store = CheckpointStore(tmp_path, keep=1, keep_best=False)
    for step, score in enumerate([0.9, 0.1]):
        save(store, step, score)
    assert names(store) == ["step-000001"]


def test_the_newest_checkpoint_is_dropped_while_an_earlier_one_verifies(store):
    paths = [save(store, step) for step in (1, 2, 3)]
    found = []
    for _ in range(4):
        found.append(store.newest_valid()[0])
        store.drop_last()
    assert found == [paths[2], paths[1], paths[0], paths[0]]
    assert names(store) == ["step-000001"]


def test_the_newest_checkpoint_is_kept_where_all_before_it_are_damaged(store):
    save(store, 1)
    save(store, 2)
    (store.folder / "step-000001" / "state.pt").unlink()
    store.newest_valid()
    store.drop_last()
    assert names(store) == ["step-000001", "step-000002"]


def test_a_damaged_checkpoint_does_not_count_once_it_was_skipped(store):
    save(store, 1)
    newest = save(store, 2)
    assert store.has(2)
    (newest / "state.pt").unlink()
    store.newest_valid()
    assert not store.has(2)
    assert store.resume_point(1) == str(store.folder / "step-000001")
    assert store.resume_point(3) == f"{store.folder}/step-000001; 2 iterations after it must be repeated"
    save(store, 2)
    assert store.has(2)


@pytest.mark.parametrize("score", [float("nan"), float("inf")])
def test_score_that_cannot_be_compared_is_refused(store, score):
    with pytest.raises(CheckpointError, match="score of step 1 is (nan|inf)"):
        save(store, 1, score)


def test_at_least_one_checkpoint_must_be_kept(tmp_path):
    with pytest.raises(CheckpointError, match="at least one"):
        CheckpointStore(tmp_path, keep=0)


def test_seal_needs_begin(store):
    with pytest.raises(CheckpointError, match=r"call begin\(3\) before seal\(3\)"):
        store.seal(3)


# Kills


def save_until_killed(folder, pipe):
    """Save every step twice, so that replacing is interrupted too; report each save when it is complete."""
    store = CheckpointStore(folder, keep=2)
    newest, _ = store.newest_valid()
    first = load_state(newest / "state.pt")["step"] + 1 if newest else 0
    pipe.send_bytes(b"ready")
    for step in itertools.count(first):
        for course in (1, 2):
            save(store, step, score=-step, course=course)
            pipe.send_bytes(f"{step} {course}".encode())


def reports(pipe):
    """What a killed child had reported as (step, course)."""
    while True:
        try:
            yield tuple(map(int, pipe.recv_bytes().split()))
        except EOFError:
            return


@pytest.mark.runs
@pytest.mark.tried("SIGKILL at any moment of saving", "The old checkpoint or the new one is there, whole")
def test_kill_at_any_moment_loses_no_reported_checkpoint(store):
    moments = random.Random(0)
    last, seconds_a_save = (-1, 0), 0.05
    for kill in range(20):
        receiver, sender = processes.Pipe(duplex=False)
        child = processes.Process(target=save_until_killed, args=(store.folder, sender))
        child.start()
        sender.close()
        assert receiver.recv_bytes() == b"ready"
        seconds = moments.uniform(0, 5 * seconds_a_save)
        time.sleep(seconds)
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        assert child.exitcode == -signal.SIGKILL
        reported = list(reports(receiver))
        if reported:
            last, seconds_a_save = reported[-1], seconds / len(reported)
        newest, damaged = store.newest_valid()
        assert not damaged, f"kill {kill}"
        if newest is None:
            assert last == (-1, 0), f"kill {kill}"
        else:
            state = load_state(newest / "state.pt")
            assert store.facts(newest) == {"step": state["step"]}
            assert (state["step"], state["course"]) >= last, f"kill {kill}"
    assert last > (5, 0), "the children were killed before they saved anything"


def save_until_operation(folder, last_operation):
    """Replace step 2 and prune; die at an operation on the folder's files, counted from 0."""
    operations = itertools.count()

    def die(event, arguments):
        changes = event in ("os.rename", "os.mkdir", "os.rmdir", "os.remove")
        opens = event == "open" and str(arguments[0]).startswith(str(folder))
        if (changes or opens) and next(operations) == last_operation:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(die)
    save(CheckpointStore(folder, keep=1), 2, score=0.2, course=2)


@pytest.mark.runs
def test_kill_at_every_operation_of_a_save_leaves_the_old_or_the_new_checkpoint(store, tmp_path):
    for step, score in ((0, 0.9), (1, 0.1), (2, 0.2)):
        save(store, step, score, course=1)
    courses = []
    for operation in range(200):
        copy = CheckpointStore(tmp_path / f"killed{operation}", keep=1)
        shutil.copytree(store.folder, copy.folder)
        child = processes.Process(target=save_until_operation, args=(copy.folder, operation))
        child.start()
        child.join()
        newest, damaged = copy.newest_valid()
        assert newest is not None and not damaged, operation
        assert load_state(newest / "state.pt")["step"] == 2, operation
        courses.append(load_state(newest / "state.pt")["course"])
        assert all(copy.verify(path) is None for path in copy.folder.glob("step-*")), operation
        copy.begin(3)
        assert copy.newest_valid()[0] == copy.folder / "step-000002", operation
        copy.abandon(3)
        save(copy, 3)
        assert names(copy) == ["step-000000", "step-000003"], operation
        if child.exitcode == 0:
            break
        assert child.exitcode == -signal.SIGKILL
    assert child.exitcode == 0
    assert courses == sorted(courses) and set(courses) == {1, 2}


# Full disks


@contextmanager
def files_end_at(size):
    """A disk that is full: a write beyond `size` bytes of any file is an OSError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_disk_full_while_writing_a_state(store):
    first = save(store, 1)
    with files_end_at(10_000), pytest.raises(CheckpointError, match="state.pt is not written: .*too large"):
        save(store, 2)
    assert not (store.temporary(2) / "state.pt").exists()
    assert store.newest_valid() == (first, [])
    store.abandon(2)
    assert names(store) == ["step-000001"]
    again = save(store, 2)
    assert store.newest_valid() == (again, [])


def test_disk_full_is_said_in_the_systems_words(store):
    path = store.begin(1) / "state.pt"
    path.symlink_to("/dev/full")
    with pytest.raises(CheckpointError, match="No space left on device"):
        save_state(path, {"weights": torch.zeros(100_000)})


def test_disk_full_while_sealing(store):
    first = save(store, 1)
    (store.begin(1) / "state.bin").write_bytes(b"another course")
    with files_end_at(100), pytest.raises(CheckpointError, match="step 1 is not saved: .*too large"):
        store.seal(1)
    assert names(store) == ["step-000001"]
    assert store.newest_valid() == (first, [])
    again = save(store, 1)
    assert store.newest_valid() == (again, [])


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="step 1 is not saved: .*Not a directory"):
        CheckpointStore(tmp_path / "file" / "checkpoints", keep=1).begin(1)


def test_checkpoint_is_saved_although_an_older_one_cannot_be_removed(tmp_path):
    store = CheckpointStore(tmp_path, keep=1)
    save(store, 1)
    store.begin(2)
    (store.folder / ".step-000001.pruned").write_text("in the way")
    with pytest.raises(CheckpointError, match="step-000002 is saved, but an older"):
        store.seal(2)
    assert store.newest_valid() == (store.folder / "step-000002", [])


# Damage


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def change_manifest(path, **changes):
    content = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(json.dumps(content | changes))


DAMAGE = {
    "a flipped bit": (lambda path: flip_a_bit(path / "ranks/0.bin"), "ranks/0.bin: its checksum differs"),
    "a truncated file": (
        lambda path: os.truncate(path / "ranks/0.bin", 29_999),
        "ranks/0.bin has 29999 bytes, 30000 were written",
    ),
    "a missing file": (lambda path: (path / "state.pt").unlink(), "state.pt is missing"),
    "a surplus file": (lambda path: (path / "x").write_text("x"), "x is a surplus file"),
    "a missing manifest": (lambda path: (path / MANIFEST).unlink(), f"{MANIFEST} is missing"),
    "half a manifest": (lambda path: os.truncate(path / MANIFEST, 150), f"{MANIFEST} is not JSON"),
    "a manifest of zeros": (lambda path: (path / MANIFEST).write_bytes(bytes(99)), f"{MANIFEST} is not JSON"),
    "another JSON": (lambda path: (path / MANIFEST).write_text("[]"), "unknown format None"),
    "another format": (lambda path: change_manifest(path, format=99), "unknown format 99; .* reads 1"),
    "another score": (lambda path: change_manifest(path, score=1.0), f"{MANIFEST}: its checksum differs"),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.tried("A checkpoint is damaged", "It is skipped with the reason; an older one is taken")
def test_damaged_checkpoint_is_skipped_with_the_reason(store, damage):
    older, newer, newest = (save(store, step, score=0.1 * step) for step in (1, 2, 3))
    for path in (newer, newest):
        DAMAGE[damage][0](path)
    found, damaged = store.newest_valid()
    assert found == older
    assert [path for path, _ in damaged] == [newest, newer]
    for _, reason in damaged:
        assert re.search(DAMAGE[damage][1], reason), reason


def test_facts_of_a_damaged_checkpoint_name_it(store):
    path = save(store, 1)
    (path / MANIFEST).write_text("{")
    with pytest.raises(CheckpointError, match=f"{path}: {MANIFEST} is not JSON.*use an older"):
        store.facts(path)


# States in files


@pytest.mark.parametrize("content", [b"", b"no archive", None], ids=["empty", "other", "missing"])
def test_state_that_cannot_be_read_names_its_file_and_the_mend(tmp_path, content):
    path = tmp_path / "step-000003" / "state.pt"
    path.parent.mkdir()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(
        CheckpointError, match=rf"{path} cannot be read .*remove {path.parent} to use an older"
    ):
        load_state(path)


def test_state_runs_no_code(tmp_path):
    class Code:
        def __reduce__(self):
            return print, ("run",)

    torch.save({"code": Code()}, tmp_path / "state.pt")
    with pytest.raises(CheckpointError, match="UnpicklingError"):
        load_state(tmp_path / "state.pt")


def test_state_that_could_not_be_read_back_is_refused_when_it_is_saved(tmp_path):
    path = tmp_path / "state.pt"
    with pytest.raises(TypeError, match=r"numpy\.ndarray"):
        save_state(path, {"positions": np.zeros(3)})
    assert not path.exists()


def test_file_that_holds_no_dictionary_is_refused(tmp_path):
    torch.save([1, 2], tmp_path / "state.pt")
    with pytest.raises(CheckpointError, match="holds a list, not a state"):
        load_state(tmp_path / "state.pt")


def test_optimizer_continues_from_its_saved_state(tmp_path):
    def steps(layer, optimizer, count):
        for _ in range(count):
            layer(torch.ones(2, 3)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters(), 0.1)
    steps(layer, optimizer, 3)
    save_state(tmp_path / "state.pt", {"layer": layer.state_dict(), "optimizer": optimizer.state_dict()})
    steps(layer, optimizer, 2)
    resumed = torch.nn.Linear(3, 2)
    resumed_optimizer = torch.optim.AdamW(resumed.parameters(), 0.1)
    state = load_state(tmp_path / "state.pt")
    resumed.load_state_dict(state["layer"])
    resumed_optimizer.load_state_dict(state["optimizer"])
    steps(resumed, resumed_optimizer, 2)
    assert torch.equal(resumed.weight, layer.weight)


# Random states


def draws():
    """From every generator; an odd number of normal ones, since Python's and NumPy's make them in pairs."""
    drawn = [random.random(), random.gauss(0, 1), *np.random.randn(3), np.random.randint(1000)]
    drawn += [*torch.rand(2).tolist(), *torch.randn(3).tolist()]
    for device in range(torch.cuda.device_count()):
        drawn += torch.rand(3, device=f"cuda:{device}").tolist()
    return drawn


@pytest.mark.parametrize("before", [0, 1], ids=["seeded", "second of a pair waiting"])
def test_draws_continue_after_restoring_from_a_file(tmp_path, before):
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(0)
    for _ in range(before):
        draws()
    save_state(tmp_path / "random.pt", random_states())
    drawn = [draws() for _ in range(3)]
    for _ in range(2):
        restore_random_states(load_state(tmp_path / "random.pt"))
        assert [draws() for _ in range(3)] == drawn


def test_random_states_of_other_devices_are_refused_before_anything_changes():
    states = random_states()
    states["cuda"] = [*states["cuda"], torch.zeros(16, dtype=torch.uint8)]
    draws()
    now = random_states()["torch"]
    with pytest.raises(CheckpointError, match=r"CUDA devices and this process sees \d.*CUDA_VISIBLE_DEVICES"):
        restore_random_states(states)
    assert torch.equal(random_states()["torch"], now)
