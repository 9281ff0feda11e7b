"""report.html: one self-contained page about a run, finished or in progress, and its plots as PNG files."""

from __future__ import annotations

from pathlib import Path

from pi0.base.files import write_whole
from pi0.report.page import build_page
from pi0.report.plots import draw_pictures
from pi0.report.record import read_run


def write_html_report(run_dir: Path) -> Path:
    """Write report.html and plots/*.png into a run's folder, each file whole or not at all.

    Needs nothing but the folder, so it can be called after every few steps and on a run that another process is
    writing. The page loads nothing from outside: plots are SVG in it, videos are in it up to
    `EMBEDDED_VIDEO_BYTES` and linked by relative path beyond that.

    Returns the path of report.html.

    Raises:
        MissingFileError: `run_dir` is not a run's folder.
        RunRecordError: a file in it is damaged.
        OSError: it cannot be written.
    """
    run_dir = Path(run_dir)
    record = read_run(run_dir)
    pictures = draw_pictures(record)
    plots = run_dir / "plots"
    plots.mkdir(exist_ok=True)
    for picture in pictures:
        write_whole(plots / f"{picture.name}.png", picture.png)
    page = run_dir / "report.html"
    write_whole(page, build_page(record, pictures).encode("utf-8", "replace"))
    return page
