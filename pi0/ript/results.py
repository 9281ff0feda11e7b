"""What a run leaves behind for people: results.json, a table, a learning curve, a before/after video."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import re
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from pi0.base.errors import InputError
from pi0.base.files import write_whole
from pi0.base.stats import format_rate, paired_difference, wilson_interval
from pi0.base.video import captioned, write_video
from pi0.report.html_report import write_learning_curve
from pi0.ript.metrics import METRICS

if TYPE_CHECKING:
    from pi0.libero.episodes import Episode
    from pi0.policy.acting import ActingPolicy
    from pi0.ript.env_runner import EvaluationResult, LIBEROEnvRunner

VIDEO_EPISODES = 3
VIDEO_EVERY = 4  # control steps from one frame to the next
VIDEO_FPS = 10  # twice real time


# Keys, by how they begin, that a resumed run cannot change: optimizer and schedule, what is practised, what scores
# are compared with.
DECIDED_AT_START = (
    "policy_path", "norm_stats_path", "task.benchmark_name", "task.task_name", "task.demonstrations", "task.assets",
    "task.held_out_states", "task.fixtures", "task.max_episode_length", "task.settle_steps", "task.replan_steps", "task.image_size", "task.render", "algo.mode", "algo.lr",
    "algo.train_init_states", "training.num_train_steps", "training.seed", "training.optimizer",
    "evaluation.episodes", "evaluation.seed", "training.trainable", "dtype",
)  # fmt: skip


class OutputError(InputError):
    """A run's folder cannot be written."""


def new_run_dir(output_dir: str, name: str, config: dict[str, Any]) -> Path:
    """Make `output_dir/name-DATE-TIME` and write the configuration into it.

    Raises:
        OutputError: the folder cannot be made or written.
    """
    folder = writable_dir(output_dir)
    while True:
        run_dir = folder / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
        try:
            run_dir.mkdir(parents=True)  # a name may have folders in it
        except FileExistsError:
            time.sleep(0.1)  # another run has started in the same second
        else:
            _write_config(run_dir, config)
            return run_dir


def newest_run(output_dir: str, name: str, config: dict[str, Any]) -> Path:
    """The newest of `output_dir/name-DATE-TIME` with checkpoints; says where its configuration differed.

    Where none has any, the newest that was about to make one.

    Raises:
        OutputError: there is none, or its configuration differed in what the run was built on.
    """
    runs = sorted(
        path.parent
        for path in Path(output_dir).glob(f"{name}-*-*/checkpoints")
        if re.fullmatch(re.escape(name) + r"-\d{8}-\d{6}", path.parent.name)
    )
    if not runs:
        raise OutputError(
            f"nothing to resume: no {name}-DATE-TIME/checkpoints in {output_dir}; start without --resume"
        )
    runs.sort(key=lambda run: any(run.glob("checkpoints/step-*")))  # those of a name stay in order
    earlier = yaml.safe_load((runs[-1] / "config.yaml").read_text())
    differences = _differences(earlier, config)
    if fixed := [difference for difference in differences if difference[0].startswith(DECIDED_AT_START)]:
        changes = "; ".join(f"{key} was {was!r} and is {now!r}" for key, was, now in fixed)
        raise OutputError(
            f"{runs[-1]} cannot go on with other settings ({changes}); set them back, or start a new run with "
            f"policy_path = {runs[-1] / 'policy'}"
        )
    for key, was, now in differences:
        print(f"resuming with {key} = {now!r}, which was {was!r}")
    return runs[-1]


def take_run(run_dir: Path, config: dict[str, Any]) -> None:
    """Keep other processes from writing to a run's folder for as long as this one lives; note what it runs with.

    Raises:
        OutputError: one already does, or the folder cannot be written.
    """
    lock = os.open(run_dir / ".lock", os.O_CREAT | os.O_RDWR, 0o644)  # open until the process ends
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(lock)
        raise OutputError(
            f"another process writes to {run_dir}; stop it first, or choose another exp_name"
        ) from error
    _write_config(run_dir, config)


def _write_config(run_dir: Path, config: dict[str, Any]) -> None:
    try:
        write_whole(run_dir / "config.yaml", yaml.safe_dump(config, sort_keys=False))
    except OSError as error:
        raise OutputError(
            f"cannot write to {run_dir}: {error.strerror}; make room, or choose another folder"
        ) from error


