"""The page about a run, as HTML: each section is a function of the run's record."""

from __future__ import annotations

import base64
import time
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any
from urllib.parse import quote

from pi0.base.stats import format_rate, paired_difference, wilson_interval
from pi0.report.declaration import Metric
from pi0.report.plots import Picture
from pi0.report.record import Row, RunRecord, conditions, evaluation_counts, value

EMBEDDED_VIDEO_BYTES = 12 * 2**20  # all videos in the page together; a phone still opens it
LATEST_STEPS = 20  # rows of the table of steps
RECENT_STEPS = 5  # steps whose mean is shown as the current value
CSS = Path(__file__).with_suffix(".css")

# The content security policy lets the browser load nothing and run no script, whatever a name may hold.
PAGE = Template("""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; media-src data:; \
style-src 'unsafe-inline'">
<link rel="icon" href="data:,">
<title>$title</title>
<style>
$css</style>
</head>
<body>
$body
</body>
</html>
""")


def build_page(record: RunRecord, pictures: Sequence[Picture]) -> str:
    """The page's HTML."""
    state = "finished" if record.finished else f"in progress, {_step_of(record)}"
    figures = "".join(
        _card(picture.title, f'<figure class="plot" id="{picture.name}">{picture.svg}</figure>')
        for picture in pictures
    )
    parts = [
        _header(record, state),
        _headline(record),
        _results(record),
        f'<div class="plots">{figures}</div>',
        _tasks_table(record),
        _steps_table(record),
        _troubles(record),
        _videos(record.run_dir),
        _protocol(record),
        _configuration(record),
    ]
    body = "\n".join(part for part in parts if part)
    return PAGE.substitute(title=escape(f"{record.name}: {state}"), css=CSS.read_text(), body=body)


def _step_of(record: RunRecord) -> str:
    planned = record.steps_planned
    return f"step {record.steps_done}" + (f" of {planned}" if planned is not None else "")


def _header(record: RunRecord, state: str) -> str:
    facts = [_step_of(record)] if record.finished else []
    seconds = record.results.get("seconds", record.steps[-1].get("seconds") if record.steps else None)
    if seconds is not None:
        facts.append(
            f"{_duration(seconds)} so far" if not record.finished else f"{_duration(seconds)} in all"
        )
    if left := _seconds_left(record):
        facts.append(f"about {_duration(left)} of training left")
    facts.append(f"written {time.strftime('%Y-%m-%d %H:%M')}")
    bar = ""
    if not record.finished and record.steps_planned:
        bar = f'<progress max="{record.steps_planned}" value="{record.steps_done}">{_step_of(record)}</progress>'
    kind = "state finished" if record.finished else "state"
    return (
        f'<header><h1>{escape(record.name)}</h1><p><span class="{kind}">{escape(state)}</span> '
        f'<span class="quiet">{escape("; ".join(facts))}</span></p>{bar}</header>'
    )


def _seconds_left(record: RunRecord) -> float | None:
    timed = [row for row in record.steps if "seconds" in row]
    if record.finished or record.steps_planned is None or len(timed) < 2:
        return None
    a_step = (timed[-1]["seconds"] - timed[0]["seconds"]) / (timed[-1]["step"] - timed[0]["step"])
    return max(0.0, a_step * (record.steps_planned - record.steps_done))


def _headline(record: RunRecord) -> str:
    """Success before and after, or the latest values of a run in progress."""
    tiles = [
        _success_tile(f"Success, {label}", *evaluation_counts(score))
        for label, _, score in record.first_and_last
    ]
    if change := record.results.get("change"):
        low, high = change["interval_95"]
        tiles.append(
            _tile(
                "Change, paired",
                f"{100 * change['difference']:+.1f} points",
                f"95% interval {100 * low:+.1f} to {100 * high:+.1f}; "
                f"exact McNemar p = {change['mcnemar_p']:.2g}{_gained_and_lost(record.results)}",
            )
        )
    elif record.steps:
        tiles += [_latest_tile(record, metric) for metric in record.declaration.metrics if metric.tile]
    if not tiles:
        return '<p class="card wide">No step and no score has been recorded yet.</p>'
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _tile(title: str, number: str, detail: str) -> str:
    return (
        f'<div class="tile">{escape(title)}<strong>{escape(number)}</strong>'
        f'<span class="quiet">{escape(detail)}</span></div>'
    )


def _success_tile(title: str, successes: int, n: int) -> str:
    share = f"{100 * successes / n:.1f}%" if n else "no episodes"
    return _tile(title, share, format_rate(successes, n))


