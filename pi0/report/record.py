"""Reads the folder of a run, finished or in progress: configuration, steps, evaluations, results."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pi0.base.errors import InputError, MissingFileError
from pi0.report.declaration import FILE, Declaration

Row = dict[str, Any]  # a step's metrics or an evaluation's score; absent and null are the same


class RunRecordError(InputError, ValueError):
    """A file in a run's folder is damaged."""


@dataclass
class RunRecord:
    """The content of a run's folder at one moment.

    Attributes:
        run_dir: the folder.
        config: configuration of the run, with its text in `config_text`.
        steps: metrics of each training step, by step. If a step was run again after a resume, only the last one counts.
        evaluations: (label, place, score) in order: before training, the periodic ones, after. `place` is the
            number of training steps done before it, as far as recorded.
        results: results.json; empty while the run is in progress.
        protocol: protocol of the evaluations.
        unreadable: numbers of the lines of metrics.jsonl that hold no metrics, without an unfinished last line.
        declaration: what the metrics are, and where they are shown.
    """

    run_dir: Path
    config: Row
    config_text: str
    steps: list[Row]
    evaluations: list[tuple[str, float, Row]]
    results: Row
    protocol: Row
    unreadable: list[int]
    declaration: Declaration

    @property
    def name(self) -> str:
        """The folder's name, which holds the experiment's name and date."""
        return self.run_dir.resolve().name

    @property
    def finished(self) -> bool:
        """Whether results.json exists; a run writes it at its end."""
        return bool(self.results)

    @property
    def steps_done(self) -> int:
        """Training steps done."""
        return int(self.steps[-1]["step"]) + 1 if self.steps else 0

    @property
    def steps_planned(self) -> int | None:
        """Number of all training steps, if the configuration has it."""
        planned = self.setting(self.declaration.planned)
        return planned if isinstance(planned, int) else None

    @property
    def first_and_last(self) -> list[tuple[str, float, Row]]:
        """The first and the last evaluation; fewer if there are fewer."""
        return self.evaluations if len(self.evaluations) < 3 else [self.evaluations[0], self.evaluations[-1]]

    def setting(self, key: str) -> Any:
        """A value of the configuration by its dotted key; None if it is missing."""
        return look_up(self.config, key.split("."))

    @property
    def tasks(self) -> list[str]:
        """Names of all tasks that were evaluated or practised, in the order of the evaluations."""
        scored = [name for _, _, score in self.evaluations for name in score.get("tasks", {})]
        success = self.declaration.success
        practised = [name for row in self.steps for name in row.get(success.name, {})] if success else []
        return list(dict.fromkeys(scored + practised))

    def success_counts(self, rows: Sequence[Row], task: str | None = None) -> tuple[int, int]:
        """Successes and trials in training, of one task or of all, as sums over steps."""
        success = self.declaration.success
        if success is None:
            return 0, 0
        counts: list[Sequence[int]] = []
        for row in rows:
            by_task = row.get(success.name, {})
            if task is not None:
                counts += [by_task[task]] if task in by_task else []
            elif all(name in row for name in success.totals):
                counts.append([row[name] for name in success.totals])
            else:
                counts += by_task.values()
        return sum(int(count[0]) for count in counts), sum(int(count[1]) for count in counts)


