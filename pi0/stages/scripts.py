"""Stage scripts: what each adds, its parts, and how much of one survives in another."""

from __future__ import annotations

import ast
import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pi0.base.errors import InputError
from pi0.base.paths import REPO_ROOT

DOCSTRING, IMPORTS = "docstring", "imports"
_Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass(frozen=True)
class Stage:
    """A stage script: `path` is `NN_train_*.py`."""

    path: Path
    source: str

    @property
    def label(self) -> str:
        """Its number as two digits."""
        return self.path.name[:2]

    @property
    def number(self) -> int:
        """Its number."""
        return int(self.label)

    @cached_property
    def lines(self) -> list[str]:
        """Lines without their ends."""
        return self.source.splitlines()

    @cached_property
    def tree(self) -> ast.Module:
        """The parsed source. Raises `InputError` if it is not valid Python."""
        try:
            return ast.parse(self.source)
        except SyntaxError as error:
            raise InputError(f"{self.path}:{error.lineno}: not valid Python: {error.msg}") from None

    @property
    def docstring(self) -> str:
        """The script's docstring, whose first line must be "Stage NN: capability"."""
        text = ast.get_docstring(self.tree) or ""
        if not re.match(rf"Stage {self.label}: \S", text):
            raise InputError(f'{self.path}: begin its docstring with "Stage {self.label}: " and what it adds')
        return text

    @property
    def capability(self) -> str:
        """What the stage adds, from the docstring's first line."""
        first = self.docstring.splitlines()[0]
        return re.sub(r"^Stage \d+: (stage \d+ with )?", "", first).removesuffix(".")

    @property
    def commands(self) -> str:
        """The indented lines of the docstring, as they are written; they run the stage."""
        written = self.lines[: self.units.count(DOCSTRING)]
        return "\n".join(line[4:].replace("\\\\", "\\") for line in written if line.startswith("    "))

    @cached_property
    def units(self) -> list[str]:
        """The top-level part of every line: docstring, imports, or a definition's name."""
        starts: list[tuple[int, str]] = []
        for node in self.tree.body:
            start = _start(node)
            if isinstance(node, _Definition):
                name = node.name
            elif isinstance(node, ast.Import | ast.ImportFrom):
                name = IMPORTS
            elif node is self.tree.body[0] and ast.get_docstring(self.tree, clean=False) is not None:
                name = DOCSTRING
            else:
                name = re.split(r"[:=]", self.lines[start - 1])[0].strip()
            while start > 1 and self.lines[start - 2].startswith("#"):  # a comment belongs to the next part
                start -= 1
            starts.append((start, name))
        units = [DOCSTRING] * len(self.lines)
        for start, name in starts:
            units[start - 1 :] = [name] * (len(units) - start + 1)
        return units

    def scope(self, index: int) -> str:
        """The place of line `index`, from 0: "train()", "InitialStateDataset.record()", "imports"."""
        names, function = [], False
        for node in ast.walk(self.tree):  # outer before inner
            if isinstance(node, _Definition) and _start(node) <= index + 1 <= (node.end_lineno or 0):
                names.append(node.name)
                function = not isinstance(node, ast.ClassDef)
        if names:
            return ".".join(names) + ("()" if function else "")
        return self.units[index] if self.units else ""


def find_stages(root: Path = REPO_ROOT) -> list[Stage]:
    """The stage scripts in `root`, in order. Raises `InputError` if there are none."""
    paths = sorted(root.glob("[0-9][0-9]_train_*.py"))
    if not paths:
        raise InputError(f"{root}: no stage scripts (NN_train_*.py) here")
    return [Stage(path, path.read_text(encoding="utf-8")) for path in paths]


@dataclass(frozen=True)
class Comparison:
    """Number of lines that two stages share, and that each has."""

    shared: int
    before: int
    after: int

    @property
    def added(self) -> int:
        """Lines of the later stage that are not in the earlier one."""
        return self.after - self.shared

    @property
    def removed(self) -> int:
        """Lines of the earlier stage that are removed or changed."""
        return self.before - self.shared

    @property
    def survive(self) -> float:
        """Share of the earlier stage's lines that are unchanged in the later one, 0 to 1."""
        return self.shared / self.before


def compare(before: Stage, after: Stage) -> Comparison:
    """Count the lines that survive."""
    blocks = match_lines(before.lines, after.lines).get_matching_blocks()
    return Comparison(sum(block.size for block in blocks), len(before.lines), len(after.lines))


def match_lines(before: Sequence[str], after: Sequence[str]) -> difflib.SequenceMatcher:
    """Match the lines of two scripts; a frequent line counts like any other."""
    return difflib.SequenceMatcher(None, before, after, autojunk=False)


def _start(node: ast.stmt) -> int:
    """The first line of a statement, from 1; a definition's decorators belong to it."""
    decorators = node.decorator_list if isinstance(node, _Definition) else []
    return min([node.lineno, *(each.lineno for each in decorators)])
