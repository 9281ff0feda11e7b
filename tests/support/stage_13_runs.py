"""Small runs of stage 13 as processes of their own, and what came of them."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import yaml
from safetensors.torch import load_file

from pi0.base.paths import REPO_ROOT

SCRIPT = "13_train_production_ready.py"
CHECKPOINT = REPO_ROOT / "checkpoints" / "pi0_tiny_libero_spatial"
STEPS = 3
SMALL = {
    "policy_path": str(CHECKPOINT),
    "exp_name": "run",
    # Solved in 82 to 141 steps: cut off in the middle, groups differ and episodes are short.
    "task": {
        "task_names_to_use": [3],
        "assets": "standins",
        "max_episode_length": 105,
        "num_parallel_envs": 1,  # several tests run at a time
    },
    "algo": {
        "rloo_batch_size": 4,
        "group_by": "batch",
        "data_batch_size": 4,
        "enable_dynamic_sampling": False,
        "train_init_states": 8,
        "num_epochs": 2,
        "minibatch_size": 24,
        "replay_iterations": 2,
        "ema_decay": 0.9,
    },
    "training": {"num_train_steps": STEPS, "optimizer": {"final_lr_share": 0.1}},
    "evaluation": {"episodes": 1, "periodic_episodes": 1},
    "logging": {"log_freq": 2, "use_wandb": False},
    "features": {"save_video": False},
}

# Overrides of a run that has nothing to learn, for tests of everything else.
SHORT = ["--override", "task.max_episode_length=10", "task.settle_steps=0"]


def start(
    folder: Path, *arguments: str, processes: int = 1, script: Sequence[str] = (SCRIPT,), **options
) -> subprocess.Popen:
    """A run whose output_dir is `folder`; the same command resumes it when `--resume` is given."""
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({**SMALL, "output_dir": str(folder)}))
    launch = (
        []
        if processes == 1
        else ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    )
    return subprocess.Popen(
        [sys.executable, *launch, *script, "--config_path", str(folder / "config.yaml"), *arguments],
        cwd=REPO_ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )


def finish(process: subprocess.Popen, timeout: float = 400) -> str:
    output, _ = process.communicate(timeout=timeout)
    assert process.returncode == 0, output[-4000:]
    return output


def run_of(folder: Path) -> Path:
    (run_dir,) = folder.glob("run-*")
    return run_dir


def steps_saved(folder: Path) -> list[int]:
    return sorted(int(path.name[-6:]) for path in folder.glob("run-*/checkpoints/step-*"))


def wait_until(condition, process: subprocess.Popen, seconds: float = 200) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0][-4000:]
        assert time.monotonic() < limit, "nothing came of it"
        time.sleep(0.02)


def outcome(folder: Path) -> dict:
    """What a finished run has learned and measured, times left out."""
    run_dir = run_of(folder)
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    timed = ("seconds", "rollout_seconds", "phases", "memory")
    results = json.loads((run_dir / "results.json").read_text())
    stats = json.loads((run_dir / "rollout_stats.json").read_text())
    return {
        "rows": [{name: value for name, value in row.items() if name not in timed} for row in rows],
        "evaluations": json.loads((run_dir / "metrics.json").read_text()),
        "before": results["before"]["outcomes"],
        "after": results["after"]["outcomes"],
        "weights": {name: t.numpy().tobytes() for name, t in load_file(run_dir / "policy" / "model.safetensors").items()},
        "stats": {name: sorted(visits) for name, visits in stats["states"].items()},  # ranks write in any order
    }  # fmt: skip


def ranks_of(folder: Path) -> dict[int, int]:
    """Process by rank of a run that has `folder` in its arguments; launchers and rollout workers are none."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (process / "cmdline").read_bytes().decode().split("\0")
            environment = (process / "environ").read_bytes().decode().split("\0")
        except (OSError, UnicodeDecodeError):
            continue
        if str(folder) in " ".join(arguments) and "torch.distributed.run" not in arguments:
            # A forked program shows its rank behind its arguments.
            entries = [entry for entry in (*arguments, *environment) if entry.startswith("RANK=")]
            found |= {int(entry[5:]): int(process.name) for entry in entries}
    return found


def kill_after_a_step(folder: Path, *arguments: str) -> None:
    """Start a run of two processes, and kill launcher and ranks after their first step."""
    process = start(folder, *arguments, processes=2)
    wait_until(lambda: 1 in steps_saved(folder), process)
    ranks = ranks_of(folder)
    assert sorted(ranks) == [0, 1]
    for victim in (process.pid, *ranks.values()):  # each rank is in a session of its own
        os.kill(victim, signal.SIGKILL)
    process.communicate()


def assert_same(folder: Path, straight: Path) -> None:
    ours, theirs = outcome(folder), outcome(straight)
    for name in theirs:
        assert ours[name] == theirs[name], name
