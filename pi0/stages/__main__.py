"""The stage scripts side by side: what each adds, what differs, and the pages that explain it.

examples:
    python -m pi0.stages                 the stages, what each adds and how much of the one before survives
    python -m pi0.stages diff 8 9        what stage 09 changes in stage 08
    python -m pi0.stages diff 8 10       two stages at once
    python -m pi0.stages diff 9 8        the reverse: what to remove from 09
    python -m pi0.stages pages           write docs/stages again from the scripts and the notes
    python -m pi0.stages pages --check   only report which pages do not match
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from pi0.base.arguments import ranged
from pi0.base.errors import InputError, run_command
from pi0.base.paths import REPO_ROOT
from pi0.stages import notes as stage_notes
from pi0.stages import pages as stage_pages
from pi0.stages.diff import CONTEXT, patch
from pi0.stages.scripts import Stage, compare, find_stages

# Terminal colours by the first characters of a diff's line; the first that fits counts.
COLOURS = {"---": "1", "+++": "1", "@@": "36", "-": "31", "+": "32"}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    description, examples = __doc__.split("\n\n")
    parser = _parser(argparse.ArgumentParser, description, examples, prog="python -m pi0.stages")
    commands = parser.add_subparsers(dest="command", metavar="{list,diff,pages}")
    commands.add_parser("list", help="the stages (also without a command)")
    diff = _parser(
        commands.add_parser,
        "A unified diff of two stages. Lines with + are only in the second one, lines with - only in the first.\n"
        "After @@ is the definition that the change is in. On a terminal it is coloured, unless NO_COLOR is\n"
        "set; in a pipe it is a patch.",
        "examples:\n    python -m pi0.stages diff 8 9\n    python -m pi0.stages diff 8 10 --context 6\n",
        name="diff",
        help="what differs between two stages",
    )
    diff.add_argument("first", help="number of a stage")
    diff.add_argument("second", help="number of another stage")
    diff.add_argument(
        "--context",
        type=ranged(int, low=0),
        default=CONTEXT,
        metavar="LINES",
        help=f"unchanged lines shown around a change ({CONTEXT})",
    )
    pages = _parser(
        commands.add_parser,
        "Write docs/stages/NN.md for each stage, and the index, from the scripts and the notes on them,\n"
        "docs/stages/notes/NN.yaml. The exit status is 1 if notes do not fit the scripts.",
        "notes:\n\n" + str(stage_notes.__doc__).partition("\n\n")[2],
        name="pages",
        help="the explained diffs of docs/stages",
    )
    pages.add_argument(
        "--check", action="store_true", help="write nothing; exit status 1 if a page does not match"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None, root: Path = REPO_ROOT) -> int:
    """Run a command on the stages in `root`; returns the exit status. Raises `InputError`."""
    options = parse_arguments(arguments)
    if options.command == "pages":
        return write_pages(root, check=options.check)
    stages = find_stages(root)
    if options.command == "diff":
        first, second = (find_stage(stages, number) for number in (options.first, options.second))
        lines: Iterable[str] = patch(first, second, options.context)
        colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        for line in coloured(lines) if colour else lines:
            print(line)
    else:
        for line in table(stages, shutil.get_terminal_size((110, 0)).columns):
            print(line)
    return 0


def find_stage(stages: Sequence[Stage], number: str) -> Stage:
    """The stage with that number, written as "9" or "09". Raises `InputError` that lists the stages."""
    for stage in stages:
        if number.isdecimal() and int(number) == stage.number:
            return stage
    there = "".join(f"\n  {stage.label}  {stage.capability}" for stage in stages)
    raise InputError(f"there is no stage {number!r}; there are:{there}")


def table(stages: Sequence[Stage], width: int) -> Iterator[str]:
    """The stages, a row each; what a stage adds is wrapped to `width` characters."""
    names = max(len(stage.path.name) for stage in stages)
    head = f"{'stage':5}  {'file':{names}}  {'lines':>5}  {'added':>5}  {'removed':>7}  {'survive':>7}  "
    yield head + "adds"
    for before, stage in zip([None, *stages], stages, strict=False):
        figures = ["", "", ""]
        if before:
            counts = compare(before, stage)
            figures = [f"+{counts.added}", f"-{counts.removed}", f"{100 * counts.survive:.1f}%"]
        row = f"{stage.label:5}  {stage.path.name:{names}}  {len(stage.lines):5}  "
        row += f"{figures[0]:>5}  {figures[1]:>7}  {figures[2]:>7}  "
        adds = textwrap.wrap(stage.capability, max(24, width - len(head)))
        yield row + adds[0]
        yield from (" " * len(head) + line for line in adds[1:])
    yield "added, removed: against the stage before; survive: share of its lines that are unchanged"


def coloured(lines: Iterable[str]) -> Iterator[str]:
    """A unified diff's lines with a terminal's colours."""
    for line in lines:
        colour = next((code for start, code in COLOURS.items() if line.startswith(start)), None)
        yield line if colour is None else f"\x1b[{colour}m{line}\x1b[0m"


def write_pages(root: Path, check: bool) -> int:
    """Write the pages, or with `check` only compare; returns the exit status."""
    pages, problems = stage_pages.render_pages(root)
    for path, text in pages.items():
        name = path.relative_to(root)
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            continue
        if check:
            problems.append(f"{name}: does not match its sources; run python -m pi0.stages pages")
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            print(f"{name}: written")
    for problem in problems:
        print(f"error: {problem.removeprefix(f'{root}/')}", file=sys.stderr)
    if not problems:
        print(f"{len(pages)} pages match their sources")
    return 1 if problems else 0


def _parser(make, description: str, epilog: str, **options) -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    return make(description=description, epilog=epilog, formatter_class=raw, **options)


if __name__ == "__main__":
    run_command(main)
