"""Which parts take the time that stage 13 needs more than stage 12? Each part is measured in a run of stage 13.

    python benchmarks/stage13_parts.py                  # about 5 minutes

First it makes a run as in benchmarks/stages.py, the quickstart with 32 rollouts and a checkpoint in each iteration, and
times its functions from outside. Then, in the same process, it makes updates from the collected chunks: those of stage
12, of stage 13, and of stage 13 after memory was returned to the system. Returned memory costs most when it is needed
again. They take turns in random order.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import random
import runpy
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch

from pi0 import PI0Policy
from pi0.base.arguments import Collect, ranged
from pi0.base.errors import run_command
from pi0.training import checkpoint_store, memory
from pi0.training import state as training_state
from pi0.training.checkpoint_store import CheckpointStore
from pi0.training.state import TrainingState

SCRIPTS = ("12_train_with_dataset.py", "13_train_production_ready.py")
CONFIG = ROOT / "configs/quickstart.yaml"
ROLLOUTS = 32
CHUNKS = 96  # chunks of an update in the second table
# The parts that are timed, each with the part that contains it.
PARTS = {
    "checkpoint": "",
    "state of this rank": "checkpoint",
    "policy": "checkpoint",
    "other weights": "checkpoint",
    "optimizer": "checkpoint",
    "checksums": "checkpoint",
    "waiting for the disk": "checkpoint",
    "removing the oldest": "checkpoint",
    "copy of this rank's state": "",
    "are all weights finite": "",
    "giving memory back": "",
}


class Clock:
    """Seconds of each part, by iteration."""

    def __init__(self) -> None:
        self.seconds: list[dict[str, float]] = [defaultdict(float)]
        self.started: list[float] = []
        self.last_update: tuple = ()
        self._running: list[str] = []

    def timed(self, part: str, function: Callable) -> Callable:
        """`function` with its time counted for `part`, but only inside the part that contains it."""

        @functools.wraps(function)
        def inner(*args: Any, **kwargs: Any) -> Any:
            if PARTS[part] and PARTS[part] not in self._running:
                return function(*args, **kwargs)
            self._running.append(part)
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[-1][part] += time.perf_counter() - started
                self._running.pop()

        return inner

    def iteration(self, function: Callable) -> Callable:
        """`function`, whose call begins an iteration."""

        @functools.wraps(function)
        def inner(*args: Any, **kwargs: Any) -> Any:
            self.seconds.append(defaultdict(float))
            self.started.append(time.perf_counter())
            return function(*args, **kwargs)

        return inner

    def update(self, function: Callable) -> Callable:
        """`function`, whose last arguments are kept."""

        @functools.wraps(function)
        def inner(*args: Any) -> Any:
            self.last_update = args
            return function(*args)

        return inner


def main() -> None:
    """Run, print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--iterations",
        type=ranged(int, low=1),
        default=7,
        help="iterations of the run; the first is not counted",
    )
    parser.add_argument("--turns", type=ranged(int, low=1), default=40, help="updates of each kind")
    parser.add_argument(
        "--override", action=Collect, nargs="*", default=[], help="further overrides for the run"
    )
    options = parser.parse_args()
    if options.iterations < 3 or options.turns < 2:
        parser.error("at least three iterations and two turns are needed")
    clock = Clock()
    before, stage = (runpy.run_path(str(ROOT / script))["main"].__globals__ for script in SCRIPTS)
    for name, part in {
        "save_checkpoint": "checkpoint",
        "weights_are_finite": "are all weights finite",
        "release": "giving memory back",
    }.items():
        stage[name] = clock.timed(part, stage[name])
    stage["distributed_collect_batches"] = clock.iteration(stage["distributed_collect_batches"])
    stage["update_policy"] = clock.update(update := stage["update_policy"])
    for owner, name, part in (
        (TrainingState, "begin", "copy of this rank's state"),
        (PI0Policy, "save_pretrained", "policy"),
        (training_state, "write_tensors", "other weights"),
        (checkpoint_store, "_sha256", "checksums"),
        (checkpoint_store, "_sync", "waiting for the disk"),
        (CheckpointStore, "_prune", "removing the oldest"),
    ):
        setattr(owner, name, clock.timed(part, getattr(owner, name)))
    save_optimizer = clock.timed("optimizer", training_state.save_state)
    save_rank = clock.timed("state of this rank", training_state.save_state)
    training_state.save_state = lambda path, state: (
        save_optimizer(path, state) if path.stem == "optimizer" else save_rank(path, state)
    )
    with tempfile.TemporaryDirectory() as folder:
        sys.argv = [
            SCRIPTS[1],
            "--config_path",
            str(CONFIG),
            "--override",
            f"output_dir={folder}",
            f"algo.data_batch_size={ROLLOUTS}",
            f"training.num_train_steps={options.iterations}",
            "evaluation.episodes=2",
            "features.save_video=false",
            *options.override,
        ]
        stage["main"]()
    config, learner, batch, *rest = clock.last_update
    few = batch[torch.randperm(len(batch), generator=learner.generator)[:CHUNKS]]
    shared = (config, learner, few)
    kinds = {
        "stage 12": lambda: before["update_policy"](*shared),
        "stage 13": lambda: update(*shared, *rest),
        "stage 13, memory given back before": lambda: update(*shared, *rest),
    }
    updates: dict[str, list[float]] = {name: [] for name in kinds}
    with contextlib.redirect_stderr(io.StringIO()):  # progress bars
        for _ in range(options.turns + 1):
            for name in random.sample(list(kinds), len(kinds)):
                if name.endswith("before"):
                    memory.release()
                started = time.perf_counter()
                kinds[name]()
                updates[name].append(time.perf_counter() - started)
    print(parts_table(clock, stage["RELEASE_EVERY"]))
    print(updates_table({name: times[1:] for name, times in updates.items()}))


def parts_table(clock: Clock, release_every: int) -> str:
    """Markdown table: seconds of each part in an iteration; memory is given back every `release_every`."""
    iterations = clock.seconds[2:-1]
    length = statistics.median(b - a for a, b in zip(clock.started[1:], clock.started[2:], strict=False))
    lines = [
        f"An iteration: {length:.2f} s (median of {len(iterations)})\n",
        "| part | s, median (lowest to highest) | of an iteration |",
        "|---|---|---|",
    ]
    for part, whole in PARTS.items():
        often = release_every if part == "giving memory back" else 1
        taken = [
            seconds[part] for seconds in (clock.seconds[1:] if often > 1 else iterations) if seconds[part]
        ]
        median = statistics.median(taken)
        label = f"of it: {part}" if whole else part + (f", one iteration in {often}" if often > 1 else "")
        share = 100 * median / length / often
        lines.append(f"| {label} | {median:.3f} ({min(taken):.3f} to {max(taken):.3f}) | {share:.2f}% |")
    return "\n".join(lines) + "\n"


def updates_table(updates: dict[str, list[float]]) -> str:
    """Markdown table: seconds of each kind of update, against the first of the same turn."""
    lines = [
        "| update of | s, median | over the first in the same turn, median (middle half) |",
        "|---|---|---|",
    ]
    first = next(iter(updates.values()))
    for name, times in updates.items():
        change = [100 * (b / a - 1) for a, b in zip(first, times, strict=True)]
        low, _, high = statistics.quantiles(change, n=4)
        share = "" if times is first else f"{statistics.median(change):+.1f}% ({low:+.1f} to {high:+.1f})"
        lines.append(f"| {name} | {statistics.median(times):.3f} | {share} |")
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main)
