"""The hand-written notes on the stages, `docs/stages/notes/NN.yaml`.

    adds: what the stage adds, in a paragraph
    notes:
      - title: heading
        anchors: [a piece of one of the hunk's added lines]
        why: why the change is there
        without: what breaks without it
        tests: [tests/test_x.py::test_that_shows_it]
      - title: imports for the above
        anchors: [import argparse]
        minor: true

An anchor must be in exactly one hunk: in a line that it adds, or in one that it removes if it adds none. Every hunk
must have exactly one note; a note with several anchors covers several hunks. Changes close to each other are one
hunk, but a change with an anchor begins another one. A test must fail without the hunk. A minor note needs no
reason and no test. The first stage has no earlier one: its hunks are its parts.
"""

from __future__ import annotations

import ast
import difflib
from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

import yaml

from pi0.base.typed_yaml import ConfigError, describe_keys, key, show, unfit_values
from pi0.stages.diff import Hunk
from pi0.stages.scripts import Stage


@dataclass(frozen=True)
class Note:
    """The text about one or more hunks, in Markdown."""

    title: str = key(MISSING, "heading")
    anchors: list[str] = key(MISSING, "for each hunk, a piece of a line that it adds")
    why: str = key("", "why the change is there")
    without: str = key("", "what breaks without it")
    tests: list[str] = key([], "tests that show it, as tests/test_x.py::test_name")
    minor: bool = key(False, "too small to need a reason and a test")


@dataclass(frozen=True)
class Notes:
    """A notes file."""

    path: Path
    adds: str
    notes: list[Note]


def read_notes(path: Path) -> Notes:
    """Read a notes file. Raises `ConfigError` with a line for each mistake."""
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: no such file; write the stage's notes; python -m pi0.stages pages --help shows how"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(given, dict):
        raise ConfigError(f"{path}: expected the keys adds and notes")
    problems = _wrong_keys(given, ["adds", "notes"], ["adds", "notes"])
    adds, entries = given.get("adds", ""), given.get("notes", [])
    if not isinstance(adds, str):
        problems.append(f"adds = {show(adds)}: expected str")
    if not isinstance(entries, list):
        problems.append(f"notes = {show(entries)}: expected a list of notes")
        entries = []
    notes = []
    for number, entry in enumerate(entries, 1):
        note, wrong = _read_note(entry)
        title = entry.get("title") if isinstance(entry, dict) else None
        name = f"note {number}" if title is None else f"note {number} ({title})"
        problems += [f"{name}: {problem}" for problem in wrong]
        if note is not None:
            notes.append(note)
    if problems:
        raise ConfigError("\n".join(f"{path}: {problem}" for problem in problems))
    return Notes(path, adds, notes)


def _read_note(entry: Any) -> tuple[Note | None, list[str]]:
    keys = describe_keys(Note)
    if not isinstance(entry, dict):
        return None, [f"{show(entry)}: expected the keys title, anchors, why, without, tests"]
    required = [each.name for each in keys if each.default is MISSING]
    if problems := _wrong_keys(entry, [each.name for each in keys], required):
        return None, problems
    note = Note(**entry)
    if problems := unfit_values(note):
        return None, problems
    if not note.minor:
        lacking = [name for name in ("why", "without", "tests") if not getattr(note, name)]
        problems += [f"{name} is missing; write it, or `minor: true` for a tiny change" for name in lacking]
    return note, problems


def _wrong_keys(given: dict[Any, Any], known: Sequence[str], required: Sequence[str]) -> list[str]:
    problems = []
    for name in given:
        if name not in known:
            nearest = max(known, key=lambda other: difflib.SequenceMatcher(None, str(name), other).ratio())
            problems.append(f"{show(name)}: unknown key; the nearest one is {nearest}")
    return problems + [f"{name} is missing" for name in required if not given.get(name)]


def match(notes: Notes, stage: Stage, changes: Sequence[Hunk]) -> list[tuple[Note, list[Hunk]]]:
    """Each note with its hunks, in the order of the script.

    Raises `ConfigError` that names every anchor in no hunk or in several, and every hunk with no note or several.
    """
    problems: list[str] = []
    owners: dict[int, list[Note]] = {number: [] for number in range(len(changes))}
    for note in notes.notes:
        for anchor in note.anchors:
            found = [number for number, hunk in enumerate(changes) if _holds(hunk, anchor)]
            if len(found) != 1:
                places = "; ".join(_place(stage, changes[number]) for number in found)
                wrong = (
                    f"{len(found)} hunks ({places}); use a longer piece of the line"
                    if found
                    else f"no line that {stage.path.name} adds; use a piece of one, or remove the note"
                )
                problems.append(f"note {show(note.title)}: the anchor {show(anchor)} is in {wrong}")
            elif note not in owners[found[0]]:
                owners[found[0]].append(note)
    for number, hunk in enumerate(changes):
        if not owners[number]:
            problems.append(
                f"no note covers the hunk at {_place(stage, hunk)}; "
                f"write one, for example with the anchor {show(_distinctive(hunk, changes))}"
            )
        elif len(owners[number]) > 1:
            titles = " and ".join(show(note.title) for note in owners[number])
            problems.append(f"the hunk at {_place(stage, hunk)} is covered by {titles}; keep one of them")
    if problems:
        raise ConfigError("\n".join(f"{notes.path}: {problem}" for problem in problems))
    covered = [
        (note, [changes[number] for number in owners if note in owners[number]]) for note in notes.notes
    ]
    return sorted(covered, key=lambda each: changes.index(each[1][0]))


def missing_tests(notes: Notes, root: Path) -> list[str]:
    """Tests in the notes that do not exist, a line each."""
    problems = []
    for note in notes.notes:
        for test in note.tests:
            name, _, function = test.partition("::")
            path = root / name
            if not (name.startswith("tests/test_") and path.is_file()):
                reason = "there is no such test file"
            elif function not in (names := _test_names(path)):
                near = difflib.get_close_matches(function, names, n=1, cutoff=0.0)
                reason = f"there is no such test; the nearest one is {near[0]}" if near else "it has no tests"
            else:
                continue
            problems.append(f"{notes.path}: note {show(note.title)}: {test}: {reason}")
    return problems


def _test_names(path: Path) -> list[str]:
    body = ast.parse(path.read_text(encoding="utf-8")).body
    return [node.name for node in body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]


def _holds(hunk: Hunk, anchor: str) -> bool:
    return any(anchor in line for line in hunk.changed)


def _distinctive(hunk: Hunk, changes: Sequence[Hunk]) -> str:
    """The hunk's first changed line that no other hunk has."""
    lines = [line.strip() for line in hunk.changed if line.strip()]
    alone = [line for line in lines if sum(_holds(other, line) for other in changes) == 1]
    return (alone or lines)[0]


def _place(stage: Stage, hunk: Hunk) -> str:
    return f"{stage.path.name}:{hunk.line}, {hunk.scope}" + (" (only removes)" if hunk.only_removes else "")
