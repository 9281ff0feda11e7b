"""Figures for the page and for files: style, pooling of long runs, SVG and PNG."""

from __future__ import annotations

import html
import io
import re
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pi0.base.stats import wilson_interval
from pi0.report.record import Row, value

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 4.6  # inches; text of 8.5 points is then readable on a phone and not too big on a desktop
MAX_POINTS = 60  # longer runs pool consecutive steps, which also narrows the intervals
INK = "#24292f"  # replaced by the page's text colour in SVG
COLORS = {
    "blue": "#3d85c6",
    "orange": "#d98324",
    "green": "#2f9e6b",
    "red": "#cf4b55",
    "purple": "#8e6cc0",
    "grey": "#8b95a1",
}
STYLE = {
    "text.parse_math": False,  # a dollar sign in a task's name is not a formula
    "svg.fonttype": "none",
    "font.size": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": INK,
    "grid.alpha": 0.15,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "lines.markersize": 3,
    "legend.frameon": False,
    **{f"{part}.color": INK for part in ("text", "xtick", "ytick")},
    **{f"axes.{part}": INK for part in ("edgecolor", "labelcolor", "titlecolor")},
}


def new_figure(height: float) -> Figure:
    """An empty figure, `height` inches high."""
    # pyplot would bring global state and a window system into the training process.
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, height), layout="constrained")


def pooled(rows: Sequence[Row], points: int = MAX_POINTS) -> tuple[np.ndarray, list[list[Row]]]:
    """Group consecutive rows into at most `points` chunks.

    Returns the middle of each chunk on the axis of steps, where step k lies between k and k + 1, and the chunks.
    """
    size = -(-len(rows) // points)
    chunks = [list(rows[start : start + size]) for start in range(0, len(rows), size or 1)]
    return np.array([np.mean([row["step"] for row in chunk]) + 0.5 for chunk in chunks]), chunks


def means(chunks: list[list[Row]], name: str) -> np.ndarray:
    """Mean of a metric in each chunk; nan if it was not recorded."""
    found = [[v for row in chunk if (v := value(row, name)) is not None] for chunk in chunks]
    return np.array([np.mean(values) if values else np.nan for values in found], dtype=float)


def percent(successes: int, n: int) -> tuple[float, float, float]:
    """Rate and the bounds of its interval, in percent."""
    low, high = wilson_interval(successes, n)
    return 100 * successes / n, 100 * low, 100 * high


def stack(axes: Axes, chunks: list[list[Row]], values: dict[str, tuple[np.ndarray, str]]) -> None:
    """Stack step functions; `values` maps each label to heights by chunk and a colour, from the bottom up."""
    edges = [chunk[0]["step"] for chunk in chunks] + [chunks[-1][-1]["step"] + 1]
    bottom = np.zeros(len(chunks))
    for label, (heights, color) in values.items():
        if heights.any():
            # One patch for each label; a bar for each step would take most of a report's time.
            axes.stairs(bottom + heights, edges, baseline=bottom, fill=True, color=color, label=label)
            bottom = bottom + heights


def step_axis(axes: Axes, label: str = "", ticks: int = 8) -> None:
    """Make the x axis one of training steps: from 0, with ticks at integers."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=ticks, integer=True, min_n_ticks=1))
    axes.set_xlim(left=min(0.0, axes.get_xlim()[0]))
    if label:
        axes.set_xlabel(label)


def shorten(task: str, length: int) -> str:
    """A task's name with spaces, in at most `length` characters."""
    return textwrap.shorten(task.replace("_", " "), length, placeholder=" ...")


def add_legend(figure: Figure) -> None:
    """Add one legend below the figure for all labels in its axes, in as many columns as fit."""
    handles: dict[str, Any] = {}
    for axes in figure.axes:
        found, labels = axes.get_legend_handles_labels()
        handles |= dict(zip(labels, found, strict=True))
    if handles:
        longest = max(map(len, handles))
        columns = 3 if longest < 22 else 2 if longest < 36 else 1
        figure.legend(
            list(handles.values()), list(handles), loc="outside lower left", ncols=columns, columnspacing=1.2
        )


def render(figure: Figure, alt: str) -> tuple[str, bytes]:
    """The figure as an <svg> element with the page's font and text colour, and as a PNG file on white."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    # Figure.savefig would draw and lay out the figure several times for each file.
    figure.set_dpi(140)
    canvas = FigureCanvasAgg(figure)
    if layout := figure.get_layout_engine():
        layout.execute(figure)
        figure.set_layout_engine("none")
    png, svg = io.BytesIO(), io.StringIO()
    figure.set_facecolor("white")
    canvas.print_png(png)
    figure.set_facecolor("none")
    # Metadata would add links to its vocabularies.
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    FigureCanvasSVG(figure).print_svg(svg, metadata=metadata)
    return _inline(svg.getvalue(), alt), png.getvalue()


def _inline(svg: str, alt: str) -> str:
    """An SVG file as an element of an HTML page."""
    width, height = (f"{float(size):g}" for size in re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)[0])
    # The part before it is the prolog and a style that would apply to the whole page.
    body = svg.partition("</style>")[2].replace("</defs>", "", 1)
    used = set(re.findall(r"#([\w-]+)", body))
    body = re.sub(r' id="([^"]+)"', lambda match: match[0] if match[1] in used else "", body)
    body = re.sub(r"font-family: [^;]+; ", "", body).replace(INK, "currentColor")
    label = html.escape(alt)
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}">{body}'
