"""What does each stage cost over the one before, and two processes over one? Time of an iteration, side by side.

    python benchmarks/stages.py                         # about half an hour
    python benchmarks/stages.py --stages 12 13          # these two alone
    python benchmarks/stages.py --table outputs/stages.json

Every stage runs the quickstart's configuration, shortened: the same states, the same noise, so the same episodes and
updates, with what it adds switched on as a user has it (stage 11 on: WandB offline, TensorBoard, report; stage 12:
statistics; stage 13: a checkpoint in every iteration). All runs are started, and then take turns, an iteration each, forth
and back, while the others are paused (SIGSTOP): a machine that is now faster, now slower, is so for neighbours alike. The
first iteration is left out: it opens scenes and imports what optimizers need.

Ranks that are paused take each other for dead, so two processes run by themselves, after stage 13 by itself.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
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

from pi0.ript.report import write_json

CONFIG = "configs/quickstart.yaml"
ROLLOUTS = 32  # of an iteration, in all processes together
STAGES = {
    "08": "08_train_with_epochs.py",
    "09": "09_train_with_config.py",
    "10": "10_train_with_distributed.py",
    "11": "11_train_with_logging.py",
    "12": "12_train_with_dataset.py",
    "13": "13_train_production_ready.py",
}
ALONE, TWO_PROCESSES = "13 by itself", "13 on two processes"
# Stage 08 has its settings in the file; this is its `train` with others.
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
    parser.add_argument("--iterations", type=int, default=10, help="of each run that count")
    parser.add_argument(
        "--stages", nargs="+", default=[*STAGES, "two"], choices=[*STAGES, "two"], help="two: two processes"
    )
    parser.add_argument("--override", nargs="*", default=[], help="further overrides for every run")
    parser.add_argument("--output", default="outputs/stages.json")
    parser.add_argument("--table", help="only print the table of this file")
    options = parser.parse_args()
    if options.table is None:
        if options.iterations < 1:
            parser.error("at least one iteration is needed")
        together = [name for name in options.stages if name != "two"]
        alone = [[ALONE], [TWO_PROCESSES]] if "two" in options.stages else []
        seconds: dict[str, list[float]] = {}
        for names in [together, *alone]:
            seconds |= measure(names, options.iterations, options.override)
            Path(options.output).parent.mkdir(parents=True, exist_ok=True)
            write_json(Path(options.output), {"seconds": seconds})
    print(table(json.loads(Path(options.table or options.output).read_text())["seconds"]))


def measure(names: list[str], iterations: int, overrides: list[str]) -> dict[str, list[float]]:
    """Seconds of each iteration but the first, by run."""
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        runs = {}
        for name in names:
            runs[name] = Run(name, Path(folder) / name, iterations + 1, overrides, pause=len(names) > 1)
            stack.callback(runs[name].kill)
            runs[name].iteration()
        for number in range(iterations):
            for name in names[:: 1 if number % 2 == 0 else -1]:
                seconds[name].append(runs[name].iteration())
                print(f"iteration {number + 1}: {name}: {seconds[name][-1]:.2f} s", flush=True)
        for run in runs.values():
            run.end()
    return seconds


class Run:
    """A stage as a process, which is paused between its iterations."""

    def __init__(self, name: str, folder: Path, iterations: int, overrides: list[str], pause: bool):
        processes = 2 if name == TWO_PROCESSES else 1
        self.name, self._pause, script = name, pause, STAGES[name[:2]]
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
                text=True,
                start_new_session=True,
            )

    def iteration(self) -> float:
        """Seconds to the end of the next iteration."""
        assert self._process.stdout is not None
        started = time.perf_counter()
        os.killpg(self._process.pid, signal.SIGCONT)
        for line in self._process.stdout:
            if line.startswith("iteration "):
                if self._pause:
                    os.killpg(self._process.pid, signal.SIGSTOP)
                return time.perf_counter() - started
        self._fail()

    def end(self) -> None:
        """Let it come to its end."""
        os.killpg(self._process.pid, signal.SIGCONT)
        self._process.communicate()
        if self._process.returncode:
            self._fail()

    def kill(self) -> None:
        """Leave nothing behind, paused or not."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def _fail(self) -> NoReturn:
        sys.exit(f"stage {self.name} failed:\n{self._errors.read_text(errors='replace')[-3000:]}")


def table(seconds: dict[str, list[float]]) -> str:
    """Markdown table: each stage against the one before in the same turn."""
    lines = [
        "| stage | s an iteration, median (lowest to highest) | over the one before, median (middle half) | goal |",
        "|---|---|---|---|",
    ]
    for before, name in zip([None, *seconds], seconds, strict=False):
        times = (
            f"{statistics.median(seconds[name]):.2f} ({min(seconds[name]):.2f} to {max(seconds[name]):.2f})"
        )
        if before is None or name == ALONE:
            lines.append(f"| {name} | {times} | | |")
            continue
        change = [100 * (b / a - 1) for a, b in zip(seconds[before], seconds[name], strict=True)]
        low, _, high = statistics.quantiles(change, n=4) if len(change) > 1 else change * 3
        share = f"{statistics.median(change):+.1f}% ({low:+.1f} to {high:+.1f})"
        goal = "" if name == TWO_PROCESSES else f"under {LARGEST_OVERHEAD:.0f}%"
        lines.append(f"| {name} | {times} | {share} | {goal} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