def _differences(earlier: Any, now: Any, key: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(earlier, dict) and isinstance(now, dict):
        return [
            difference
            for name in now
            for difference in _differences(earlier.get(name), now[name], f"{key}.{name}" if key else name)
        ]
    return [] if earlier == now else [(key, earlier, now)]


def writable_dir(path: str | Path) -> Path:
    """Make a folder that results can be written to; better told now than after an hour.

    Raises:
        OutputError: it cannot be made or written.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise OutputError(f"cannot write to {path}: {error.strerror}; choose a writable folder") from error
    return path


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file whole or not at all."""
    write_whole(path, json.dumps(content, indent=1))


def machine() -> dict[str, Any]:
    """What the times of a run depend on."""
    import torch

    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def score(result: EvaluationResult) -> dict[str, Any]:
    """An evaluation as numbers: counts, 95% Wilson intervals, per task and in all."""

    def rate(outcomes: list[bool]) -> dict[str, Any]:
        low, high = wilson_interval(sum(outcomes), len(outcomes))
        return {
            "successes": sum(outcomes),
            "episodes": len(outcomes),
            "success_rate": sum(outcomes) / len(outcomes),
            "interval_95": [low, high],
        }

    return {
        **rate(result.outcomes),
        "tasks": {name: rate(outcomes) for name, outcomes in result.by_task().items()},
        "broken": [e.failure for e in result.episodes if e.failure is not None],
        "outcomes": [
            {
                "task": e.rollout.task.index,
                "state": e.rollout.init_index,
                "success": e.success,
                "steps": e.steps,
            }
            for e in result.episodes
        ],
    }


def write_report(
    run_dir: Path,
    config: dict[str, Any],
    before: EvaluationResult,
    after: EvaluationResult,
    history: list[dict[str, Any]],
    seconds: float,
) -> None:
    """Write results.json and learning_curve.png into `run_dir` and print the table.

    Args:
        before, after: their scores on the same states and noise.
        history: metrics of each iteration.
        seconds: wall time of the run so far.
    """
    change = paired_difference(before.outcomes, after.outcomes)
    written = ["results.json", "policy", "config.yaml"]
    results = {
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(sys.argv),
        "config": config,
        "protocol": before.protocol,
        "machine": machine(),
        "seconds": seconds,
        "before": score(before),
        "after": score(after),
        "change": {
            "difference": change.difference,
            "interval_95": [change.low, change.high],
            "mcnemar_p": change.p_value,
        },
        "history": history,
    }
    print(results_table(results))
    write_json(run_dir / "results.json", results)
    if curve := write_learning_curve(run_dir, METRICS):
        written.append(curve.name)
    print("\n".join(f"  {run_dir / name}" for name in written))


def results_table(results: dict[str, Any]) -> str:
    """Success before and after, per task and in all, on the same states and noise."""
    rows: list[tuple[str, ...]] = [("", "before", "after")]
    for name in results["before"]["tasks"]:
        cells = [results[when]["tasks"][name] for when in ("before", "after")]
        rows.append((name.replace("_", " "), *(format_rate(c["successes"], c["episodes"]) for c in cells)))
    cells = [results[when] for when in ("before", "after")]
    rows.append(("all tasks", *(format_rate(c["successes"], c["episodes"]) for c in cells)))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    low, high = results["change"]["interval_95"]
    lines.append(
        f"change: {100 * results['change']['difference']:+.1f} percentage points "
        f"(95% interval {100 * low:+.1f} to {100 * high:+.1f}, paired on the same states and noise; "
        f"exact McNemar p = {results['change']['mcnemar_p']:.2g})"
    )
    lines.append(
        f"evaluation states are LIBERO's recorded ones, never trained on; {results['seconds'] / 60:.1f} minutes in all"
    )
    return "\n".join(lines)


def film_before_after(
    run_dir: Path,
    env_runner: LIBEROEnvRunner,
    acting_before: ActingPolicy,
    acting_after: ActingPolicy,
    before: EvaluationResult,
    after: EvaluationResult,
) -> None:
    """Write before_after.mp4: both policies side by side on a few scored episodes, those mended by training first.

    Rollouts are deterministic, so filming one again shows the very episode that was scored.
    """
    from dataclasses import replace

    pairs = list(zip(before.episodes, after.episodes, strict=True))
    pairs.sort(key=lambda pair: pair[0].success - pair[1].success)
    rollouts = [replace(pair[0].rollout, record=VIDEO_EVERY) for pair in pairs[:VIDEO_EPISODES]]
    films = []
    for when, acting in (("before", acting_before), ("after", acting_after)):
        episodes = dict(env_runner.run_policy_in_env(acting, rollouts))
        films.append([_titled(episodes[index], when) for index in range(len(rollouts))])
    frames = []
    for left, right in zip(*films, strict=True):
        length = max(len(left), len(right))
        padded = [video + [video[-1]] * (length - len(video)) for video in (left, right)]
        gap = np.full((left[0].shape[0], 4, 3), 255, np.uint8)
        frames += [np.concatenate([a, gap, b], axis=1) for a, b in zip(*padded, strict=True)]
    write_video(run_dir / "before_after.mp4", frames, VIDEO_FPS)
    print(f"  {run_dir / 'before_after.mp4'}")


def _titled(episode: Episode, when: str) -> list[np.ndarray]:
    solved = "solved" if episode.success else "not solved"
    return captioned(episode.video, f"{when}: {solved} in {episode.steps} steps")


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
