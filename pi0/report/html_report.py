"""report.html: one self-contained page about a run, finished or in progress, and its plots as PNG files."""

from __future__ import annotations

from pathlib import Path

from pi0.base.files import write_whole
from pi0.report.declaration import Declaration
from pi0.report.page import build_page
from pi0.report.plots import draw_learning_curve, draw_pictures
from pi0.report.record import RunRecord, read_run


def write_html_report(run_dir: Path, declaration: Declaration | None = None) -> Path:
    """Write report.html and plots/*.png into a run's folder, each file whole or not at all.

    It needs only the folder, so it can be called every few steps, and on a run of another process. The page loads
    nothing from outside: it holds plots as SVG, and videos up to `EMBEDDED_VIDEO_BYTES`; other videos are linked by
    relative path.

    Args:
        run_dir: the folder.
        declaration: declaration of the run's metrics; it is written into the folder for later reports. None: the one
            in the folder.

    Returns the path of report.html.

    Raises:
        MissingFileError: `run_dir` is not a run's folder, or its metrics were never declared.
        RunRecordError: a file in it is damaged.
        OSError: a file cannot be written.
    """
    record = _read(run_dir, declaration)
    pictures = draw_pictures(record)
    plots = record.run_dir / "plots"
    plots.mkdir(exist_ok=True)
    for picture in pictures:
        write_whole(plots / f"{picture.name}.png", picture.png)
    page = record.run_dir / "report.html"
    write_whole(page, build_page(record, pictures).encode("utf-8", "replace"))
    return page


def write_learning_curve(run_dir: Path, declaration: Declaration | None = None) -> Path | None:
    """Write learning_curve.png, the report's first plot, into a run's folder; None if there is nothing to draw.

    Arguments and errors are those of `write_html_report`.
    """
    picture = draw_learning_curve(_read(run_dir, declaration))
    if picture is None:
        return None
    path = Path(run_dir) / f"{picture.name}.png"
    write_whole(path, picture.png)
    return path


def _read(run_dir: Path, declaration: Declaration | None) -> RunRecord:
    record = read_run(run_dir, declaration)
    record.declaration.write(record.run_dir)
    return record
