"""Write docs/reliability.md, the table of faults that were tried, from the tests that try them.

    python tools/reliability.py

A test of a fault has the mark `tried`, with what was tried and what a user sees then.
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "reliability.md"
HEAD = """# What was tried, and what a user sees

Bad input, broken machines, kills and full disks. Each line is made from the test that tries it (`python
tools/reliability.py` writes this page), so what it says was seen to happen. Exit status 1 means that something named in
the last line has to be mended, 3 that the machine breaks what runs on it, and 130 that Ctrl+C ended a command.

| tried | a user sees | test |
|---|---|---|
"""


class Fault(NamedTuple):
    """A fault that a test tries: what it does, what a user sees, and the test's file and name."""

    tried: str
    seen: str
    file: str
    test: str


def faults(folder: Path) -> Iterator[Fault]:
    """Those in the tests of a folder, in order of file and line.

    Raises:
        ValueError: a mark has not two texts; the message names the test.
    """
    for path in sorted(folder.glob("test_*.py")):
        for node in ast.parse(path.read_text()).body:
            if not isinstance(node, ast.FunctionDef):
                continue
            for mark in node.decorator_list:
                if not (isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.tried"):
                    continue
                texts = [part.value for part in mark.args if isinstance(part, ast.Constant)]
                if len(texts) != 2 or not all(isinstance(text, str) for text in texts):
                    raise ValueError(f"{path}: {node.name}: the mark tried takes two texts")
                yield Fault(str(texts[0]), str(texts[1]), path.name, node.name)


def page(folder: Path) -> str:
    """The content of docs/reliability.md."""
    rows = [
        f"| {cell(fault.tried)} | {cell(fault.seen)} | [`{fault.test}`](../tests/{fault.file}) |\n"
        for fault in faults(folder)
    ]
    return HEAD + "".join(rows)


def cell(text: str) -> str:
    """Text inside a cell of a table."""
    return text.replace("|", "\\|")


if __name__ == "__main__":
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    PAGE.write_text(page(ROOT / "tests"))
    print(f"{PAGE.relative_to(ROOT)} written")
