"""The plots of a run: declared metrics over training steps, and success by task."""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from pi0.base.stats import format_rate
from pi0.report.declaration import SUCCESS, Curve, Metric, Plot
from pi0.report.figures import (
    COLORS,
    INK,
    MAX_POINTS,
    STYLE,
    add_legend,
    means,
    new_figure,
    percent,
    pooled,
    render,
    shorten,
    stack,
    step_axis,
)
from pi0.report.record import Row, RunRecord, evaluation_counts, value

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_ERROR_BARS = 20  # a line with a band is clearer for more
MAX_OVERLAID_TASKS = 3  # more curves with intervals in one plot hide each other
MAX_TASK_PANELS = 20  # the page's table has the other tasks
PANEL_POINTS = 25
# Heights in inches: a single axis; one of several axes, with much on it or with a line; the space around them; and the
# legend of success, which names tasks.
ONLY, TALL, LOW, AROUND, TASKS = 2.2, 1.9, 1.15, 0.5, 0.6


@dataclass(frozen=True)
class Picture:
    """A plot for a page and for a file.

    Attributes:
        name: file name without ending.
        svg: an <svg> element with its alternative text.
        png: a PNG file's bytes.
    """

    name: str
    title: str
    svg: str
    png: bytes


Drawing = Callable[[RunRecord], "tuple[Figure, str] | None"]


def draw_pictures(record: RunRecord) -> list[Picture]:
    """Every picture that the run has data for: the first plot, success by task, the other plots."""
    first, *others = [
        (plot.name, plot.title, partial(_draw_plot, plot=plot)) for plot in record.declaration.plots
    ]
    drawings: list[tuple[str, str, Drawing]] = [
        first,
        ("success_by_task", "Success by task", draw_success_by_task),
        ("practice_by_task", "Practice by task", draw_practice_by_task),
        *others,
    ]
    return [picture for drawing in drawings if (picture := _draw(record, *drawing))]


def draw_learning_curve(record: RunRecord) -> Picture | None:
    """The first of the declared plots; None if the run has no data for it."""
    plot = record.declaration.plots[0]
    return _draw(record, plot.name, plot.title, partial(_draw_plot, plot=plot))


def _draw(record: RunRecord, name: str, title: str, draw: Drawing) -> Picture | None:
    import matplotlib

    # The salt makes the ids of a picture unique on the page.
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        drawn = draw(record)
        return Picture(name, title, *render(*drawn)) if drawn else None


def _draw_plot(record: RunRecord, plot: Plot) -> tuple[Figure, str] | None:
    """The declared curves of a plot for which the run has data; axes lie below each other."""
    axes_of: dict[str, list[tuple[Metric, Curve]]] = {}
    for metric in record.declaration.metrics:
        for curve in metric.curves:
            if curve.plot == plot.name and any(_has(record, row, metric, curve) for row in record.steps):
                axes_of.setdefault(curve.axis, []).append((metric, curve))
    if plot.evaluations and record.evaluations:
        axes_of.setdefault(SUCCESS, [])
    if not axes_of:
        return None
    heights = (
        [ONLY] if len(axes_of) == 1 else [TALL if _is_tall(shown) else LOW for shown in axes_of.values()]
    )
    figure = new_figure(AROUND + sum(heights) + (TASKS if SUCCESS in axes_of else 0))
    panels = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights).flat
    colors = itertools.cycle(COLORS.values())
    words = []
    for axes, (label, shown) in zip(panels, axes_of.items(), strict=True):
        axes.set_ylabel(label)
        if label == SUCCESS:
            words.append(_draw_success(axes, record, shown, plot.evaluations))
        else:
            words.append(_draw_curves(axes, record, shown, colors))
    step_axis(figure.axes[-1], "training steps")
    add_legend(figure)
    return figure, " ".join(words)


def _path(metric: Metric, curve: Curve) -> str:
    """Name of the number that a curve shows; for a band, of its middle."""
    part = "mean" if curve.style == "band" else curve.part
    return f"{metric.name}/{part}" if part else metric.name


def _has(record: RunRecord, row: Row, metric: Metric, curve: Curve) -> bool:
    if curve.style == "success":
        return record.success_counts([row])[1] > 0
    return value(row, _path(metric, curve)) is not None


def _is_tall(shown: list[tuple[Metric, Curve]]) -> bool:
    return len(shown) != 1 or shown[0][1].style in ("band", "success")


