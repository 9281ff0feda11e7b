"""What does each stage cost over the one before, and two processes over one? Time of an iteration, side by side.

    python benchmarks/stages.py                         # about half an hour
    python benchmarks/stages.py --stages 12 13          # these two alone
    python benchmarks/stages.py --table outputs/stages.json

Every stage runs a short form of the quickstart's configuration, with the same states and noise, so with the same
episodes and updates. What a stage adds is switched on as a user has it (from stage 11 on: WandB offline, TensorBoard,
report; stage 12: statistics; stage 13: a checkpoint in every iteration). The last run is stage 13 on two processes,
which share the rollouts.

All runs are started together and take turns of a second. The others are paused meanwhile (SIGSTOP) with all processes
that they started. So a change of the machine's speed affects all alike. An iteration's time is the sum of its own
turns. When all runs have finished an iteration, all begin the next. The first iteration is not counted: it opens
scenes and imports modules of the optimizers.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from pi0.base.arguments import Collect, ranged
from pi0.base.errors import run_command
from pi0.base.files import read_json, write_json
from pi0.ranks.watch import SILENCE_S

CONFIG = "configs/quickstart.yaml"
ROLLOUTS = 32  # rollouts of an iteration, in all processes together
STAGES = {
    "08": "08_train_with_epochs.py",
    "09": "09_train_with_config.py",
    "10": "10_train_with_distributed.py",
    "11": "11_train_with_logging.py",
    "12": "12_train_with_dataset.py",
    "13": "13_train_production_ready.py",
    "two": "13_train_production_ready.py",
}
# Stage 08 has its settings in the file; this calls its `train` with others.
STAGE_08 = """
import runpy, sys
from pi0.ript.config import load_config
runpy.run_path(sys.argv[1])["train"](load_config(sys.argv[2], sys.argv[3:]))
"""
LARGEST_OVERHEAD = 3.0  # percent, the goal


def main() -> None:
    """Measure, save, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--iterations", type=ranged(int, low=1), default=12, help="measured iterations of each run"
    )
    parser.add_argument(
        "--stages", action=Collect, nargs="+", default=list(STAGES), choices=STAGES, help="two: two processes"
    )
    parser.add_argument("--seconds", type=ranged(float, above=0), default=1.0, help="length of a run's turn")
    parser.add_argument(
        "--override", action=Collect, nargs="*", default=[], help="further overrides for every run"
    )
    parser.add_argument("--output", default="outputs/stages.json")
    parser.add_argument("--table", help="only print the table of this file")
    options = parser.parse_args()
    if options.table is None:
        if options.iterations < 1:
            parser.error("at least one iteration is needed")
        if not 0 < options.seconds < SILENCE_S / len(STAGES):
            parser.error(
                f"--seconds {options.seconds}: ranks that are paused for {SILENCE_S:g} s count as dead"
            )
        seconds = measure(options.stages, options.iterations, options.seconds, options.override)
        Path(options.output).parent.mkdir(parents=True, exist_ok=True)
        write_json(Path(options.output), {"seconds": seconds})
    print(table(read_json(Path(options.table or options.output))["seconds"]))


def measure(names: list[str], iterations: int, turn: float, overrides: list[str]) -> dict[str, list[float]]:
    """Seconds of each iteration except the first, by run."""
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        runs = {}
        for name in names:
            runs[name] = Run(name, Path(folder) / name, iterations + 1, overrides)
            stack.callback(runs[name].kill)
            runs[name].pause()
        for number in range(iterations + 1):
            taken = dict.fromkeys(names, 0.0)
            going = names[:: 1 if number % 2 == 0 else -1]
            while going:
                ended = set()
                for name in going:
                    elapsed, done = runs[name].run_until(turn)
                    taken[name] += elapsed
                    ended |= {name} if done else set()
                going = [name for name in going if name not in ended]
            print(
                f"iteration {number}:", ", ".join(f"{name} {taken[name]:.2f} s" for name in names), flush=True
            )
            if number > 0:
                for name in names:
                    seconds[name].append(taken[name])
        for run in runs.values():
            run.end()
    return seconds