def _latest_tile(record: RunRecord, metric: Metric) -> str:
    """A metric's mean in the latest steps, and its range in all steps."""
    recent = record.steps[-RECENT_STEPS:]
    title = f"{metric.tile}, last {_count(len(recent), 'step')}"
    if metric.rate:
        return _success_tile(title, *record.success_counts(recent))
    now, ever = (
        [found for row in rows if (found := value(row, metric.name)) is not None]
        for rows in (recent, record.steps)
    )
    if not now:
        return _tile(title, "not recorded", "")
    mean = sum(map(_number, now)) / len(now)
    low, high = min(_number(found, "min") for found in ever), max(_number(found, "max") for found in ever)
    detail = (
        f"{metric.unit}; {_text(metric, low)} to {_text(metric, high)} in {_count(len(record.steps), 'step')}"
    )
    return _tile(title, _text(metric, mean), detail)


def _number(found: Any, part: str = "mean") -> Any:
    """A metric's number: a list's length; a distribution's `part`, or its mean if it has no such part."""
    if isinstance(found, dict):
        return found.get(part, found.get("mean"))
    return len(found) if isinstance(found, list) else found


def _text(metric: Metric, number: float) -> str:
    return _duration(number) if metric.format == "duration" else format(number, metric.format)


def _rate(successes: int, n: int) -> str:
    """A rate for a narrow cell: count and rate on one line, the interval below."""
    if not n:
        return ""
    low, high = wilson_interval(successes, n)
    return f"{successes}/{n} ({100 * successes / n:.1f}%)\n{100 * low:.1f} to {100 * high:.1f}"


def _gained_and_lost(results: Row) -> str:
    before, after = (
        [o.get("success") for o in results[when].get("outcomes", [])] for when in ("before", "after")
    )
    if len(before) != len(after):
        return ""
    # An episode that broke has no success.
    ran = [pair for pair in zip(before, after, strict=True) if None not in pair]
    if not ran:
        return ""
    pair = paired_difference([first for first, _ in ran], [second for _, second in ran])
    return f"; {pair.gained} gained and {pair.lost} lost of {pair.n} on the same states and noise"


def _results(record: RunRecord) -> str:
    """The table that the trainer has written into results.json, its first row as the head."""
    head, *rows = record.results.get("table", [[]])
    return _card("Results", _table(head, rows), "wide") if rows else ""


def _tasks_table(record: RunRecord) -> str:
    """Success of each task: all practice, recent practice, every evaluation; and conditions of its goal, if several."""
    if not record.tasks:
        return ""
    recent = record.steps[-RECENT_STEPS:]
    head = ["task"]
    practised = [record.steps, recent] if record.steps and record.declaration.success else []
    if practised:
        head += ["practice, all steps", f"practice, last {_count(len(recent), 'step')}"]
    # The learning curve has all evaluations; here many columns would hide the first and the last.
    scores = record.evaluations if len(record.evaluations) <= 3 else record.first_and_last
    head += [f"evaluation, {label}" for label, _, _ in scores]
    rows = []
    for task in [*record.tasks, None]:
        counts = [record.success_counts(steps, task) for steps in practised]
        counts += [evaluation_counts(score, task) for _, _, score in scores]
        name = "all tasks" if task is None else task.replace("_", " ")
        rows.append([name, *(_rate(*count) for count in counts)])
        for words in [] if task is None else conditions((score for _, _, score in scores), task):
            held = [evaluation_counts(score, task, words) for _, _, score in scores]
            rows.append([f"– {words}", *("" for _ in practised), *(_rate(*count) for count in held)])
    notes = [
        f'<p class="quiet">{escape(metric.note.format(_count(total, metric.unit.removesuffix("s"))))}</p>'
        for metric in record.declaration.metrics
        if metric.note and (total := sum(value(row, metric.name) or 0 for row in record.steps))
    ]
    table = _table(head, rows, "rates", total=True) + "".join(notes)
    return _card("Success rates, counts, 95% intervals", table, "wide")


def _steps_table(record: RunRecord) -> str:
    """The latest steps, newest first, without empty columns."""
    latest = record.steps[: -LATEST_STEPS - 1 : -1]
    columns = {
        metric.column: [_cell(record, row, metric) for row in latest]
        for metric in record.declaration.metrics
        if metric.column
    }
    columns = {title: cells for title, cells in columns.items() if any(cells)}
    if not columns:
        return ""
    title = f"Last {_count(len(latest), 'step')}" if len(latest) < len(record.steps) else "Steps"
    return _card(title, _table(columns, zip(*columns.values(), strict=True), kind="numbers"), "wide")


