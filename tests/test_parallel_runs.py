"""Whole runs of `pi0.parallel`: the same numbers whatever the processes do, checkpoints, resume, faults, results."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from pi0.base.errors import InputError
from pi0.base.paths import REPO_ROOT
from pi0.parallel import ppo as ppo_module
from pi0.parallel import trainer as trainer_module
from pi0.parallel.scorer import WAYS, Scorer
from pi0.parallel.trainer import ParallelTrainer
from tests.support.programs import children_of

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("signals_as_before")]
DOT = "tests.support.games:Dot-v0"
SMALL = {
    "n_workers": 2,
    "update_interval": 64,
    "max_updates": 5,
    "max_episodes": 100_000,
    "evaluation_episodes": 0,
    "save_interval": 2,
    "threads": 1,
    "noop_max": 4,
}


@pytest.fixture(autouse=True)
def reports(request, monkeypatch):
    """No report but in the test of reports: drawing takes half the time of a short run."""
    if "report" not in request.node.name:
        monkeypatch.setattr(trainer_module, "write_html_report", lambda *_: None)


def make_trainer(folder: Path, resume: str = "", **settings) -> ParallelTrainer:
    logging = trainer_module.Config().logging
    logging.use_wandb = False
    return ParallelTrainer(
        resume=resume, output_dir=str(folder), logging=logging, **{**SMALL, "game": DOT, **settings}
    )


def weights(run_dir: Path, step: int = 5) -> dict[str, np.ndarray]:
    return load_file(run_dir / "checkpoints" / f"step-{step:06d}" / "policy.safetensors")


def same(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> bool:
    return first.keys() == second.keys() and all(np.array_equal(first[name], second[name]) for name in first)


def rows(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


# The same numbers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["sync", "overlap"])
@pytest.mark.parametrize("game", [DOT, "Airstriker-Genesis-v0"])
def test_workers_in_this_process_give_the_same_bits(tmp_path, mode, game):
    parallel = make_trainer(tmp_path / "parallel", mode=mode, game=game).train()
    serial = make_trainer(tmp_path / "serial", mode=mode, game=game, workers="0").train()
    assert same(weights(parallel), weights(serial))
    assert not same(weights(parallel), weights(parallel, 0)), "they have learned"


def test_priorities_exploration_and_a_schedule_give_the_same_bits(tmp_path):
    settings = {"n_workers": 3, "workers_schedule": [3, 2], "priority": True, "exploration": [0.3, 0.1]}
    settings |= {"update_interval": 120, "max_steps": 7}
    parallel = make_trainer(tmp_path / "parallel", **settings).train()
    serial = make_trainer(tmp_path / "serial", workers="0", **settings).train()
    assert same(weights(parallel), weights(serial))
    found = rows(parallel)
    assert [row["workers"] for row in found] == [3, 3, 3, 2, 2]
    assert {row["transitions"] for row in found} == {120}


def test_another_seed_gives_other_weights(tmp_path):
    assert not same(
        weights(make_trainer(tmp_path / "a").train()), weights(make_trainer(tmp_path / "b", seed=1).train())
    )


def test_the_lag_is_one_in_overlap_and_none_in_sync(tmp_path):
    assert [row["lag"] for row in rows(make_trainer(tmp_path / "a").train())] == [0, 1, 1, 1, 1]
    assert [row["lag"] for row in rows(make_trainer(tmp_path / "b", mode="sync").train())] == [0] * 5


def test_a_slow_trainer_keeps_the_lag_within_its_limit_in_async(tmp_path, monkeypatch):
    update = trainer_module.PPOAgent.update

    def slow(*arguments):
        time.sleep(0.3)
        return update(*arguments)

    monkeypatch.setattr(trainer_module.PPOAgent, "update", slow)
    trainer = make_trainer(
        tmp_path, mode="async", min_batch_size=32, max_policy_lag=1, n_workers=4, max_updates=12, epochs=1
    )
    found = rows(trainer.train())
    assert len(found) == 12
    assert {row["lag"] for row in found} <= {0, 1}
    assert all(row["transitions"] >= 32 for row in found)


# Checkpoints and resume -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["sync", "overlap"])
def test_a_resumed_run_gives_the_same_bits_in_the_middle_of_episodes(tmp_path, mode):
    settings = {"mode": mode, "game": "Airstriker-Genesis-v0"}
    whole = make_trainer(tmp_path / "whole", **settings).train()
    part = make_trainer(tmp_path / "part", **settings, max_updates=5)
    stop_after(part, 2)
    part.train()
    make_trainer(tmp_path / "part", **settings, resume="newest").train()
    assert same(weights(whole), weights(part.run_dir))
    keys = ("step", "steps", "episodes", "loss", "kl", "recent_score", "lag")
    assert [[row[key] for key in keys] for row in rows(whole)] == [
        [row[key] for key in keys] for row in rows(part.run_dir)
    ]


def test_a_resumed_async_run_goes_on_from_whole_slices(tmp_path):
    settings = {"mode": "async", "min_batch_size": 64, "max_updates": 6}
    part = make_trainer(tmp_path, **settings)
    stop_after(part, 3)
    part.train()
    done = len(rows(part.run_dir))
    make_trainer(tmp_path, **settings, resume="newest").train()
    found = rows(part.run_dir)
    assert [row["step"] for row in found] == list(range(6))
    assert found[done]["steps"] > found[done - 1]["steps"], "counts go on"


def stop_after(trainer: ParallelTrainer, updates: int) -> None:
    """Send this process SIGTERM when the run has so many rows of metrics."""

    def watch():
        while trainer.run_dir is None or not (trainer.run_dir / "metrics.jsonl").exists():
            time.sleep(0.01)
        while len((trainer.run_dir / "metrics.jsonl").read_text().splitlines()) < updates:
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


@pytest.mark.tried(
    "the trainer is killed (SIGKILL), again and again",
    "nothing; `--resume` goes on, with the same numbers to the bit",
)
def test_a_run_that_is_killed_ends_with_the_same_bits(tmp_path):
    kill_main(tmp_path, kills=2, seed=0)


@pytest.mark.soak
def test_a_run_that_is_killed_twenty_times_ends_with_the_same_bits(tmp_path):
    kill_main(tmp_path, kills=20, seed=1, max_updates=200)


def kill_main(folder: Path, kills: int, seed: int, max_updates: int = 20) -> None:
    draw = random.Random(seed)
    whole = make_trainer(folder / "whole", max_updates=max_updates, save_interval=1).train()
    command = [
        sys.executable,
        "-m",
        "pi0.parallel.train_parallel",
        "--logging.use_wandb",
        "false",
        "--game",
        DOT,
    ]
    command += [
        "--output_dir",
        str(folder / "killed"),
        "--save_interval",
        "1",
        "--max_updates",
        str(max_updates),
    ]
    for name, value in SMALL.items():
        if name not in ("save_interval", "max_updates"):
            command += [f"--{name}", str(value)]
    run = None
    for _ in range(kills):
        process = subprocess.Popen(
            [*command, *(["--resume"] if run else [])],
            cwd=REPO_ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        limit = time.monotonic() + 60
        while run is None and time.monotonic() < limit:  # until there is something to resume
            run = next(iter((folder / "killed").glob("*/checkpoints/step-*")), None)
            assert process.poll() is None, process.stderr.read().decode()
            time.sleep(0.02)
        workers = workers_of(process)
        time.sleep(draw.uniform(0, 1.0))
        process.kill()
        process.wait()
        require_gone(workers)
    process = subprocess.run(
        [*command, "--resume"], cwd=REPO_ROOT, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stdout + process.stderr
    (killed,) = (folder / "killed").iterdir()
    assert same(weights(whole, max_updates), weights(killed, max_updates))
    assert [row["step"] for row in rows(killed)] == list(range(max_updates))


def workers_of(process: subprocess.Popen) -> list[int]:
    """The workers of a trainer that has them."""
    limit = time.monotonic() + 60
    while (
        len(workers := [pid for pid, words in children_of(process.pid).items() if "pi0.workers" in words]) < 2
    ):
        assert time.monotonic() < limit and process.poll() is None
        time.sleep(0.02)
    return workers


def require_gone(processes: list[int]) -> None:
    """Within ten seconds none of the processes is left."""
    limit = time.monotonic() + 10
    while left := [pid for pid in processes if is_running(pid)]:
        assert time.monotonic() < limit, f"workers {left} outlive their trainer"
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_the_newest_checkpoints_and_the_best_stay(tmp_path):
    run = make_trainer(tmp_path, save_interval=1, max_checkpoints=2, max_updates=6, lr=1e-9).train()
    kept = sorted(path.name for path in (run / "checkpoints").glob("step-*"))
    scores = {
        json.loads((run / "checkpoints" / name / "manifest.json").read_text())["score"]: name for name in kept
    }
    evaluations = json.loads((run / "checkpoints" / kept[-1] / "run.json").read_text())["evaluations"]
    best = max(evaluations, key=lambda entry: (entry["mean_score"], entry["step"]))
    assert kept[-2:] == ["step-000005", "step-000006"]
    assert set(kept) == {"step-000005", "step-000006", f"step-{best['step']:06d}"}
    assert max(score for score in scores if score is not None) == best["mean_score"]


def test_a_resumed_run_keeps_its_settings(tmp_path):
    make_trainer(tmp_path, max_updates=2).train()
    with pytest.raises(InputError, match=r"gamma was 0.99 and is 0.5"):
        make_trainer(tmp_path, max_updates=2, gamma=0.5, resume="newest").train()


@pytest.mark.tried(
    "a PPO run is resumed with another version of what plays its game",
    "an error names both versions: scores before and after would not be of the same game",
)
def test_a_run_is_not_resumed_with_another_simulator(tmp_path, monkeypatch):
    run = make_trainer(tmp_path, max_updates=1).train()
    kept = sorted(path.name for path in (run / "checkpoints").iterdir())
    monkeypatch.setattr(metadata, "version", lambda name: "0")
    with pytest.raises(InputError, match=r"not be of the same simulation \(gymnasium was \S+ and is 0\)"):
        make_trainer(tmp_path, max_updates=2, resume="newest").train()
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == kept


def test_a_resumed_run_keeps_the_number_of_workers_that_was_chosen_for_it(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer_module, "choose_workers", lambda: 2)
    make_trainer(tmp_path, max_updates=2, workers="auto", n_workers=8).train()
    monkeypatch.setattr(trainer_module, "choose_workers", lambda: 4)
    run = make_trainer(tmp_path, max_updates=3, workers="auto", n_workers=8, resume="newest").train()
    assert [row["workers"] for row in rows(run)] == [2, 2, 2]


# Faults ---------------------------------------------------------------------------------------------------


def disturb(trainer: ParallelTrainer, times: int, seed: int, signals: tuple[int, ...]) -> threading.Thread:
    """Kill or stop random workers, so many times, while the trainer runs; stops when none is left to disturb.

    A worker is disturbed once an update at most: a slice is filled within two, and a third loss would end the run.
    """
    draw = random.Random(seed)

    def run():
        disturbed: set[tuple[int, int]] = set()
        while len(disturbed) < times:
            time.sleep(draw.uniform(0.02, 0.3))
            metrics = None if trainer.run_dir is None else trainer.run_dir / "metrics.jsonl"
            if metrics is None or not metrics.exists() or not (workers := trainer.processes):
                continue
            updates = metrics.read_text().count("\n")
            number = draw.randrange(len(workers))
            if (number, updates) not in disturbed:
                try:
                    os.kill(workers[number], draw.choice(signals))
                except ProcessLookupError:
                    continue
                disturbed.add((number, updates))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


@pytest.mark.tried(
    "a gradient of `pi0.parallel` is not finite, again and again",
    "`update 2: 5 gradients in a row are not finite; back to the last good checkpoint, with other noise`",
)
@pytest.mark.parametrize("mode", ["sync", "overlap", "async"])
def test_bad_gradients_lead_back_to_a_checkpoint(tmp_path, monkeypatch, mode):
    loss, calls = ppo_module.ppo_loss, []

    def spoilt(*arguments, **more):
        calls.append(1)
        found = loss(*arguments, **more)
        return replace(found, total=found.total * np.nan) if 9 <= len(calls) < 14 else found

    monkeypatch.setattr(ppo_module, "ppo_loss", spoilt)
    trainer = make_trainer(tmp_path, mode=mode, save_interval=1, min_batch_size=64)
    found = rows(trainer.train())
    assert [row["step"] for row in found] == list(range(5))
    assert found[-1]["rollbacks"] == 1
    assert all(np.isfinite(row["loss"]) and row["lag"] >= 0 for row in found)


@pytest.mark.tried(
    "a worker of `pi0.parallel` is killed, or stopped (SIGSTOP) past its deadline",
    "`replaced: worker 1 ended (SIGKILL) while it ran slice 3 of worker 1`; the same numbers",
)
def test_workers_that_are_killed_or_stopped_change_no_number(tmp_path):
    lose_workers(tmp_path, times=3, max_updates=8)


@pytest.mark.soak
def test_twenty_workers_that_are_killed_or_stopped_change_no_number(tmp_path):
    lose_workers(tmp_path, times=20, max_updates=60)


def lose_workers(folder: Path, times: int, max_updates: int) -> None:
    settings = {"game": "Airstriker-Genesis-v0", "max_updates": max_updates, "update_interval": 256}
    whole = make_trainer(folder / "whole", **settings).train()
    # A replacement starts, and opens its emulator, within the deadline, also beside other tests.
    trainer = make_trainer(folder / "lost", **settings, deadline_s=6.0)
    thread = disturb(trainer, times, seed=times, signals=(signal.SIGKILL, signal.SIGSTOP))
    lost = trainer.train()
    thread.join(0)
    assert sum(len(row["respawns"]) for row in rows(lost)) >= min(2, times)
    assert same(weights(whole, max_updates), weights(lost, max_updates))


@pytest.mark.tried(
    "a game of `pi0.parallel` hangs, or raises an error",
    "`replaced: worker 0 hung for 2 s ...` or `replaced: worker 0: ZeroDivisionError: ...`; the same numbers",
)
@pytest.mark.parametrize(("fault", "line"), [("hang", "hung for 2 s"), ("raise", "the dot is lost")])
def test_a_game_that_hangs_or_raises_is_started_again(tmp_path, fault, line):
    whole = make_trainer(tmp_path / "whole").train()
    options = [f"once={tmp_path / 'done'}", f"fault={fault}"]
    lost = make_trainer(tmp_path / "lost", game_options=options, deadline_s=2.0).train()
    assert [line in told for row in rows(lost) for told in row["respawns"]] == [True]
    assert same(weights(whole), weights(lost))


def test_a_worker_whose_memory_grows_is_replaced_and_changes_no_number(tmp_path):
    whole = make_trainer(tmp_path / "whole").train()
    small = make_trainer(tmp_path / "small", worker_memory_mb=1.0).train()
    assert all(len(row["respawns"]) == 2 for row in rows(small)[1:])
    assert same(weights(whole), weights(small))


@pytest.mark.tried(
    "a game of `pi0.parallel` fails three times in the same slice",
    "a checkpoint, then `error: slice 1 of worker 0 failed 3 times, the last time so: ... ZeroDivisionError: ...`",
)
def test_a_slice_that_fails_three_times_ends_the_run_with_a_checkpoint_and_the_error(tmp_path):
    trainer = make_trainer(tmp_path, game_options=["cliff=true"], save_interval=100)
    with pytest.raises(
        InputError, match=r"slice \d of worker \d failed 3 times.*ZeroDivisionError: the dot fell off"
    ):
        trainer.train()
    assert list((trainer.run_dir / "checkpoints").glob("step-*"))


@pytest.mark.tried(
    "a game does not start in a worker",
    "`error: Worker 0 failed to start: ...` with the cause and what to do",
)
def test_a_worker_that_fails_to_start_is_named(tmp_path):
    with pytest.raises(InputError, match=r"Worker \d failed to start: .*no display here.*--workers 0"):
        make_trainer(tmp_path, game_options=[f"only_in={os.getpid()}"]).train()


@pytest.mark.tried("`pi0.parallel` gets Ctrl+C", "`stopped; --resume continues from ...`, no worker is left")
def test_ctrl_c_leaves_a_checkpoint_and_no_worker(tmp_path):
    command = [sys.executable, "-m", "pi0.parallel.train_parallel", "--logging.use_wandb", "false"]
    command += [
        "--game",
        DOT,
        "--output_dir",
        str(tmp_path),
        "--evaluation_episodes",
        "0",
        "--n_workers",
        "2",
    ]
    process = subprocess.Popen(
        command, cwd=REPO_ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    limit = time.monotonic() + 60
    while not any(tmp_path.glob("*/metrics.jsonl")):
        assert time.monotonic() < limit
        time.sleep(0.05)
    workers = workers_of(process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "stopped; --resume continues from" in out
    assert "Traceback" not in err
    require_gone(workers)


@pytest.mark.soak
def test_ten_thousand_episodes_leave_the_memory_as_it_was(tmp_path):
    trainer = make_trainer(
        tmp_path,
        game="Airstriker-Genesis-v0",
        max_steps=1,
        noop_max=0,
        update_interval=1000,
        max_updates=None,
    )
    found = rows(ParallelTrainer.of(trainer.config).train(max_episodes=10_000))
    assert found[-1]["episodes"] >= 10_000
    early, late = ([row["memory"]["workers_mb"] for row in part] for part in (found[1:3], found[-2:]))
    assert max(late) < 1.02 * max(early)


# Results --------------------------------------------------------------------------------------------------


def test_a_run_leaves_its_table_report_and_videos(tmp_path, capsys):
    run = make_trainer(
        tmp_path,
        game="Airstriker-Genesis-v0",
        max_updates=2,
        evaluation_episodes=2,
        max_steps=60,
        render=True,
    ).train()
    results = json.loads((run / "results.json").read_text())
    assert [row[0] for row in results["table"]] == [
        "raw score",
        "sampled",
        "greedy",
        "first and last of training",
    ]
    assert len(results["scores"]["after"]["sampled"]["scores"]) == 2
    assert "after training" in capsys.readouterr().out
    for name in ("before_after.mp4", "best_episode.mp4"):
        assert (run / name).stat().st_size > 1000
    page = (run / "report.html").read_text()
    assert '<th scope="col">after training</th>' in page
    assert trainer_module.METRICS.undeclared(rows(run)[0]) == []
    for row in rows(run):
        assert len(row["scores"]) == row["finished"]
        assert not row["scores"] or row["score"]["mean"] == pytest.approx(np.mean(row["scores"]))
    assert sum(row["finished"] for row in rows(run)) > 1


def during(run_dir: Path) -> list[dict]:
    return json.loads((run_dir / "results.json").read_text())["scores"]["during"]


def test_scores_beside_training_are_those_of_the_checkpoints_and_change_no_number(tmp_path):
    settings = {"evaluation_episodes": 3, "evaluation_interval": 2}
    scored = make_trainer(tmp_path / "scored", **settings)
    run = scored.train()
    assert same(weights(run), weights(make_trainer(tmp_path / "not").train()))
    assert [score["step"] for score in during(run)] == [2, 4]
    spec = trainer_module.worker.PlayerSpec(
        trainer_module.GameSpec(DOT), trainer_module.Layout(1, 1, 1, 3), 10000, scored.config.noop_max
    )
    scorer = Scorer(spec, scored.config, lambda: None)
    for found in during(run):
        network = trainer_module.ActorCritic((3,))
        network.load_state_dict(
            {name: torch.from_numpy(each) for name, each in weights(run, found["step"]).items()}
        )
        again = scorer.score(network.flat(), "again")
        assert {how: again[how]["scores"] for how in WAYS} == {how: found[how] for how in WAYS}
    with torch.no_grad():
        network.actor.weight.zero_()
        network.actor.bias.copy_(torch.tensor([0.0, 0.0, 0.5]))
    rightmost = scorer.score(network.flat(), "of a policy whose most likely action is 2")
    actions = {how: set(bytes.fromhex(rightmost[how]["episode"]["actions"])[::2]) for how in WAYS}
    assert actions == {"sampled": {0, 1, 2}, "greedy": {2}}
    scorer.close()
    evaluations = [row["evaluation"] for row in rows(run) if row["evaluation"]]
    assert evaluations[0] == {
        "step": 2.0,
        "sampled": np.mean(during(run)[0]["sampled"]),
        "greedy": np.mean(during(run)[0]["greedy"]),
    }


@pytest.mark.tried("a stop while a score is under way", "the resumed run has the same scores")
def test_a_score_that_was_under_way_is_made_by_the_resumed_run(tmp_path, monkeypatch):
    settings = {"evaluation_episodes": 100, "evaluation_interval": 2}
    whole = make_trainer(tmp_path / "whole", **settings).train()
    log = trainer_module._Run._log

    def stopped(run, metrics, bar):
        log(run, metrics, bar)
        if metrics["step"] == 2:
            assert not run.scorer.during, "the score of step 2 is still under way"
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(trainer_module._Run, "_log", stopped)
    run = make_trainer(tmp_path / "stopped", **settings).train()
    assert not (run / "results.json").exists()
    monkeypatch.setattr(trainer_module._Run, "_log", log)
    resumed = make_trainer(tmp_path / "stopped", resume=str(run), **settings).train()
    assert during(resumed) == during(whole)


def test_it_trains_on_this_packages_libero_environment(tmp_path):
    run = make_trainer(
        tmp_path,
        game="pi0.libero.gym_env:pi0/LIBERO-v0",
        game_options=["image_size=84"],
        max_updates=1,
        max_steps=20,
        update_interval=32,
        skip=1,
        noop_max=0,
    ).train()
    (row,) = rows(run)
    assert row["transitions"] == 32
    assert np.isfinite(row["loss"])


def test_the_quickstart_of_the_game_ends_with_its_table_and_goes_on_where_it_is_asked_to(tmp_path):
    command = [
        sys.executable,
        "-m",
        "pi0.parallel.train_parallel",
        "--config_path",
        "configs/parallel_quickstart.yaml",
    ]
    command += [
        "--logging.use_wandb",
        "false",
        "--output_dir",
        str(tmp_path),
        "--n_workers",
        "2",
        "--render",
        "false",
    ]
    command += [
        "--update_interval",
        "64",
        "--evaluation_episodes",
        "1",
        "--max_steps",
        "50",
        "--save_interval",
        "1",
    ]
    for more in (["--max_updates", "1"], ["--max_updates", "2", "--resume"]):
        done = subprocess.run([*command, *more], cwd=REPO_ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert re.search("raw score +before training", done.stdout)
    assert "continuing from" in done.stdout
    (run,) = tmp_path.iterdir()
    assert [row["step"] for row in rows(run)] == [0, 1]


def test_the_check_of_sequences_passes_and_can_fail():
    command = [sys.executable, "-m", "pi0.parallel.test_parallel", "--steps", "30"]
    passes = subprocess.run(command, cwd=REPO_ROOT, capture_output=True, text=True, check=False)
    assert passes.returncode == 0, passes.stderr
    lines = passes.stdout.splitlines()
    assert [line.partition(": Seed: ")[0] for line in lines[:8]] == [
        f"Worker {number}" for number in range(8)
    ]
    assert lines[8:] == [
        "✓ SUCCESS: All workers have different random sequences!",
        "✓ SUCCESS: All workers have different seeds!",
    ]
    fails = subprocess.run(
        [*command, "--seed-bug", "--n_workers", "2"],
        cwd=REPO_ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert fails.returncode == 1, fails.stderr
    assert "✗ WARNING: Some workers have identical random sequences" in fails.stdout


def test_it_learns_to_move_the_dot(tmp_path):
    run = make_trainer(
        tmp_path, update_interval=512, max_updates=12, lr=1e-3, skip=1, mode="sync", threads=2
    ).train()
    found = rows(run)
    assert found[-1]["recent_score"] > found[1]["recent_score"] + 4