def _draw_curves(
    axes: Axes, record: RunRecord, shown: list[tuple[Metric, Curve]], colors: Iterator[str]
) -> str:
    """Draw lines, bands and stacked areas on an axis; return a description of them."""
    rows = [row for row in record.steps if any(_has(record, row, *each) for each in shown)]
    x, chunks = pooled(rows)
    areas: dict[str, tuple[np.ndarray, str]] = {}
    for (metric, curve), next_color in zip(shown, colors, strict=False):
        color = COLORS.get(curve.color, next_color)
        middle = curve.scale * means(chunks, _path(metric, curve))
        if curve.style == "area":
            less = np.nan_to_num(means(chunks, curve.less)) if curve.less else 0.0
            areas[curve.label] = np.nan_to_num(middle) - curve.scale * less, color
            continue
        if curve.style == "band":
            std, low, high = (
                curve.scale * means(chunks, f"{metric.name}/{part}") for part in ("std", "min", "max")
            )
            _fill(axes, x, low, high, color, 0.15, "least to greatest")
            _fill(axes, x, middle - std, middle + std, color, 0.35, "standard deviation")
        label = curve.label or ("mean" if curve.style == "band" else None)
        axes.plot(x, middle, "o-", color=color, label=label)
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4), useMathText=False)
        limit = record.setting(curve.limit[0]) if curve.limit else None
        if curve.limit and isinstance(limit, int | float):
            axes.axhline(limit, color=COLORS["grey"], ls="--", lw=1, label=curve.limit[1])
    stack(axes, chunks, areas)
    if span := shown[0][1].span:
        axes.set_ylim(span[0], 1.05 * axes.get_ylim()[1] if span[1] is None else span[1])
    return _in_words(rows, shown)


def _fill(
    axes: Axes, x: np.ndarray, low: np.ndarray, high: np.ndarray, color: str, alpha: float, label: str
) -> None:
    if np.isfinite(high - low).any():
        axes.fill_between(x, low, high, color=color, alpha=alpha, lw=0, label=label)


def _in_words(rows: list[Row], shown: list[tuple[Metric, Curve]]) -> str:
    """Describe an axis in words: last value and range of lines and bands, totals of areas."""
    lines, totals = [], {}
    for metric, curve in shown:
        path = _path(metric, curve)
        ends = [f"{metric.name}/{part}" for part in ("min", "max")] if curve.style == "band" else [path, path]
        values, low, high = (
            [curve.scale * v for row in rows if (v := value(row, name)) is not None and math.isfinite(v)]
            for name in (path, *ends)
        )
        if curve.style == "area":
            totals[curve.label] = sum(values) - curve.scale * sum(value(row, curve.less) or 0 for row in rows)
        elif values:
            between = f"from {_short(min(low or values))} to {_short(max(high or values))}"
            lines.append(f"{curve.label} last {_short(values[-1])}, {between}".strip())
    whole = sum(totals.values()) or 1
    shares = [f"{name}: {_short(total)} ({100 * total / whole:.0f}%)" for name, total in totals.items()]
    stacked = [f"stacked areas, in all {'; '.join(shares)}"] if shares else []
    return f"{_sentence(shown[0][1].axis)} against training steps: {'; '.join(stacked + lines)}."


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _short(number: float) -> str:
    return f"{number:,.0f}" if abs(number) >= 1000 else f"{number:.3g}"


def _draw_success(axes: Axes, record: RunRecord, shown: list[tuple[Metric, Curve]], evaluations: str) -> str:
    """Draw success in training, by task if they are few, and every evaluation; return a description."""
    words = ["Success against training steps."]
    practised = _practised(record)
    together = len(practised) > MAX_OVERLAID_TASKS
    for _, curve in shown:
        if together:
            _draw_practice(axes, record, None, COLORS["blue"], f"all tasks, {curve.label}")
        for color, task in zip(COLORS.values(), [] if together else practised, strict=False):
            _draw_practice(axes, record, task, color, textwrap.fill(shorten(task, 130), 70))
        words.append(f"{_sentence(curve.label)} in all: {format_rate(*record.success_counts(record.steps))}.")
    if evaluations and record.evaluations:
        _draw_evaluations(axes, record, evaluations)
    if evaluations:
        scores = [
            f"{label}: {format_rate(*evaluation_counts(score))}" for label, _, score in record.first_and_last
        ]
        words.append(f"Evaluations: {'; '.join(scores) or 'none'}.")
    axes.set_ylim(0, 104)
    return " ".join(words)


