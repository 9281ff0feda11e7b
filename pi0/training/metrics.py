"""Metrics of a training step as a line of metrics.jsonl, in TensorBoard and in WandB.

A trainer declares its metrics (`pi0.report.declaration`).
"""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import wandb
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.summary_pb2 import Summary

from pi0.base.errors import OutputError
from pi0.base.files import write_whole
from pi0.training.settings import LoggingConfig


def append_line(path: Path, metrics: Mapping[str, Any]) -> None:
    """Add a line to a JSON-lines file, whole or not at all.

    Raises:
        OSError: the disk refuses, or has no room for all of the line.
    """
    line = (json.dumps(metrics) + "\n").encode()
    with path.open("ab", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        if file.write(line) != len(line):
            file.truncate(size)  # else the next line would continue this half
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def rewrite_metrics(run_dir: Path, history: Sequence[Mapping[str, Any]], evaluations: Sequence[Any]) -> None:
    """Write metrics.jsonl and metrics.json of a resumed run as they were at its checkpoint."""
    write_whole(run_dir / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in history))
    if evaluations or (run_dir / "metrics.json").exists():
        write_whole(run_dir / "metrics.json", json.dumps(evaluations, indent=1))


def count_lines(path: Path) -> int:
    """Lines of a JSON-lines file; 0 if there is none."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def require_rows(run_dir: Path, count: int) -> None:
    """Print how many rows metrics.jsonl has.

    Raises:
        OutputError: they are not `count`.
    """
    path = run_dir / "metrics.jsonl"
    recorded = count_lines(path)
    print(f"metrics recorded: {recorded} of {count} steps in {path}")
    if recorded != count:
        raise OutputError(f"{path} has {recorded} of {count} rows")


def start_wandb(settings: LoggingConfig, run_dir: Path, config: dict[str, Any]) -> wandb.Run | None:
    """Start or continue a WandB run: offline if online fails, none if that fails too. Failures are printed."""
    for mode in dict.fromkeys([settings.wandb_mode, "offline"]) if settings.use_wandb else []:
        try:
            run = wandb.init(
                project=settings.wandb_project,
                entity=settings.wandb_entity,
                name=run_dir.name,
                id=settings.wandb_run_id,
                resume="allow",
                mode=mode,
                dir=run_dir,
                config=config,
                # WandB must not wait for input; the run's own log has the console's output.
                settings=wandb.Settings(console="off", init_timeout=20, login_timeout=1, silent=True),
            )
        except (wandb.Error, OSError) as error:
            print(f"WandB {mode} is not available: {error}")
        else:
            upload = f"; upload it with: wandb sync {Path(run.dir).parent}" if mode == "offline" else ""
            run.define_metric("*", step_metric="step")  # a resumed run may return to an earlier step
            print(f"WandB initialised: {mode} run {run.id}{upload}")
            return run
    return None


def finish_wandb(run: wandb.Run | None, scores: Mapping[str, Sequence[bool]]) -> None:
    """End a WandB run with success rates and their counts in its summary; a failure is printed.

    Args:
        run: the WandB run; None: there is none to end.
        scores: outcomes of episodes by name, e.g. "before" and "after".
    """
    if run is None:
        return
    try:
        for name, outcomes in scores.items():
            counts = {f"{name}_successes": sum(outcomes), f"{name}_episodes": len(outcomes)}
            rate = {name: sum(outcomes) / len(outcomes)} if outcomes else {}
            run.summary.update(rate | counts)
        run.finish()
    except (OSError, wandb.Error) as error:
        print(f"WandB's run is not finished: {error}")


class TensorBoard:
    """An event file, written within the call: a full disk raises OSError here instead of blocking a thread.

    Args:
        folder: folder of the file, made with the first numbers.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._writer: EventsWriter | None = None

    def add(self, numbers: Mapping[str, float], step: int) -> None:
        """Write the numbers of a step.

        Raises:
            OSError: the disk refuses.
        """
        if self._writer is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._writer = EventsWriter(str(self._folder / "events"))
        values = [Summary.Value(tag=name, simple_value=value) for name, value in numbers.items()]
        self._writer.write_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))
        self._writer.flush()
