"""The pages of `docs/stages`: what each stage changes, hunk by hunk, why, and the test that shows it.

They are made from the stage scripts and the notes on them (`pi0/stages/notes.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pi0.base.errors import InputError
from pi0.base.typed_yaml import ConfigError
from pi0.stages.diff import Hunk, hunks
from pi0.stages.notes import Note, match, missing_tests, read_notes
from pi0.stages.scripts import Stage, compare, find_stages

PAGES = Path("docs/stages")
_UP = "../../"  # from a page to the repository


def render_pages(root: Path) -> tuple[dict[Path, str], list[str]]:
    """All pages by path, and the mistakes in notes, a line each; a page with wrong notes is left out."""
    stages = find_stages(root)
    pages = {root / PAGES / "README.md": _index(stages)}
    problems: list[str] = []
    for position, stage in enumerate(stages):
        try:
            pages[root / PAGES / f"{stage.label}.md"] = _page(root, stages, position)
        except InputError as error:
            problems += str(error).splitlines()
    named = {page.name for page in pages} | {f"{stage.label}.md" for stage in stages}
    for path in sorted((root / PAGES).glob("*.md")):
        if path.name not in named:
            problems.append(f"{path}: there is no such stage; delete the page")
    for path in sorted((root / PAGES / "notes").glob("*")):
        if path.name not in {f"{stage.label}.yaml" for stage in stages}:
            problems.append(f"{path}: there is no such stage; delete the notes")
    return pages, problems


def _page(root: Path, stages: Sequence[Stage], position: int) -> str:
    stage = stages[position]
    before = stages[position - 1] if position else None
    notes = read_notes(root / PAGES / "notes" / f"{stage.label}.yaml")
    changes = hunks(before, stage, [anchor for note in notes.notes for anchor in note.anchors])
    problems: list[str] = missing_tests(notes, root)
    try:
        covered = match(notes, stage, changes)
    except ConfigError as error:
        raise ConfigError("\n".join([str(error), *problems])) from None
    if problems:
        raise ConfigError("\n".join(problems))
    lines = [f"# Stage {stage.label}: {stage.capability}", "", _summary(before, stage), ""]
    lines += [notes.adds.strip(), "", "## Run it", "", *_block("sh", stage.commands.splitlines()), ""]
    lines += ["## What changes, and why" if before else "## Its parts", ""]
    for note, parts in covered:
        if not note.minor:
            lines += _section(note, parts, before, stage)
    if minor := [each for each in covered if each[0].minor]:
        lines += ["## Small changes" if before else "## The rest", ""]
        for note, parts in minor:
            lines += _section(note, parts, before, stage)
    neighbours = [
        f"[{word}: stage {other.label}]({other.label}.md)"
        for word, others in (("previous", stages[:position][-1:]), ("next", stages[position + 1 :][:1]))
        for other in others
    ]
    lines += [" · ".join([*neighbours, "[all stages](README.md)"])]
    return "\n".join(lines) + "\n"


def _summary(before: Stage | None, stage: Stage) -> str:
    script = f"[`{stage.path.name}`]({_UP}{stage.path.name})"
    if before is None:
        return f"{script}, {len(stage.lines)} lines, is the first stage: the others grow from it."
    counts = compare(before, stage)
    return (
        f"{script}, {len(stage.lines)} lines, grows from [stage {before.label}]({before.label}.md): "
        f"{counts.added} lines added, {counts.removed} removed, {100 * counts.survive:.1f}% of stage "
        f"{before.label}'s lines unchanged. In a terminal: "
        f"`python -m pi0.stages diff {before.number} {stage.number}`."
    )


def _section(note: Note, parts: Sequence[Hunk], before: Stage | None, stage: Stage) -> list[str]:
    lines = [f"### {note.title}", ""]
    if note.why:
        lines += [note.why.strip(), ""]
    for hunk in parts:
        source = before if hunk.only_removes and before else stage
        end = "" if before else f"-L{hunk.line + len(hunk.lines) - 1}"
        link = f"[{source.path.name}:{hunk.line}]({_UP}{source.path.name}#L{hunk.line}{end})"
        code = hunk.lines if before else hunk.changed
        lines += [f"`{hunk.scope}`, {link}", "", *_block("diff" if before else "python", code), ""]
    if note.without:
        lines += [f"**Without it:** {note.without.strip()}", ""]
    if note.tests:
        links = [f"[`{test}`]({_UP}{test.partition('::')[0]})" for test in note.tests]
        lines += [f"**Shown by:** {links[0]}"] if len(links) == 1 else ["**Shown by:**", ""]
        lines += [*(f"- {link}" for link in links if len(links) > 1), ""]
    return lines


def _block(language: str, code: Sequence[str]) -> list[str]:
    # A fence must be longer than any inside it.
    fence = "````" if any("```" in line for line in code) else "```"
    return [f"{fence}{language}", *code, fence]


def _index(stages: Sequence[Stage]) -> str:
    lines = [
        "# The stages",
        "",
        "Each stage is a complete script that adds one capability to the one before. A page explains what a",
        "stage changes, hunk by hunk: why it is there, what breaks without it, and the test that shows it.",
        "",
        "| stage | adds | lines | added | removed | of the stage before, unchanged |",
        "|---|---|---|---|---|---|",
    ]
    for before, stage in zip([None, *stages], stages, strict=False):
        cells = [f"[{stage.label}]({stage.label}.md)", stage.capability, str(len(stage.lines)), "", "", ""]
        if before:
            counts = compare(before, stage)
            cells[3:] = [str(counts.added), str(counts.removed), f"{100 * counts.survive:.1f}%"]
        lines.append(f"| {' | '.join(cells)} |")
    commands = [
        f"{'python -m pi0.stages':33}# this table",
        f"{f'python -m pi0.stages diff {stages[0].number} {stages[-1].number}':33}# any two stages",
        f"{'python -m pi0.stages pages':33}# write these pages again",
    ]
    lines += ["", *_block("sh", commands), ""]
    lines += [
        "The pages are generated: edit the scripts and `notes/NN.yaml`, not them.",
        "`python -m pi0.stages pages --help` says how notes are written; `pages --check` fails where a page is out of date.",
    ]
    return "\n".join(lines) + "\n"