class Run:
    """A stage as a process that is paused most of the time."""

    def __init__(self, name: str, folder: Path, iterations: int, overrides: list[str]):
        processes = 2 if name == "two" else 1
        self.name, script = name, STAGES[name]
        settings = [
            f"output_dir={folder}",
            f"algo.data_batch_size={ROLLOUTS // processes}",
            f"training.num_train_steps={iterations}",
            "evaluation.episodes=2",
            "features.save_video=false",
            *overrides,
        ]
        if name == "08":
            command = ["-c", STAGE_08, script, CONFIG, *settings]
        else:
            command = [script, "--config_path", CONFIG, "--override", *settings]
        if processes > 1:
            launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
            command = [*launch, *command]
        folder.mkdir()
        self._errors = folder / "errors"
        with self._errors.open("wb") as errors:
            self._process = subprocess.Popen(
                [sys.executable, *command],
                cwd=ROOT,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
            )
        assert self._process.stdout is not None
        self._output = self._process.stdout.fileno()
        self._said = b""
        self._members = [self._process.pid]

    def run_until(self, limit: float) -> tuple[float, bool]:
        """Run until the next iteration ends, for at most `limit` seconds; returns the seconds, and whether it ended."""
        self._members = family(self._process.pid)
        self._signal(signal.SIGCONT)
        started = time.perf_counter()
        ended = False
        while not ended and (left := started + limit - time.perf_counter()) > 0:
            if select.select([self._output], [], [], left)[0]:
                said = os.read(self._output, 1 << 16)
                if not said:
                    self._fail()
                *lines, self._said = (self._said + said).split(b"\n")
                ended = any(line.startswith(b"iteration ") for line in lines)
        self.pause()
        return time.perf_counter() - started, ended

    def pause(self) -> None:
        """Pause it and the processes that it had at its last turn; a search for new ones would count as its time."""
        self._signal(signal.SIGSTOP)

    def end(self) -> None:
        """Let it run to its end."""
        self._members = family(self._process.pid)
        self._signal(signal.SIGCONT)
        self._process.communicate()
        if self._process.returncode:
            self._fail()

    def kill(self) -> None:
        """Kill all its processes, paused or not."""
        if self._process.poll() is None:  # else another process may have its id
            self._members = family(self._process.pid)
            self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        for process in self._members:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number)

    def _fail(self) -> NoReturn:
        sys.exit(f"stage {self.name} failed:\n{self._errors.read_text(errors='replace')[-3000:]}")


def family(process: int) -> list[int]:
    """A process and all its descendants, also those in other sessions, such as WandB's and torchrun's."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            with contextlib.suppress(OSError):  # it has just ended
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(folder.name))
    found = [process]
    for member in found:
        found += children.get(member, [])
    return found


def table(seconds: dict[str, list[float]]) -> str:
    """Markdown table: each stage against the one before in the same iteration."""
    from scipy.stats import quantile_test  # takes a second or two: not for `--help`

    lines = [
        "| stage | s an iteration, median (lowest to highest) | over the one before, median (95% interval) | goal |",
        "|---|---|---|---|",
    ]
    for before, name in zip([None, *seconds], seconds, strict=False):
        times = (
            f"{statistics.median(seconds[name]):.2f} ({min(seconds[name]):.2f} to {max(seconds[name]):.2f})"
        )
        label = "13 on two processes" if name == "two" else name
        if before is None:
            lines.append(f"| {label} | {times} | | |")
            continue
        change = [100 * (b / a - 1) for a, b in zip(seconds[before], seconds[name], strict=True)]
        low, high = quantile_test(change).confidence_interval(0.95)
        limits = "too few" if math.isnan(low) else f"{low:+.1f} to {high:+.1f}"
        share = f"{statistics.median(change):+.1f}% ({limits})"
        goal = "" if name == "two" else f"under {LARGEST_OVERHEAD:.0f}%"
        lines.append(f"| {label} | {times} | {share} | {goal} |")
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main)
