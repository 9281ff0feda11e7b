"""What a trainer records: each metric is declared once, with its unit, how ranks merge it and where it is shown."""

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
        axis: label of the y axis. Curves of a plot that name the same axis share it; axes lie below each other.
        label: in the legend; empty where the axis says enough.
        style: "line"; "area", on top of the areas declared before it; "band", a distribution's mean, deviation and
            range; "success", rates of counts by task with their intervals.
        part: of a metric that is a dictionary, the value that is shown.
        scale: what values are multiplied with.
        less: a metric that is subtracted.
        color: a name in `pi0.report.figures.COLORS`; empty for the plot's next.
        span: ends of the axis; an upper end of None fits what is shown.
        limit: key of the configuration whose value is drawn across, and its label.
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
        unit: of the value; of a list of counts, what they are.
        meaning: one line.
        merge: how the values of several ranks become one. "first" takes rank 0's, "sum" joins lists as well, "max" takes
            the greatest, "by task" adds the counts of each task, "distribution" gives that of all values together;
            another metric's name takes the value of the rank where that one is greatest.
        curves: where plots show it.
        column: title in the table of steps; empty for no column.
        format: of the number as text, in `format`'s language, or "duration" for seconds.
        tile: title of a tile at the head of the page that sums up the latest steps.
        trouble: of a list of lines, what stands before each on the page, and what the page says if there are none.
        note: sentence below the table of tasks where the sum over steps is not 0; `{}` is that sum with its unit.
        flat: of counts by task, their names in WandB and TensorBoard, where `/*` is the task. The first two are
            successes and trials if there is a `rate`; without `/*` they name the metrics with the counts of all tasks.
        rate: name of successes by trials in WandB and TensorBoard.
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
        """Counts of a task ("/NAME") or of all ("") under their flat names, with their rate if there was a trial."""
        flat = dict(zip(self._named(task), counts, strict=True))
        return flat | ({self.rate + task: counts[0] / counts[1]} if self.rate and counts[1] else {})

    def _named(self, task: str) -> tuple[str, ...]:
        return tuple(name.replace("/*", task) for name in self.flat)


@dataclass(frozen=True)
class Plot:
    """A plot of the page: its file's name, its title, and a label for evaluations if it shows them."""

    name: str
    title: str
    evaluations: str = ""


@dataclass(frozen=True)
class Declaration:
    """Everything that a trainer's runs record, and how their page shows it.

    Attributes:
        plots: in the page's order; the first is the learning curve.
        planned: key of the configuration with the number of training steps.

    Raises:
        ValueError: two metrics have the same name, or one names what is not declared.
    """

    plots: tuple[Plot, ...]
    metrics: tuple[Metric, ...]
    planned: str = "training.num_train_steps"

    def __post_init__(self) -> None:
        merges, plots = {*MERGES, *self._metric}, {plot.name for plot in self.plots}
        for metric in self.metrics:
            if self._metric[metric.name] is not metric or metric.merge not in merges:
                raise ValueError(
                    f"{metric.name} is declared twice, or merged by {metric.merge}, which is not known"
                )
            if any(curve.plot not in plots for curve in metric.curves):
                raise ValueError(f"{metric.name} is shown in a plot that is not declared")

    @cached_property
    def _metric(self) -> dict[str, Metric]:
        return {metric.name: metric for metric in self.metrics}

    @property
    def success(self) -> Metric | None:
        """Counts by task of what succeeded in training; None for a trainer that has none."""
        return next((metric for metric in self.metrics if metric.rate), None)

    def undeclared(self, metrics: Mapping[str, Any], prefix: str = "") -> list[str]:
        """Names in a step's metrics that are not declared."""
        names = []
        for name, value in ((prefix + key, value) for key, value in metrics.items()):
            if name not in self._metric:
                names += self.undeclared(value, f"{name}/") if isinstance(value, Mapping) else [name]
        return names

    def merge(self, parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Metrics of several ranks as one.

        Raises:
            ValueError: one of them is not declared.
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
        """The numbers for WandB and TensorBoard: nested names joined by `/`, lists counted.

        A number that is not declared is among them, so that a long run loses nothing by it; tests find it with
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
        """Keep the declaration in a run's folder.

        Raises:
            OSError: the disk refuses.
        """
        content = json.dumps(asdict(self), indent=1).encode()
        path = run_dir / FILE
        if not path.exists() or path.read_bytes() != content:
            write_whole(path, content)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Declaration:
        """What `write` wrote.

        Raises:
            TypeError, KeyError, ValueError: it is something else.
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
