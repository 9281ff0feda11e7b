"""What is left of a run for people: results.json and the table."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pi0.base.files import write_json
from pi0.base.stats import paired_difference
from pi0.libero.evaluation import EvaluationResult, paired_outcomes
from pi0.training.machine import machine


def write_results(
    run_dir: Path,
    config: Mapping[str, Any],
    before: EvaluationResult,
    after: Mapping[str, EvaluationResult],
    history: Sequence[Mapping[str, Any]],
    seconds: float,
    earlier: Mapping[str, float],
) -> None:
    """Write results.json and print the table.

    Args:
        run_dir: the run's folder.
        config: the run's configuration.
        before: score of the starting policy.
        after: scores by the way of acting, on the same states and noise; the last one is the best of N.
        history: metrics of each iteration.
        seconds: wall time of the run, without scores.
        earlier: the same when each of the scores in `after` was made that came before the end.
    """
    rows = [["", "success", "change, paired"], ["before", str(before), ""]]
    for name, score in after.items():
        when = "" if name in earlier else "after, "
        rows.append([f"{when}{name}", str(score), str(paired_difference(*paired_outcomes(before, score)))])
    results = {
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(sys.argv),
        "config": config,
        "protocol": before.protocol,
        "machine": machine(),
        "seconds": seconds,
        "before": before.score(),
        "after": list(after.values())[-1].score(),
        "minutes": {name: earlier.get(name, seconds) / 60 for name in after},
        "scores": {name: score.score() for name, score in after.items()},
        "table": rows,
        "history": history,
    }
    write_json(run_dir / "results.json", results)
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print(f"{seconds / 60:.1f} minutes\n  {run_dir}")
