"""Does the memory of a run stay constant, and which phases took its time? Tables from its metrics.jsonl.

The tables have means, and lowest to highest, of parts of the run:

    python benchmarks/run_memory.py outputs/RUN             # iterations from the third on, in thirds
    python benchmarks/run_memory.py outputs/RUN --first 3 --parts 2
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from pi0.base.arguments import ranged
from pi0.base.errors import run_command
from pi0.report.record import read_run
from pi0.ript.metrics import METRICS


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of a run of stage 11 or later")
    parser.add_argument("--first", type=ranged(int, low=0), default=2, help="first iteration that counts")
    parser.add_argument(
        "--parts", type=ranged(int, low=1), default=3, help="number of parts of the other iterations"
    )
    options = parser.parse_args()
    rows = [row for row in read_run(options.run, METRICS).steps if "memory" in row]
    size = (len(rows) - options.first) // options.parts
    if options.first < 1 or options.parts < 2 or size < 1:
        parser.error(f"{len(rows)} iterations cannot be divided so")
    starts = [options.first + part * size for part in range(options.parts)]
    means = []
    print("Resident memory, MB, means and in brackets lowest to highest:\n")
    print("| iterations | trainer | workers | together |\n|---|---|---|---|")
    for start, stop in zip([0, *starts], [*starts, len(rows)], strict=True):
        trainer, workers = (
            [row["memory"][key] for row in rows[start:stop]] for key in ("rss_mb", "workers_mb")
        )
        together = [sum(pair) for pair in zip(trainer, workers, strict=True)]
        means.append(statistics.mean(together))
        print(
            f"| {start} to {stop - 1} | {statistics.mean(trainer):,.0f} | {statistics.mean(workers):,.0f} "
            f"| {means[-1]:,.0f} ({min(together):,.0f} to {max(together):,.0f}) |"
        )
    print(f"\nThe last part over the first that counts: {100 * (means[-1] / means[1] - 1):+.1f}%")
    phases = {name: sum(row["phases"][name] for row in rows) for name in rows[0]["phases"]}
    total = sum(phases.values())
    print("Time: " + ", ".join(f"{name} {100 * seconds / total:.0f}%" for name, seconds in phases.items()))
    counts = {
        key: sum(row.get(key, 0) for row in rows) for key in ("rollouts", "successes", "dropped_groups")
    }
    print(f"{len(rows)} iterations, " + ", ".join(f"{value:,} {name}" for name, value in counts.items()))


if __name__ == "__main__":
    run_command(main)
