"""Write a run's report again, or look at a run in progress.

    python -m pi0.report outputs/ript-20260102-030405

It writes report.html, one self-contained page, and plots/*.png into the run's folder.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pi0.base.errors import run_command
from pi0.report.declaration import FILE
from pi0.report.html_report import write_html_report


def main(arguments: list[str] | None = None) -> None:
    """Read a run's folder, write the page, print its path."""
    parser = argparse.ArgumentParser(
        prog="python -m pi0.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "run_dir", metavar="RUN_DIR", type=Path, help="folder that a stage script has written"
    )
    options = parser.parse_args(arguments)
    declaration = None
    if not (options.run_dir / FILE).exists():  # an old run without declared metrics is RIPT's
        from pi0.ript.metrics import METRICS  # loads torch, which takes seconds

        declaration = METRICS
    print(f"written to {write_html_report(options.run_dir, declaration)}")


if __name__ == "__main__":
    run_command(main)
