"""Several ranks of `pi0.acrlpd`: they learn what one process learns, shards are shares, and whole runs resume."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from pi0.acrlpd.acrlpd_data_loader import shares
from pi0.acrlpd.config import ConfigError, load_rl_config
from pi0.base.errors import InputError
from pi0.base.paths import REPO_ROOT
from tests.support.ranks import error_line, torchrun
from tests.support.stage_13_runs import ranks_of

CHECKPOINT = REPO_ROOT / "checkpoints/pi0_tiny_libero_spatial"


def finish(process: subprocess.Popen, status: int = 0) -> str:
    output, _ = process.communicate(timeout=400)
    assert process.returncode == status, output
    return output


def compared(tmp_path: Path, processes: int, *arguments: str) -> list[dict]:
    """What `rank_acrlpd.py` found, by rank."""
    found = tmp_path / "found.json"
    finish(torchrun(processes, "tests/support/rank_acrlpd.py", *arguments, str(found)))
    return json.loads(found.read_text())


@pytest.mark.runs
@pytest.mark.parametrize("counts", ["6,6", "11,1"])
def test_two_ranks_learn_what_one_process_learns_however_uneven_they_are(tmp_path, counts):
    for found in compared(tmp_path, 2, "windows", counts):
        assert found["moved"] > 1e-2
        assert found["weights"] < 1e-6
        assert found["infos"] < 1e-6


@pytest.mark.runs
@pytest.mark.parametrize(("processes", "size"), [(2, 2), (4, 2)])
def test_a_sharded_actor_learns_what_a_whole_one_learns_and_each_rank_holds_its_share(
    tmp_path, processes, size
):
    for found in compared(tmp_path, processes, "shards", str(CHECKPOINT), str(size)):
        assert found["moved"] > 1e-3
        assert found["weights"] < 1e-5
        assert found["infos"] < 1e-4
        held = found["bytes"]
        assert held["whole_moments"] == 2 * held["whole_weights"]
        for kind in ("weights", "moments"):
            assert held[kind] / held[f"whole_{kind}"] == pytest.approx(1 / size, rel=0.05)


@pytest.mark.runs
def test_the_sketches_of_a_trainer_shard_step_save_and_load_to_the_bit(tmp_path):
    for found in compared(tmp_path, 2, "sketches", str(CHECKPOINT), "2"):
        assert found["step"] == 1
        assert found["moved"] > 1e-5
        assert found["weights"] == 0
        assert found["infos"]
        assert found["published"] == 0


def test_a_batch_is_divided_in_proportion_to_the_windows():
    assert shares(64, [300, 100]) == [48, 16]
    assert shares(10, [1, 1, 1]) == [3, 4, 3]
    assert shares(4, [1000, 1, 1]) == [2, 1, 1]
    assert sum(shares(63, [17, 4, 99, 5])) == 63
    with pytest.raises(InputError, match="the buffer of a rank holds no episode"):
        shares(4, [3, 0])
    with pytest.raises(InputError, match="too small for 3 ranks"):
        shares(2, [3, 3, 3])


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["dtype=bfloat16"], "small steps round away in bfloat16; set dtype = float32"),
        (["acrlpd.use_ema=false"], "set acrlpd.use_ema = true"),
    ],
)
def test_shards_that_cannot_be_are_refused(overrides, said):
    with pytest.raises(ConfigError, match=said):
        load_rl_config("configs/acrlpd_debug.yaml", ["training.fsdp_size=2", *overrides])


def arguments(folder: Path, *overrides: str) -> list[str]:
    return [
        "-m",
        "pi0.acrlpd.train",
        "--config",
        "acrlpd_debug",
        "--override",
        f"output_dir={folder}",
        "features.save_video=false",
        *overrides,
    ]


def run_of(folder: Path) -> Path:
    (run,) = folder.iterdir()
    return run


def weights(run: Path) -> dict[str, np.ndarray]:
    folder = run / "checkpoints/step-000003"
    return {
        f"{file.stem}/{name}": array
        for file in sorted(folder.glob("*.safetensors"))
        for name, array in load_file(file).items()
    }


def metrics(run: Path) -> list[dict]:
    names = ("step", "tasks", "windows", "episodes", "critic_loss", "actor_loss", "critic_grad_norm", "lr")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: line.get(name) for name in names} for line in lines]


@pytest.mark.runs
@pytest.mark.tried(
    "both ranks of ACRLPD killed (SIGKILL) after an iteration", "`--resume` gives the same numbers to the bit"
)
def test_killed_ranks_with_shards_resume_to_the_bit(tmp_path):
    sharded = ("training.fsdp_size=2", "training.gradient_checkpointing=true")
    output = finish(torchrun(2, *arguments(tmp_path / "whole", *sharded)))
    assert "actor sharded: this rank holds" in output
    whole = run_of(tmp_path / "whole")
    assert [row["episodes"] for row in metrics(whole)] == [4, 4, 6]
    process = torchrun(2, *arguments(tmp_path / "part", *sharded))
    deadline = time.monotonic() + 300
    while not list((tmp_path / "part").glob("*/checkpoints/step-000001")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    ranks = ranks_of(tmp_path / "part")
    assert sorted(ranks) == [0, 1]
    for victim in (process.pid, *ranks.values()):
        os.kill(victim, signal.SIGKILL)
    process.communicate(timeout=100)
    part = run_of(tmp_path / "part")
    assert not (part / "results.json").exists()
    finish(torchrun(2, *arguments(tmp_path / "part", *sharded), "--resume", str(part)))
    first, second = weights(whole), weights(part)
    assert first.keys() == second.keys()
    assert [name for name in first if not np.array_equal(first[name], second[name])] == []
    assert metrics(whole) == metrics(part)


@pytest.mark.soak
def test_a_run_of_two_ranks_goes_on_in_one_process(tmp_path):
    finish(torchrun(2, *arguments(tmp_path, "training.num_train_steps=3")))
    run = run_of(tmp_path)
    (run / "results.json").unlink()
    for later in run.glob("checkpoints/step-000003*"):
        later.rename(run / f"left-{later.name}")
    alone = [sys.executable, *arguments(tmp_path, "training.num_train_steps=3"), "--resume", str(run)]
    output = subprocess.run(
        alone,
        check=False,
        cwd=REPO_ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPO_ROOT)},
    )
    assert output.returncode == 0, output.stdout + output.stderr
    assert "written by 2 processes, read by 1" in output.stdout
    assert [row["episodes"] for row in metrics(run)] == [4, 4, 6]


@pytest.mark.runs
def test_ranks_that_cannot_be_divided_are_named(tmp_path):
    output = finish(torchrun(2, *arguments(tmp_path, "training.fsdp_size=3")), 1)
    assert "training.fsdp_size = 3: 2 ranks cannot be divided into copies of 3" in error_line(output)


@pytest.mark.runs
def test_a_batch_smaller_than_the_ranks_is_named_before_anything_is_recorded(tmp_path):
    output = finish(torchrun(2, *arguments(tmp_path, "data.batch_size=1")), 1)
    assert "data.batch_size = 1: each of 2 ranks needs a window; use at least 2" in error_line(output)
    assert not list(tmp_path.iterdir())
