"""Results of a run for people: results.json, a table and a learning curve."""

from __future__ import annotations

import sys
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from pi0.base.files import write_json
from pi0.base.stats import format_rate, paired_difference
from pi0.libero.evaluation import EvaluationResult, describe_broken, paired_outcomes, refuse_broken
from pi0.report.html_report import write_html_report, write_learning_curve
from pi0.ript.metrics import METRICS
from pi0.training.machine import machine


def write_report(
    run_dir: Path,
    config: dict[str, Any],
    before: EvaluationResult,
    after: EvaluationResult,
    history: list[dict[str, Any]],
    seconds: float,
    missing: Collection[str] = (),
) -> None:
    """Write results.json and learning_curve.png into `run_dir` and print the table.

    Args:
        run_dir: the run's folder.
        config: the run's configuration.
        before, after: scores before and after training, on the same states and noise.
        history: metrics of each iteration.
        seconds: wall time of the run so far.
        missing: names of results in `run_dir` that were not written, or not for the last time (`Outputs`).
    """
    pairs = paired_outcomes(before, after)
    change = paired_difference(*pairs) if pairs[0] else None
    results = {
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(sys.argv),
        "config": config,
        "protocol": before.protocol,
        "protocol_after": after.protocol,
        "machine": machine(),
        "seconds": seconds,
        "before": before.score(),
        "after": after.score(),
        "change": change
        and {
            "n": change.n,
            "difference": change.difference,
            "interval_95": [change.low, change.high],
            "mcnemar_p": change.p_value,
        },
        "history": history,
    }
    print(results_table(results))
    write_json(run_dir / "results.json", results)
    curve = write_learning_curve(run_dir, METRICS)
    written = [name for name in ("results.json", "policy", "config.yaml") if name not in missing]
    there = [run_dir / name for name in [*written, *([curve.name] if curve else [])]]
    print("\n".join(f"  {path}" for path in there if path.exists()))


def write_page(run_dir: Path) -> None:
    """Write report.html of a run, and print its place."""
    print(f"  {write_html_report(run_dir, METRICS)}")


def results_table(results: dict[str, Any]) -> str:
    """Success before and after, per task and in all, on the same states and noise.

    A task whose goal has several conditions also has a row for each of those.
    """

    def row(name: str, cells: list[dict[str, Any]]) -> tuple[str, ...]:
        return name, *(format_rate(cell["successes"], cell["episodes"]) for cell in cells)

    rows: list[tuple[str, ...]] = [("", "before", "after")]
    for name in results["before"]["tasks"]:
        cells = [results[when]["tasks"][name] for when in ("before", "after")]
        rows.append(row(name.replace("_", " "), cells))
        conditions = [cell.get("conditions", {}) for cell in cells]
        for words in conditions[0]:
            if words in conditions[1]:
                rows.append(row(f"  {words}", [each[words] for each in conditions]))
    rows.append(row("all tasks", [results[when] for when in ("before", "after")]))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    for when in ("before", "after"):
        if broken := results[when]["broken"]:
            lines.append(f"{when}: {describe_broken(broken, len(results[when]['outcomes']))}")
    if change := results["change"]:
        low, high = change["interval_95"]
        lines.append(
            f"change: {100 * change['difference']:+.1f} percentage points "
            f"(95% interval {100 * low:+.1f} to {100 * high:+.1f}, paired on the same states and noise; "
            f"exact McNemar p = {change['mcnemar_p']:.2g})"
        )
    else:
        lines.append("change: not known, no episode ran to its end both before and after")
    lines.append(
        f"evaluation states are LIBERO's recorded ones, never trained on; {results['seconds'] / 60:.1f} minutes in all"
    )
    return "\n".join(lines)


def check_machine(before: EvaluationResult, after: EvaluationResult, history: list[dict[str, Any]]) -> None:
    """End a run with an error, after all its results are written, if much of what it stands on broke.

    Raises:
        BrokenSimulationsError: of the episodes of a score, or of all rollouts, more than a tenth broke.
    """
    for when, score in (("score before", before), ("score after", after)):
        refuse_broken(when, score.broken, len(score.episodes))
    broken = [line.partition(": ")[2] for metrics in history for line in metrics["failed_rollouts"]]
    refuse_broken("rollouts", broken, sum(metrics["rollouts"] for metrics in history) + len(broken))


def summarize(metrics: dict[str, Any]) -> str:
    """A line about an iteration."""
    learned = "nothing to learn from"
    if "updates" in metrics:
        learned = f"{metrics['updates']} updates, loss {metrics.get('loss', np.nan):.4f}"
    solved = f"{metrics['successes']} of {metrics['rollouts']} solved"
    return f"iteration {metrics['step']}: {solved}, {learned}"