def _draw_evaluations(axes: Axes, record: RunRecord, label: str) -> None:
    place = [place for _, place, _ in record.evaluations]
    middle, low, high = np.array([percent(*evaluation_counts(score)) for _, _, score in record.evaluations]).T
    if len(place) > MAX_ERROR_BARS:
        axes.plot(place, middle, color=INK, lw=1.2, label=label)
        axes.fill_between(place, low, high, color=INK, alpha=0.15, lw=0)
    else:
        bars = [middle - low, high - middle]
        axes.errorbar(place, middle, bars, fmt="s", c=INK, ms=4, capsize=3, label=label)
    if len(place) < 3:
        for x, y, (_, _, score) in zip(place, middle, record.evaluations, strict=True):
            successes, episodes = evaluation_counts(score)
            side = {"xytext": (-6, -16), "ha": "right"} if x > 0 else {"xytext": (6, 5)}
            axes.annotate(f"{successes} of {episodes}", (x, y), textcoords="offset points", **side)


def draw_success_by_task(record: RunRecord) -> tuple[Figure, str] | None:
    """The first and the last evaluation as bars, with intervals and counts."""
    if not record.evaluations:
        return None
    shown = [(label, score) for label, _, score in record.first_and_last]
    scored = [name for name in record.tasks if any(evaluation_counts(score, name)[1] for _, score in shown)]
    names = scored[:MAX_TASK_PANELS]
    figure = new_figure(0.8 + 0.62 * (len(names) + 1))
    axes = figure.subplots()
    for number, name in enumerate([*names, None]):
        title = "all tasks" if name is None else shorten(name, 68)
        axes.text(0, number - 0.36, title, va="center", weight="bold" if name is None else "normal")
        for bar, (color, (label, score)) in enumerate(
            zip((COLORS["grey"], COLORS["blue"]), shown, strict=False)
        ):
            successes, episodes = evaluation_counts(score, name)
            if not episodes:
                continue
            middle, low, high = percent(successes, episodes)
            y = number - 0.08 + 0.28 * bar
            axes.barh(y, middle, 0.26, color=color, label=label if name is None else None)
            axes.errorbar(middle, y, xerr=[[middle - low], [high - middle]], c=INK, capsize=2, lw=1)
            axes.text(102, y, f"{successes}/{episodes}", va="center")
    axes.set(xlabel="success (%), 95% interval", xlim=(0, 116), ylim=(len(names) + 0.5, -0.55), yticks=[])
    axes.set_xticks(range(0, 101, 20))
    axes.spines["left"].set_visible(False)
    add_legend(figure)
    left_out = f" The first {len(names)} of {len(scored)} tasks." if len(scored) > len(names) else ""
    return figure, f"Bars of success by task with 95% intervals; the table below has the numbers.{left_out}"


def _practised(record: RunRecord) -> list[str]:
    """Tasks that the run has tried in training."""
    return [name for name in record.tasks if record.success_counts(record.steps, name)[1]]


def draw_practice_by_task(record: RunRecord) -> tuple[Figure, str] | None:
    """A panel for each task, if the tasks are too many for one plot."""
    practised = _practised(record)
    if len(practised) <= MAX_OVERLAID_TASKS:
        return None
    shown = practised[:MAX_TASK_PANELS]
    rows = (len(shown) + 1) // 2
    figure = new_figure(0.5 + 1.25 * rows)
    panels = figure.subplots(rows, 2, sharex=True, sharey=True, squeeze=False).flat
    for axes, task in zip(panels, shown, strict=False):
        _draw_practice(axes, record, task, COLORS["blue"], points=PANEL_POINTS)
        axes.set_title("\n".join(textwrap.wrap(shorten(task, 64), 34)), fontsize=7, loc="left")
        axes.set(ylim=(0, 104), yticks=(0, 50, 100))
        step_axis(axes, ticks=4)
    if len(shown) % 2:
        figure.axes[-1].set_visible(False)
    figure.supxlabel("training steps", fontsize="medium")
    figure.supylabel("practice success (%), 95% interval", fontsize="medium")
    left_out = f" The first {len(shown)} of {len(practised)} tasks." if len(practised) > len(shown) else ""
    return figure, f"Success in practice against training steps, a panel for each task.{left_out}"


def _draw_practice(
    axes: Axes,
    record: RunRecord,
    task: str | None,
    color: str,
    label: str | None = None,
    points: int = MAX_POINTS,
) -> None:
    rows = [row for row in record.steps if record.success_counts([row], task)[1]]
    if not rows:
        return
    x, chunks = pooled(rows, points)
    middle, low, high = np.array([percent(*record.success_counts(chunk, task)) for chunk in chunks]).T
    axes.plot(x, middle, "o-", color=color, label=label)
    axes.fill_between(x, low, high, color=color, alpha=0.15, lw=0)