def _cell(record: RunRecord, row: Row, metric: Metric) -> str:
    if metric.rate:
        successes, n = record.success_counts([row])
        return f"{successes}/{n} ({100 * successes / n:.0f}%)" if n else ""
    number = _number(value(row, metric.name))
    return "" if number is None else _text(metric, number)


def _troubles(record: RunRecord) -> str:
    """Lost workers, failed rollouts, broken episodes and unreadable lines, or a sentence that there were none."""
    watched = [(metric.name, *metric.trouble) for metric in record.declaration.metrics if metric.trouble]
    lines = [
        f"step {row['step']}: {what}{line}"
        for name, what, _ in watched
        for row in record.steps
        for line in row.get(name, [])
    ]
    lines += [
        f"evaluation, {label}: {broken}"
        for label, _, score in record.evaluations
        for broken in score.get("broken", [])
    ]
    lines += [f"metrics.jsonl, line {number}: unreadable, left out" for number in record.unreadable]
    none = [none for name, _, none in watched if any(name in row for row in record.steps)]
    if lines:
        content = "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"
    elif none:
        content = f"<p>In {_count(len(record.steps), 'step')} {' and '.join(none)}.</p>"
    else:
        return ""
    return _card("Lost workers and failures", content, "wide")


def _videos(run_dir: Path) -> str:
    """The run's own videos first, then those in its folders; they are embedded while there is room."""
    paths = sorted(run_dir.rglob("*.mp4"), key=lambda path: (len(path.relative_to(run_dir).parts), path))
    room, films, links = EMBEDDED_VIDEO_BYTES, [], []
    for path in paths:
        name = path.relative_to(run_dir).as_posix()
        content = path.read_bytes() if path.stat().st_size <= room else None
        if content is None:
            links.append(f'<li><a href="{escape(quote(name))}">{escape(name)}</a></li>')
        elif b"moov" in content:  # the index is written last: a video without it is not finished
            room -= len(content)
            data = base64.b64encode(content).decode()
            films.append(
                f'<figure><video controls muted loop playsinline preload="metadata" aria-label="{escape(name)}" '
                f'src="data:video/mp4;base64,{data}"></video><figcaption>{escape(name)}</figcaption></figure>'
            )
    if not films and not links:
        return ""
    section = f'<div class="cards">{"".join(films)}</div>'
    if links:
        section += f"<p>Too big for this page, but in the same folder:</p><ul>{''.join(links)}</ul>"
    return _card("Videos", section, "wide")


def _protocol(record: RunRecord) -> str:
    """How the scores were measured, and on which machine."""
    rows = [list(pair) for pair in _flat(record.protocol)]
    rows += [[f"machine.{name}", value] for name, value in _flat(record.results.get("machine", {}))]
    rows += [[name, str(record.results[name])] for name in ("command", "date") if name in record.results]
    return _card("Protocol", _table(["", ""], rows), "wide") if rows else ""


def _configuration(record: RunRecord) -> str:
    if not record.config_text:
        return ""
    return (
        '<section class="card wide"><details><summary>Configuration</summary>'
        f"<pre>{escape(record.config_text)}</pre></details></section>"
    )


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Nested values as (dotted name, text)."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _flat(item, f"{name}.{key}" if name else str(key))
    else:
        yield name, ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _card(title: str, content: str, kind: str = "") -> str:
    return f'<section class="{f"card {kind}".strip()}"><h2>{escape(title)}</h2>{content}</section>'


def _table(head: Iterable[str], rows: Iterable[Sequence[str]], kind: str = "", total: bool = False) -> str:
    """A table with a header row, and a header cell in each row; `total` marks the last row."""
    rows = list(rows)
    lines = []
    for number, (first, *others) in enumerate(rows):
        mark = ' class="total"' if total and number == len(rows) - 1 else ""
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in others)
        lines.append(f'<tr{mark}><th scope="row">{escape(first)}</th>{cells}</tr>')
    titles = "".join(f'<th scope="col">{escape(title)}</th>' for title in head)
    header = f"<thead><tr>{titles}</tr></thead>" if any(head) else ""
    return f'<div class="scroll"><table class="{kind}">{header}<tbody>{"".join(lines)}</tbody></table></div>'


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
