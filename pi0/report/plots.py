"""The pictures of a run: success, losses, advantages, groups, time and memory over its training steps."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pi0.base.stats import format_rate
from pi0.report.figures import (
    BLUE,
    GREEN,
    GREY,
    INK,
    MAX_POINTS,
    ORANGE,
    PURPLE,
    RED,
    STYLE,
    add_legend,
    means,
    new_figure,
    percent,
    pooled,
    render,
    stack,
    step_axis,
)
from pi0.report.record import RunRecord, evaluation_counts, success_counts
from pi0.ript.results import shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_ERROR_BARS = 20  # a line with a band is clearer for more
MAX_OVERLAID_TASKS = 3  # more curves with intervals in one plot hide each other
MAX_TASK_PANELS = 20  # what more would show is in the page's table
PANEL_POINTS = 25
PHASES = {
    "render": BLUE,
    "inference": ORANGE,
    "physics": GREEN,
    "update": RED,
    "wait": PURPLE,
    "other": GREY,
}
MEMORY = {"rss_mb": "main process", "workers_mb": "simulator processes", "gpu_mb": "GPU"}


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


def draw_pictures(record: RunRecord) -> list[Picture]:
    """Every picture that the run has data for."""
    import matplotlib

    drawings: list[tuple[str, str, Callable[[RunRecord], tuple[Figure, str] | None]]] = [
        ("learning_curve", "Learning curve", draw_learning_curve),
        ("success_by_task", "Success by task", draw_success_by_task),
        ("practice_by_task", "Practice by task", draw_practice_by_task),
        ("training", "Loss, gradient norm and learning rate", draw_training),
        ("advantages", "Advantages", draw_advantages),
        ("groups", "Groups of rollouts", draw_groups),
        ("phases", "Where the time goes", draw_phases),
        ("memory", "Memory", draw_memory),
    ]
    pictures = []
    for name, title, draw in drawings:
        # The salt keeps the ids of one picture apart from another's on the same page.
        with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
            if drawn := draw(record):
                figure, alt = drawn
                pictures.append(Picture(name, title, *render(figure, alt)))
    return pictures


def draw_learning_curve(record: RunRecord) -> tuple[Figure, str] | None:
    """Practice of few tasks each, of many in all, and every evaluation, with 95% Wilson intervals."""
    if not success_counts(record.steps)[1] and not record.evaluations:
        return None
    figure = new_figure(3.3)
    axes = figure.subplots()
    practised = [name for name in record.tasks if success_counts(record.steps, name)[1]]
    together = len(practised) > MAX_OVERLAID_TASKS
    if together:
        _draw_practice(axes, record, None, BLUE, "all tasks, practice")
    for color, task in zip((BLUE, ORANGE, GREEN), [] if together else practised, strict=False):
        _draw_practice(axes, record, task, color, textwrap.fill(shorten(task, 130), 70))
    if record.evaluations:
        place = [place for _, place, _ in record.evaluations]
        middle, low, high = np.array(
            [percent(*evaluation_counts(score)) for _, _, score in record.evaluations]
        ).T
        label = "all tasks, evaluation on states never trained on"
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
    axes.set(xlabel="training steps", ylabel="success (%), 95% interval", ylim=(0, 104))
    step_axis(axes)
    add_legend(figure, 1)
    scores = "; ".join(
        f"{label}: {format_rate(*evaluation_counts(score))}" for label, _, score in record.first_and_last
    )
    practice = format_rate(*success_counts(record.steps))
    alt = f"Success against training steps. Practice in all: {practice}. Evaluations: {scores or 'none'}."
    return figure, alt


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
        for bar, (color, (label, score)) in enumerate(zip((GREY, BLUE), shown, strict=False)):
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
    add_legend(figure, 2)
    left_out = f" The first {len(names)} of {len(scored)} tasks." if len(scored) > len(names) else ""
    return figure, f"Bars of success by task with 95% intervals; the table below has the numbers.{left_out}"


def draw_practice_by_task(record: RunRecord) -> tuple[Figure, str] | None:
    """A panel for each task, where the tasks are too many for one plot."""
    practised = [name for name in record.tasks if success_counts(record.steps, name)[1]]
    if len(practised) <= MAX_OVERLAID_TASKS:
        return None
    shown = practised[:MAX_TASK_PANELS]
    rows = (len(shown) + 1) // 2
    figure = new_figure(0.5 + 1.25 * rows)
    panels = figure.subplots(rows, 2, sharex=True, sharey=True, squeeze=False).flat
    for axes, task in zip(panels, shown, strict=False):
        _draw_practice(axes, record, task, BLUE, points=PANEL_POINTS)
        axes.set_title("\n".join(textwrap.wrap(shorten(task, 64), 34)), fontsize=7, loc="left")
        axes.set(ylim=(0, 104), yticks=(0, 50, 100))
        step_axis(axes, ticks=4)
    if len(shown) % 2:
        figure.axes[-1].set_visible(False)
    figure.supxlabel("training steps", fontsize="medium")
    figure.supylabel("practice success (%), 95% interval", fontsize="medium")
    left_out = f" The first {len(shown)} of {len(practised)} tasks." if len(practised) > len(shown) else ""
    return figure, f"Success in practice against training steps, a panel for each task.{left_out}"


def draw_training(record: RunRecord) -> tuple[Figure, str] | None:
    """Loss, gradient norm and learning rate below each other."""
    labels = {"loss": "loss", "grad_norm": "gradient norm", "lr": "learning rate"}
    present = [key for key in labels if any(key in row for row in record.steps)]
    if not present:
        return None
    figure = new_figure(0.5 + 1.25 * len(present))
    panels = figure.subplots(len(present), 1, sharex=True, squeeze=False).flat
    x, chunks = pooled(record.steps)
    for axes, key, color in zip(panels, present, (BLUE, ORANGE, GREEN), strict=False):
        axes.plot(x, means(chunks, key), "o-", color=color)
        axes.set_ylabel(labels[key])
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4), useMathText=False)
        clip = record.setting("algo", "grad_norm_clip")
        if key == "grad_norm" and isinstance(clip, int | float):
            axes.axhline(clip, color=GREY, ls="--", lw=1, label="clipped to this")
            axes.legend(loc="best", fontsize=7)
    step_axis(figure.axes[-1], "training steps")
    latest = record.steps[-1]
    values = ", ".join(f"{labels[key]} {latest[key]:.3g}" for key in present if key in latest)
    names = ", ".join(labels[key] for key in present)
    return figure, f"Lines against training steps: {names}. Last step: {values or 'none of them'}."


def draw_advantages(record: RunRecord) -> tuple[Figure, str] | None:
    """Mean, spread and range of the advantages, and the share above zero."""
    rows = [row for row in record.steps if row.get("advantages")]
    if not rows:
        return None
    figure = new_figure(3.3)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    x, chunks = pooled(rows)
    mean, std, low, high, positive = (
        means(chunks, "advantages", key) for key in ("mean", "std", "min", "max", "positive")
    )
    above.fill_between(x, low, high, color=BLUE, alpha=0.15, lw=0, label="least to greatest")
    above.fill_between(x, mean - std, mean + std, color=BLUE, alpha=0.35, lw=0, label="standard deviation")
    above.plot(x, mean, "o-", color=BLUE, label="mean")
    above.set_ylabel("advantage")
    below.plot(x, 100 * positive, "o-", color=GREEN)
    below.set(ylabel="above zero (%)", ylim=(0, 104))
    step_axis(below, "training steps")
    add_legend(figure, 3)
    return figure, "Advantages against training steps: mean, standard deviation, range, share above zero."


def draw_groups(record: RunRecord) -> tuple[Figure, str] | None:
    """What became of the groups, and the initial states that were passed over."""
    rows = [row for row in record.steps if "groups" in row]
    if not rows:
        return None
    has_skipped = any("skipped_states" in row for row in rows)
    figure = new_figure(3.3 if has_skipped else 2.4)
    panels = figure.subplots(
        1 + has_skipped, 1, sharex=True, squeeze=False, height_ratios=(2, 1)[: 1 + has_skipped]
    )
    _, chunks = pooled(rows)
    groups, unanimous, dropped = (
        np.nan_to_num(means(chunks, key)) for key in ("groups", "unanimous_groups", "dropped_groups")
    )
    stacked = {
        "learned from": (groups - unanimous, GREEN),
        "kept, all rollouts agree": (unanimous, GREY),
        "dropped, all rollouts agree": (dropped, RED),
    }
    stack(panels[0, 0], chunks, stacked)
    panels[0, 0].set_ylabel("groups a step")
    if has_skipped:
        skipped = np.nan_to_num(means(chunks, "skipped_states"))
        stack(panels[1, 0], chunks, {"initial states skipped as solved": (skipped, PURPLE)})
        panels[1, 0].set_ylabel("skipped")
    step_axis(figure.axes[-1], "training steps")
    add_legend(figure, 2)
    totals = {
        key: sum(row.get(key, 0) for row in rows) for key in ("groups", "unanimous_groups", "dropped_groups")
    }
    return figure, (
        f"Stacked areas by training step: {totals['groups']} groups kept, {totals['unanimous_groups']} of them unanimous; "
        f"{totals['dropped_groups']} dropped; {sum(row.get('skipped_states', 0) for row in rows)} states skipped."
    )


def draw_phases(record: RunRecord) -> tuple[Figure, str] | None:
    """Seconds of a step by phase, stacked."""
    rows = [row for row in record.steps if row.get("phases")]
    present = [phase for phase in PHASES if any(phase in row["phases"] for row in rows)]
    if not present:
        return None
    figure = new_figure(2.7)
    axes = figure.subplots()
    _, chunks = pooled(rows)
    values = {phase: np.nan_to_num(means(chunks, "phases", phase)) for phase in present}
    stack(axes, chunks, {phase: (values[phase], PHASES[phase]) for phase in present})
    axes.set_ylabel("seconds a step")
    step_axis(axes, "training steps")
    add_legend(figure, 3)
    totals = {phase: sum(row["phases"].get(phase, 0) for row in rows) for phase in present}
    whole = sum(totals.values()) or 1
    shares = ", ".join(f"{phase} {100 * seconds / whole:.0f}%" for phase, seconds in totals.items())
    return figure, f"Stacked areas of the seconds of each training step; in all: {shares}."


def draw_memory(record: RunRecord) -> tuple[Figure, str] | None:
    """Memory in use at each step."""
    rows = [row for row in record.steps if row.get("memory")]
    present = [key for key in MEMORY if any(key in row["memory"] for row in rows)]
    if not present:
        return None
    figure = new_figure(2.7)
    axes = figure.subplots()
    x, chunks = pooled(rows)
    for key, color in zip(present, (BLUE, ORANGE, GREEN), strict=False):
        axes.plot(x, means(chunks, "memory", key) / 1000, "o-", color=color, label=MEMORY[key])
    axes.set_ylabel("memory (GB)")
    axes.set_ylim(0, 1.05 * axes.get_ylim()[1])
    step_axis(axes, "training steps")
    add_legend(figure, 3)
    peaks = ", ".join(
        f"{MEMORY[key]} {max(row['memory'].get(key, 0) for row in rows) / 1000:.2f} GB" for key in present
    )
    return figure, f"Lines of memory in use against training steps; most: {peaks}."


def _draw_practice(
    axes: Axes,
    record: RunRecord,
    task: str | None,
    color: str,
    label: str | None = None,
    points: int = MAX_POINTS,
) -> None:
    rows = [row for row in record.steps if success_counts([row], task)[1]]
    if not rows:
        return
    x, chunks = pooled(rows, points)
    middle, low, high = np.array([percent(*success_counts(chunk, task)) for chunk in chunks]).T
    axes.plot(x, middle, "o-", color=color, label=label)
    axes.fill_between(x, low, high, color=color, alpha=0.15, lw=0)