def read_run(run_dir: str | Path, declaration: Declaration | None = None) -> RunRecord:
    """Read a run's folder.

    Args:
        run_dir: the folder.
        declaration: declaration of the run's metrics; None for the one in the folder.

    Raises:
        MissingFileError: there is no such folder, it is not a run's, or it holds no declaration and none is given.
        RunRecordError: a file in it is damaged. A half-written last line of metrics.jsonl is not damage.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise MissingFileError(
            f"{run_dir}: there is no such folder; name one that a stage script has written"
        )
    if not any((run_dir / name).exists() for name in ("config.yaml", "metrics.jsonl")):
        raise MissingFileError(
            f"{run_dir} is not a run's folder: neither config.yaml nor metrics.jsonl is in it; "
            "name the folder that a stage script printed"
        )
    declaration = declaration or _read_declaration(run_dir / FILE)
    config_text, config = _read_config(run_dir / "config.yaml")
    results = _read_json(run_dir / "results.json", dict)
    steps, unreadable = _read_steps(run_dir / "metrics.jsonl")
    steps = steps or _latest_of_each_step(results.get("history", []))
    listed = [metric.name for metric in declaration.metrics if metric.trouble]
    periodic = sorted(_read_json(run_dir / "metrics.json", list), key=lambda score: score.get("step", 0))
    evaluations = [(f"step {score['step']}", score["step"], score) for score in periodic if "step" in score]
    if "before" in results:
        evaluations.insert(0, ("before", 0, results["before"]))
    if "after" in results:
        evaluations.append(("after", steps[-1]["step"] + 1 if steps else 0, results["after"]))
    return RunRecord(
        run_dir=run_dir,
        config=config,
        config_text=config_text,
        steps=[_as_today(row, listed) for row in steps],
        evaluations=[entry for entry in evaluations if evaluation_counts(entry[2])[1]],
        results=results,
        protocol=_read_json(run_dir / "protocol.json", dict) or results.get("protocol", {}),
        unreadable=unreadable,
        declaration=declaration,
    )


def look_up(content: Any, keys: Sequence[str]) -> Any:
    """A value in nested dictionaries; None if it is missing."""
    for key in keys:
        content = content.get(key) if isinstance(content, dict) else None
    return content


def value(row: Row, name: str) -> Any:
    """A metric of a step by its declared name, such as "phases/update"; None if it is missing."""
    return look_up(row, name.split("/"))


def evaluation_counts(score: Row, task: str | None = None, condition: str | None = None) -> tuple[int, int]:
    """Successes and episodes of an evaluation, of one task or of all; (0, 0) for a task that was not evaluated.

    With `condition`, one of those of the task's goal, the first is the episodes at whose end it held.
    """
    cell = score if task is None else score.get("tasks", {}).get(task, {})
    if condition is not None:
        cell = cell.get("conditions", {}).get(condition, {})
    return int(cell.get("successes", 0)), int(cell.get("episodes", 0))


def conditions(scores: Iterable[Row], task: str) -> list[str]:
    """The conditions of a task's goal, where it has several."""
    found: dict[str, None] = {}
    for score in scores:
        found |= dict.fromkeys(score.get("tasks", {}).get(task, {}).get("conditions", {}))
    return [*found]


def _read_declaration(path: Path) -> Declaration:
    if not path.exists():
        raise MissingFileError(f"{path} is missing, which declares the run's metrics; restore it")
    content = _read_json(path, dict)
    try:
        return Declaration.from_dict(content)
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise RunRecordError(f"{path} does not declare metrics ({error}); delete it") from error


def _read_config(path: Path) -> tuple[str, Row]:
    if not path.exists():
        return "", {}
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RunRecordError(f"{path} is not YAML ({error}); restore the file the run wrote") from error
    return text, config if isinstance(config, dict) else {}


def _read_json(path: Path, kind: type) -> Any:
    """A JSON file's content without nulls; an empty `kind` if there is no such file."""
    if not path.exists():
        return kind()
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise RunRecordError(f"{path} is not JSON ({error}); restore or delete it") from error
    if not isinstance(content, kind):
        raise RunRecordError(f"{path} holds a {type(content).__name__}, not a {kind.__name__}; delete it")
    return _without_nulls(content)


def _read_steps(path: Path) -> tuple[list[Row], list[int]]:
    """Steps and the numbers of unreadable lines. The writer may be in the middle of the last line."""
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    rows, unreadable = [], []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(_without_nulls(row))
        elif number < len(lines):
            unreadable.append(number)
    return _latest_of_each_step(rows), unreadable


def _latest_of_each_step(rows: Sequence[Row]) -> list[Row]:
    return [row for _, row in sorted({row["step"]: row for row in rows}.items())]


def _as_today(row: Row, listed: Sequence[str]) -> Row:
    """Convert a step of an old run, which only counted failures, to lists of failures."""
    counted = {name: row[name] for name in listed if isinstance(row.get(name), int)}
    return row | {name: count * ["cause not recorded"] for name, count in counted.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value
