"""Metrics of a trainer. Each is declared once: its unit, how ranks merge it and where it is shown."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pi0.base.files import write_whole

FILE = "metrics_declared.json"  # in a run's folder
SUCCESS = "success (%), 95% interval"  # the axis of success rates


@dataclass(frozen=True)
class Curve:
    """How a plot shows a metric.

    Attributes:
        plot: name of the plot.
        axis: label of the y axis. Curves of a plot with the same axis share it; axes lie below each other.
        label: name in the legend; empty if the axis is clear enough.
        style: "line"; "area", on top of the areas declared before it; "band", a distribution's mean, deviation and
            range; "success", rates of counts by task with their intervals.
        part: key of the value that is shown, for a metric that is a dictionary.
        scale: factor of the values.
        less: name of a metric that is subtracted.
        color: a name in `pi0.report.figures.COLORS`; empty takes the plot's next.
        span: ends of the axis; an upper end of None fits the values.
        limit: key of the configuration whose value is drawn as a horizontal line, and the line's label.
    """

    plot: str
    axis: str
    label: str = ""
    style: Literal["line", "area", "band", "success"] = "line"
    part: str = ""
    scale: float = 1.0
    less: str = ""
    color: str = ""
    span: tuple[float, float | None] | None = None
    limit: tuple[str, str] | None = None


@dataclass(frozen=True)
class Metric:
    """A value in a line of metrics.jsonl.

    Attributes:
        name: its keys joined by `/`: "loss", "phases/update". A dictionary may be declared as one metric.
        unit: unit of the value; for a list of counts, what it counts.
        meaning: one line.
        merge: how the values of several ranks become one. "first" takes rank 0's, "sum" also joins lists, "max" takes
            the greatest, "by task" adds the counts of each task, "distribution" merges all values. The name of another
            metric takes the value of the rank where that metric is greatest.
        curves: where plots show it.
        column: title in the table of steps; empty for no column.
        format: format of the number, a specification of Python's `format`, or "duration" for seconds.
        tile: title of a tile at the top of the page that summarises the latest steps.
        trouble: for a list of lines: the text before each line on the page, and the text if there are none.
        note: sentence below the table of tasks if the sum over steps is not 0; `{}` is that sum with its unit.
        flat: for counts by task: their names in WandB and TensorBoard, where `/*` is the task. With a `rate` the first
            two are successes and trials. Without `/*` they name the metrics with the counts of all tasks.
        rate: name of the success rate in WandB and TensorBoard.
    """

    name: str
    unit: str
    meaning: str
    merge: str = "first"
    curves: tuple[Curve, ...] = ()
    column: str = ""
    format: str = ""
    tile: str = ""
    trouble: tuple[str, str] | None = None
    note: str = ""
    flat: tuple[str, ...] = ()
    rate: str = ""

    @property
    def totals(self) -> tuple[str, ...]:
        """Names of the metrics with the counts of all tasks."""
        return self._named("")

    def numbers(self, counts: Sequence[float], task: str) -> dict[str, float]:
        """Counts of a task ("/NAME") or of all ("") by their flat names, with their rate if there was a trial."""
        flat = dict(zip(self._named(task), counts, strict=True))
        return flat | ({self.rate + task: counts[0] / counts[1]} if self.rate and counts[1] else {})

    def _named(self, task: str) -> tuple[str, ...]:
        return tuple(name.replace("/*", task) for name in self.flat)


@dataclass(frozen=True)
class Plot:
    """A plot of the page: file name, title, and a label for evaluations if it shows them."""

    name: str
    title: str
    evaluations: str = ""


@dataclass(frozen=True)
class Declaration:
    """Everything that a trainer's runs record, and how their page shows it.

    Attributes:
        plots: plots in the page's order; the first is the learning curve.
        metrics: all metrics.
        planned: key of the configuration with the number of training steps.

    Raises:
        ValueError: two metrics have the same name, or a metric names a plot or a merge that is not declared.
    """

    plots: tuple[Plot, ...]
    metrics: tuple[Metric, ...]
    planned: str = "training.num_train_steps"

    def __post_init__(self) -> None:
        merges, plots = {*MERGES, *self._metric}, {plot.name for plot in self.plots}
        for metric in self.metrics:
            if self._metric[metric.name] is not metric or metric.merge not in merges:
                raise ValueError(
                    f"{metric.name} is declared twice, or merged by {metric.merge}, which is unknown"
                )
            if any(curve.plot not in plots for curve in metric.curves):
                raise ValueError(f"{metric.name} is shown in a plot that is not declared")

    @cached_property
    def _metric(self) -> dict[str, Metric]:
        return {metric.name: metric for metric in self.metrics}

    @property
    def success(self) -> Metric | None:
        """The metric with successes in training by task; None for a trainer without one."""
        return next((metric for metric in self.metrics if metric.rate), None)

    def undeclared(self, metrics: Mapping[str, Any], prefix: str = "") -> list[str]:
        """Names of a step's metrics that are not declared."""
        names = []
        for name, value in ((prefix + key, value) for key, value in metrics.items()):
            if name not in self._metric:
                names += self.undeclared(value, f"{name}/") if isinstance(value, Mapping) else [name]
        return names

    def merge(self, parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Merge the metrics of several ranks.

        Raises:
            ValueError: a metric is not declared.
        """
        if names := self.undeclared(parts[0]):
            raise ValueError(f"not declared, so it is unknown how ranks merge it: {', '.join(names)}")

        def merged(values: Sequence[Any], name: str) -> Any:
            if name not in self._metric:
                return {key: merged([value[key] for value in values], f"{name}/{key}") for key in values[0]}
            how = self._metric[name].merge
            return (
                MERGES[how](values)
                if how in MERGES
                else values[int(np.argmax([part[how] for part in parts]))]
            )

        return {name: merged([part[name] for part in parts], name) for name in parts[0]}

    def flatten(self, metrics: Mapping[str, Any]) -> dict[str, float]:
        """The numbers for WandB and TensorBoard: nested names are joined by `/`, lists are counted.

        Numbers that are not declared are included, so that a long run does not lose them; tests find them with
        `undeclared`.
        """
        flat: dict[str, float] = {}
        for name, value in metrics.items():
            if name in self._metric and self._metric[name].flat:
                for task, counts in value.items():
                    flat |= self._metric[name].numbers(counts, f"/{task}")
            else:
                flat |= _numbers(name, value)
        if self.success and all(name in metrics for name in self.success.totals):
            flat |= self.success.numbers([metrics[name] for name in self.success.totals], "")
        return flat

    def write(self, run_dir: Path) -> None:
        """Write the declaration into a run's folder.

        Raises:
            OSError: the disk refuses.
        """
        content = json.dumps(asdict(self), indent=1).encode()
        path = run_dir / FILE
        if not path.exists() or path.read_bytes() != content:
            write_whole(path, content)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Declaration:
        """The declaration that `write` wrote.

        Raises:
            TypeError, KeyError, ValueError: `content` is something else.
        """
        metrics = [
            Metric(**_tuples(item | {"curves": [Curve(**_tuples(curve)) for curve in item["curves"]]}))
            for item in content["metrics"]
        ]
        return cls(tuple(Plot(**item) for item in content["plots"]), tuple(metrics), content["planned"])


def distribution(values: Sequence[float]) -> dict[str, float]:
    """Count, mean, standard deviation, extremes, and the share above zero; all 0 if there are no values."""
    array = np.array(values if len(values) else [0.0])
    return {
        "count": len(values),
        "mean": float(array.mean()),
        "std": float(array.std()),
        "min": float(array.min()),
        "max": float(array.max()),
        "positive": float((array > 0).mean()),
    }


def _merge_distributions(parts: Sequence[dict[str, float]]) -> dict[str, float]:
    filled = [part for part in parts if part["count"]] or parts[:1]
    counts = [max(1, part["count"]) for part in filled]
    mean, positive = (
        float(np.average([part[name] for part in filled], weights=counts)) for name in ("mean", "positive")
    )
    squares = np.average([part["std"] ** 2 + part["mean"] ** 2 for part in filled], weights=counts)
    return {
        "count": sum(part["count"] for part in filled),
        "mean": mean,
        "std": float(np.sqrt(max(0.0, squares - mean**2))),
        "min": min(part["min"] for part in filled),
        "max": max(part["max"] for part in filled),
        "positive": positive,
    }


def _add_by_task(values: Sequence[dict[str, list[int]]]) -> dict[str, list[int]]:
    tasks = sorted({task for counts in values for task in counts})
    return {
        task: [sum(pair) for pair in zip(*(counts[task] for counts in values if task in counts), strict=True)]
        for task in tasks
    }


MERGES: dict[str, Callable[[Sequence[Any]], Any]] = {
    "first": lambda values: values[0],
    "sum": lambda values: sum(values[1:], start=values[0]),
    "max": max,
    "by task": _add_by_task,
    "distribution": _merge_distributions,
}


def _numbers(name: str, value: Any) -> dict[str, float]:
    if isinstance(value, Mapping):
        return {
            flat: n for key, inner in value.items() for flat, n in _numbers(f"{name}/{key}", inner).items()
        }
    if isinstance(value, list):
        return {name: len(value)}
    return {name: value} if isinstance(value, int | float) else {}


def _tuples(item: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in item.items()}
