"""What is left of a run for people: results.json and the table."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pi0.base.files import write_json
from pi0.base.stats import format_mean
from pi0.parallel.collected import RECENT
from pi0.parallel.config import Config, to_dict
from pi0.parallel.scorer import WAYS
from pi0.training.machine import machine


def results_table(facts: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Rows of means, each with its interval: scores before and after, and in training the first and the last episodes.

    The first row is the head.
    """
    rows = [["raw score", "before training", "after training"]]
    for how in WAYS:
        cells = [facts.get(when, {}).get(how, {}).get("scores", []) for when in ("before", "after")]
        if any(cells):
            rows.append([how, *map(format_mean, cells)])
    if scores := [score for metrics in history for score in metrics["scores"]]:
        rows.append(["first and last of training", *map(format_mean, (scores[:RECENT], scores[-RECENT:]))])
    return rows


def write_results(
    run_dir: Path,
    config: Config,
    facts: Mapping[str, Any],
    during: Sequence[Mapping[str, Any]],
    history: Sequence[Mapping[str, Any]],
) -> None:
    """Write results.json and print the table.

    Args:
        facts: with the scores `before` and `after`.
        during: `Scorer.during`.
        history: metrics of each update.
    """
    table = results_table(facts, history)
    results = {
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(sys.argv),
        "config": to_dict(config),
        "machine": machine(),
        "seconds": history[-1]["seconds"] if history else 0.0,
        "scores": {"before": facts.get("before", {}), "during": during, "after": facts.get("after", {})},
        "table": table,
        "history": history,
    }
    write_json(run_dir / "results.json", results)
    widths = [max(len(row[column]) for row in table) for column in range(3)]
    for row in table if len(table) > 1 else []:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    if history:
        last = history[-1]
        speed = last["steps"] / max(1e-9, last["seconds"])
        best = last["best_score"]
        print(
            f"{last['steps']:,} steps, {last['episodes']:,} episodes in {last['seconds'] / 60:.1f} minutes of training; "
            f"{speed:.0f} steps/s, {'no episode has ended' if best is None else f'best score {best:.0f}'}"
        )
    print(f"  {run_dir}")
