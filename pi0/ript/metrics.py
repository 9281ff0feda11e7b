"""Metrics of a training step as a line of metrics.jsonl, and as the flat names that WandB and TensorBoard take.

docs/metrics.md lists every metric with its unit.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def append_line(path: Path, metrics: Mapping[str, Any]) -> None:
    """Add a line to a JSON-lines file, in one write, so that a reader sees whole lines."""
    with path.open("a") as file:
        file.write(json.dumps(metrics) + "\n")


def flatten(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Numbers alone, nested names joined by `/`; for each task its success rate with both counts."""
    flat: dict[str, float] = {}
    for name, value in metrics.items():
        if name == "tasks":
            for task, (successes, rollouts) in value.items():
                flat[f"successes/{task}"] = successes
                flat[f"rollouts/{task}"] = rollouts
                if rollouts:
                    flat[f"success_rate/{task}"] = successes / rollouts
        elif isinstance(value, Mapping):
            flat |= {f"{name}/{inner}": number for inner, number in flatten(value).items()}
        elif isinstance(value, list):
            flat[name] = len(value)
        elif isinstance(value, int | float):
            flat[name] = value
    if metrics.get("rollouts"):
        flat["success_rate"] = metrics["successes"] / metrics["rollouts"]
    return flat
