"""What does each stage cost over the one before, and two processes over one? Time of an iteration, side by side.

    python benchmarks/stages.py                         # about 15 minutes on a quiet machine
    python benchmarks/stages.py --stages 12 13          # these two alone
    python benchmarks/stages.py --table outputs/stages.json

Every stage runs the quickstart's configuration, shortened: the same states, the same noise, so the same episodes and
updates, with what it adds switched on as a user has it (stage 11 on: WandB offline, TensorBoard, report; stage 12:
statistics; stage 13: a checkpoint in every iteration). Stages take turns, forth and back, and are compared within a
turn. The first iteration of a run is left out: it opens scenes and imports what optimizers need.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

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
TWO_PROCESSES = "13 on two processes"
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
    parser.add_argument("--turns", type=int, default=3, help="runs of each stage")
    parser.add_argument(
        "--stages", nargs="+", default=[*STAGES, "two"], choices=[*STAGES, "two"], help="two: two processes"
    )
    parser.add_argument("--iterations", type=int, default=4, help="of each run; the first is not counted")
    parser.add_argument("--output", default="outputs/stages.json")
    parser.add_argument("--table", help="only print the table of this file")
    options = parser.parse_args()
    if options.table is None:
        if options.turns < 1 or options.iterations < 2:
            parser.error("at least one turn of two iterations is needed")
        seconds: dict[str, list[float]] = {
            TWO_PROCESSES if name == "two" else name: [] for name in options.stages
        }
        for turn in range(options.turns):
            for name in list(seconds)[:: 1 if turn % 2 == 0 else -1]:
                seconds[name].append(time_of_an_iteration(name, options.iterations))
                print(f"turn {turn}: stage {name}: {seconds[name][-1]:.2f} s an iteration", flush=True)
                Path(options.output).parent.mkdir(parents=True, exist_ok=True)
                write_json(Path(options.output), {"iterations": options.iterations, "seconds": seconds})
    print(table(json.loads(Path(options.table or options.output).read_text())["seconds"]))


def time_of_an_iteration(name: str, iterations: int) -> float:
    """Seconds, mean of all iterations of a run but the first."""
    processes = 2 if name == TWO_PROCESSES else 1
    with tempfile.TemporaryDirectory() as folder:
        overrides = [
            f"output_dir={folder}",
            f"algo.data_batch_size={ROLLOUTS // processes}",
            f"training.num_train_steps={iterations + 1}",
            "evaluation.episodes=2",
            "features.save_video=false",
        ]
        script = STAGES[name[:2]]
        if name == "08":
            command = ["-c", STAGE_08, script, CONFIG, *overrides]
        else:
            command = [script, "--config_path", CONFIG, "--override", *overrides]
        if processes > 1:
            command = [
                "-m",
                "torch.distributed.run",
                "--standalone",
                f"--nproc_per_node={processes}",
                *command,
            ]
        done = subprocess.run(
            [sys.executable, *command], cwd=ROOT, check=False, capture_output=True, text=True
        )
        if done.returncode:
            sys.exit(f"stage {name} failed:\n{done.stderr[-3000:]}")
        (results,) = Path(folder).glob("*/results.json")
        # Taken when an iteration's rollouts are collected: from one to the next lie an update and a collection.
        moments = [row["seconds"] for row in json.loads(results.read_text())["history"]]
    return (moments[-1] - moments[0]) / (len(moments) - 1)


def table(seconds: dict[str, list[float]]) -> str:
    """Markdown table: each stage against the one before in the same turn."""
    lines = [
        "| stage | s an iteration, median (lowest to highest) | over the one before, median (lowest to highest) | goal |",
        "|---|---|---|---|",
    ]
    for before, name in zip([None, *seconds], seconds, strict=False):
        times = (
            f"{statistics.median(seconds[name]):.2f} ({min(seconds[name]):.2f} to {max(seconds[name]):.2f})"
        )
        if before is None:
            lines.append(f"| {name} | {times} | | |")
            continue
        change = [100 * (b / a - 1) for a, b in zip(seconds[before], seconds[name], strict=False)]
        share = f"{statistics.median(change):+.1f}% ({min(change):+.1f} to {max(change):+.1f})"
        goal = "" if name == TWO_PROCESSES else f"under {LARGEST_OVERHEAD:.0f}%"
        lines.append(f"| {name} | {times} | {share} | {goal} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
