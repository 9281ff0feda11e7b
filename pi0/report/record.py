"""What a run's folder says, finished or still in progress: configuration, steps, evaluations, results."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pi0.base.errors import InputError, MissingFileError

Row = dict[str, Any]  # a step's metrics or an evaluation's score; absent and null are the same


class RunRecordError(InputError, ValueError):
    """A file in a run's folder cannot be read as what it should be."""


@dataclass
class RunRecord:
    """A run as its folder describes it at one moment.

    Attributes:
        steps: metrics of each training step, by step; a step that was run again after a resume counts once,
            as it went the last time.
        evaluations: (label, place, score) in order: before training, the periodic ones, after. `place` is the
            number of training steps done before it, as far as recorded.
        results: results.json; empty while the run is in progress.
        unreadable: numbers of the lines of metrics.jsonl that are no metrics, the unfinished last one left out.
    """

    run_dir: Path
    config: Row
    config_text: str
    steps: list[Row]
    evaluations: list[tuple[str, float, Row]]
    results: Row
    protocol: Row
    unreadable: list[int]

    @property
    def name(self) -> str:
        """The folder's name, which holds the experiment's name and date."""
        return self.run_dir.resolve().name

    @property
    def finished(self) -> bool:
        """Whether the scores after training are there."""
        return "after" in self.results

    @property
    def steps_done(self) -> int:
        """Training steps done."""
        return int(self.steps[-1]["step"]) + 1 if self.steps else 0

    @property
    def steps_planned(self) -> int | None:
        """`training.num_train_steps`, if the configuration says it."""
        planned = self.setting("training", "num_train_steps")
        return planned if isinstance(planned, int) else None

    @property
    def first_and_last(self) -> list[tuple[str, float, Row]]:
        """The first and the last of the evaluations, if there are as many."""
        return self.evaluations if len(self.evaluations) < 3 else [self.evaluations[0], self.evaluations[-1]]

    def setting(self, section: str, key: str) -> Any:
        """A value of the configuration; None if it is not there."""
        keys = self.config.get(section)
        return keys.get(key) if isinstance(keys, dict) else None

    @property
    def tasks(self) -> list[str]:
        """Names of all tasks that were scored or practised, in the order of the scores."""
        scored = [name for _, _, score in self.evaluations for name in score.get("tasks", {})]
        practised = [name for row in self.steps for name in row.get("tasks", {})]
        return list(dict.fromkeys(scored + practised))


def read_run(run_dir: str | Path) -> RunRecord:
    """Read a run's folder.

    Raises:
        MissingFileError: there is no such folder, or it is not a run's.
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
    config_text, config = _read_config(run_dir / "config.yaml")
    results = _read_json(run_dir / "results.json", dict)
    steps, unreadable = _read_steps(run_dir / "metrics.jsonl")
    steps = steps or _latest_of_each_step(results.get("history", []))
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
        steps=steps,
        evaluations=[entry for entry in evaluations if evaluation_counts(entry[2])[1]],
        results=results,
        protocol=_read_json(run_dir / "protocol.json", dict) or results.get("protocol", {}),
        unreadable=unreadable,
    )


def success_counts(rows: Sequence[Row], task: str | None = None) -> tuple[int, int]:
    """Successes and rollouts in practice, of one task or of all, summed over steps."""
    counts: list[Sequence[int]] = []
    for row in rows:
        if task is not None:
            counts += [row["tasks"][task]] if task in row.get("tasks", {}) else []
        elif "successes" in row and "rollouts" in row:
            counts.append((row["successes"], row["rollouts"]))
        else:
            counts += row.get("tasks", {}).values()
    return sum(int(count[0]) for count in counts), sum(int(count[1]) for count in counts)


def evaluation_counts(score: Row, task: str | None = None) -> tuple[int, int]:
    """Successes and episodes of an evaluation, of one task or of all; (0, 0) for a task that was not scored."""
    cell = score if task is None else score.get("tasks", {}).get(task, {})
    return int(cell.get("successes", 0)), int(cell.get("episodes", 0))


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
    """A JSON file's content, nulls left out; an empty `kind` if there is no such file."""
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
    return [_as_today(row) for _, row in sorted({row["step"]: row for row in rows}.items())]


def _as_today(row: Row) -> Row:
    """Earlier runs only counted rollouts that failed."""
    failed = row.get("failed_rollouts")
    return row | {"failed_rollouts": failed * ["cause not recorded"]} if isinstance(failed, int) else row


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value
