"""Differences between two stage scripts, for reading (`hunks`) and as a unified diff (`patch`).

The same change can often be shown a few lines higher or lower. Here it begins where a definition begins, as a
reader would expect.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from pi0.stages.scripts import DOCSTRING, IMPORTS, Stage, match_lines

CONTEXT = 2  # unchanged lines shown around a change
SUCCESSION = 0.25  # share of a definition's lines that another must keep to count as its successor


@dataclass(frozen=True)
class Hunk:
    """Changes in one place, with a few lines around them.

    Attributes:
        scope: the definition that they are in.
        line: number of the first changed line, from 1: in the later script, or in the earlier one if lines are only
            removed.
        lines: sign ("+", "-" or " ") and text of each line; "@@" where unchanged lines are left out.
    """

    scope: str
    line: int
    lines: list[str]

    @property
    def changed(self) -> list[str]:
        """The added lines, or the removed ones if none is added."""
        added = [line[1:] for line in self.lines if line.startswith("+")]
        return added or [line[1:] for line in self.lines if line.startswith("-")]

    @property
    def only_removes(self) -> bool:
        """Whether no line is added."""
        return not any(line.startswith("+") for line in self.lines)


def hunks(before: Stage | None, after: Stage, anchors: Sequence[str] = ()) -> list[Hunk]:
    """Differences for reading: each top-level definition separately, the imports together.

    Without an earlier stage everything is added. The result is not a patch: blank lines at the ends are left out.

    Args:
        before: the earlier stage, if any.
        after: the later stage.
        anchors: pieces of lines. Changes close to each other are one hunk, but a line with an anchor begins another.
    """
    before = before or Stage(after.path, "")
    became = _successors(before, after)
    pieces = [
        piece
        for change in _changes(before.lines, after.lines)
        for piece in _split(change, before, after, became)
    ]
    groups: list[list[_Change]] = []
    units: list[str] = []
    for piece in pieces:
        unit = after.units[piece.after] if piece.added else _name(before.units[piece.before], became)
        together = groups and units[-1] == unit
        near = groups and piece.after - groups[-1][-1].after_end <= 2 * CONTEXT
        near = near and not any(anchor in line for anchor in anchors for line in piece.says(before, after))
        if together and (near or unit in (DOCSTRING, IMPORTS)):
            groups[-1].append(piece)
        else:
            groups.append([piece])
            units.append(unit)
    found = [_hunk(group, unit, pieces, before, after) for group, unit in zip(groups, units, strict=True)]
    return [hunk for hunk in found if any(line.strip() for line in hunk.changed)]


def patch(before: Stage, after: Stage, context: int = CONTEXT) -> Iterator[str]:
    """The lines of a unified diff; each hunk's header names the definition where it begins."""
    if before.lines == after.lines:
        return
    yield f"--- {before.path.name}"
    yield f"+++ {after.path.name}"
    groups: list[list[_Change]] = []
    for change in _changes(before.lines, after.lines):
        if groups and change.after - groups[-1][-1].after_end <= 2 * context:
            groups[-1].append(change)
        else:
            groups.append([change])
    for group in groups:
        lead = min(context, group[0].after)
        tail = min(context, len(after.lines) - group[-1].after_end)
        ranges = [
            f"{start + 1 if end > start else start},{end - start}"
            for start, end in (
                (group[0].before - lead, group[-1].before_end + tail),
                (group[0].after - lead, group[-1].after_end + tail),
            )
        ]
        yield f"@@ -{ranges[0]} +{ranges[1]} @@ {_scope(group[0], before, after)}"
        at = group[0].after - lead
        for change in group:
            yield from (f" {line}" for line in after.lines[at : change.after])
            yield from change.signed(before, after)
            at = change.after_end
        yield from (f" {line}" for line in after.lines[at : at + tail])


@dataclass(frozen=True)
class _Change:
    """Lines [before, before_end) of the earlier script became lines [after, after_end) of the later one."""

    before: int
    before_end: int
    after: int
    after_end: int

    @property
    def added(self) -> bool:
        return self.after_end > self.after

    def says(self, before: Stage, after: Stage) -> Sequence[str]:
        """The added lines, or the removed ones if none is added."""
        return (
            after.lines[self.after : self.after_end]
            if self.added
            else before.lines[self.before : self.before_end]
        )

    def signed(self, before: Stage, after: Stage) -> list[str]:
        removed = [f"-{line}" for line in before.lines[self.before : self.before_end]]
        return removed + [f"+{line}" for line in after.lines[self.after : self.after_end]]

    def moved(self, distance: int) -> _Change:
        return _Change(
            *(edge + distance for edge in (self.before, self.before_end, self.after, self.after_end))
        )


def _changes(before: Sequence[str], after: Sequence[str]) -> list[_Change]:
    changes = [
        _Change(i1, i2, j1, j2)
        for tag, i1, i2, j1, j2 in match_lines(before, after).get_opcodes()
        if tag != "equal"
    ]
    for index, change in enumerate(changes):
        floor = changes[index - 1].after_end if index else 0
        ceiling = changes[index + 1].after if index + 1 < len(changes) else len(after)
        changes[index] = _slide(change, before, after, floor, ceiling)
    return changes


def _slide(change: _Change, before: Sequence[str], after: Sequence[str], floor: int, ceiling: int) -> _Change:
    """The same change at the place where its first line is indented least."""
    if change.added and change.before_end > change.before:
        return change
    lines, start, end = (
        (after, change.after, change.after_end)
        if change.added
        else (before, change.before, change.before_end)
    )
    up = 0
    while floor < change.after - up and lines[start - up - 1] == lines[end - up - 1]:
        up += 1
    down = 0
    while change.after_end + down < ceiling and lines[start + down] == lines[end + down]:
        down += 1

    def depth(distance: int) -> tuple[int, bool]:
        first = lines[start + distance]
        follows_text = start + distance > 0 and bool(lines[start + distance - 1].strip())
        indentation = len(first) - len(first.lstrip()) if first.strip() else len(max(lines, key=len))
        return indentation, follows_text

    return change.moved(min(range(-up, down + 1), key=depth))


def _successors(before: Stage, after: Stage) -> dict[str, str]:
    """Removed definitions, each with the new one that keeps the most of its lines, if it keeps enough."""
    kept: Counter[tuple[str, str]] = Counter()
    for at, there, size in match_lines(before.lines, after.lines).get_matching_blocks():
        for line in range(size):
            if before.lines[at + line].strip():
                kept[before.units[at + line], after.units[there + line]] += 1
    sizes = Counter(unit for unit, line in zip(before.units, before.lines, strict=True) if line.strip())
    return {
        gone: new
        for (gone, new), lines in reversed(kept.most_common())
        if gone not in after.units and new not in before.units and lines >= SUCCESSION * sizes[gone]
    }


def _name(unit: str, became: Mapping[str, str]) -> str:
    return became.get(unit, unit)


def _split(change: _Change, before: Stage, after: Stage, became: Mapping[str, str]) -> list[_Change]:
    """The change cut at top-level definitions; removed ones come before their replacements."""
    gone = _runs(before.units, change.before, change.before_end)
    pieces = []
    for start, end in _runs(after.units, change.after, change.after_end):
        same = [span for span in gone if _name(before.units[span[0]], became) == after.units[start]][:1]
        gone = [span for span in gone if span not in same]
        pieces.append(_Change(*(same or [(change.before_end, change.before_end)])[0], start, end))
    return [_Change(start, end, change.after, change.after) for start, end in gone] + pieces


def _runs(units: Sequence[str], start: int, end: int) -> list[tuple[int, int]]:
    cuts = [index for index in range(start, end) if index == start or units[index] != units[index - 1]]
    return list(pairwise([*cuts, end]))


def _hunk(group: list[_Change], unit: str, pieces: list[_Change], before: Stage, after: Stage) -> Hunk:
    first, last = pieces.index(group[0]), pieces.index(group[-1])
    floor = pieces[first - 1].after_end if first else 0
    ceiling = pieces[last + 1].after if last + 1 < len(pieces) else len(after.lines)
    lines: list[str] = []
    at = floor
    for piece in group:
        shown = _context(after, unit, max(at, piece.after - CONTEXT), piece.after)
        if lines and piece.after - at > 2 * CONTEXT:
            lines += [f" {line}" for line in _context(after, unit, at, at + CONTEXT)] + ["@@"]
        elif lines:
            shown = _context(after, unit, at, piece.after)
        lines += [f" {line}" for line in shown] + piece.signed(before, after)
        at = piece.after_end
    lines += [f" {line}" for line in _context(after, unit, at, min(at + CONTEXT, ceiling))]
    while lines and not lines[0][1:].strip():
        del lines[0]
    while lines and not lines[-1][1:].strip():
        del lines[-1]
    changed = group[0].after if any(piece.added for piece in group) else group[0].before
    return Hunk(_scope(group[0], before, after), changed + 1, lines)


def _context(after: Stage, unit: str, start: int, end: int) -> list[str]:
    return [after.lines[index] for index in range(start, end) if after.units[index] == unit]


def _scope(change: _Change, before: Stage, after: Stage) -> str:
    return after.scope(change.after) if change.added else before.scope(change.before)
