"""The folder of a run: its name holds the run's name and time, `--resume` finds it, one process writes to it.

It holds config.yaml, the settings with which the run was last started. They are nested plain values, with the names
of their fixed keys (`pi0.base.typed_yaml.fixed_keys`), so any trainer can use this module.
"""

from __future__ import annotations

import fcntl
import os
import re
import time
from collections.abc import Callable, Collection
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from pi0.base.errors import MissingFileError, OutputError
from pi0.base.files import writable_dir, write_whole


def name_problem(name: str) -> str | None:
    """Why a run's folder cannot have this name, or None."""
    if name not in ("", "..") and name == Path(name).name and name.isprintable():
        return None
    return "names the run's folder in output_dir, so it is one name without /; folders belong into output_dir"


def new_run_dir(output_dir: str, name: str, config: dict[str, Any]) -> Path:
    """Make `output_dir/name-DATE-TIME` and write the configuration into it.

    Raises:
        OutputError: the folder cannot be made or written.
    """
    folder = writable_dir(output_dir)
    while True:
        run_dir = folder / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
        try:
            run_dir.mkdir()
        except FileExistsError:
            time.sleep(0.1)  # another run has started in the same second
        else:
            _write_config(run_dir, config)
            return run_dir


def run_to_resume(
    folder: str,
    output_dir: str,
    name: str,
    config: dict[str, Any],
    fixed: Collection[str],
    comparable: Callable[[dict[str, Any]], dict[str, Any]] = dict,
    otherwise: str = "start a new run with policy_path = {run}/policy",
) -> Path:
    """The folder of the run that `--resume` means; prints how its configuration differed.

    Args:
        folder: the run's; "newest" means the newest `output_dir/name-DATE-TIME` with checkpoints.
        output_dir, name: as for `new_run_dir`.
        config: configuration for the resumed run.
        fixed: dotted names of the keys that must keep their values.
        comparable: returns settings in which whatever is the same is written in the same way.
        otherwise: what to do if a fixed key must differ; {run} is the run's folder.
    Raises:
        OutputError: there is no run to resume, or a fixed key differs.
        MissingFileError: its configuration is not there or damaged.
    """
    run = _newest_run(output_dir, name) if folder == "newest" else _run_of(folder)
    earlier = _read_config(run / "config.yaml")
    differing = {key for key, _, _ in differences(comparable(earlier), comparable(config))}
    found = [difference for difference in differences(earlier, config) if difference[0] in differing]
    if changed := [difference for difference in found if difference[0] in fixed]:
        changes = "; ".join(f"{key} was {was!r} and is {now!r}" for key, was, now in changed)
        raise OutputError(
            f"{run} cannot be resumed with other settings ({changes}); restore them, or {otherwise.format(run=run)}"
        )
    for key, was, now in found:
        print(f"resuming with {key} = {now!r}, which was {was!r}")
    return run


def _run_of(folder: str) -> Path:
    run = Path(folder)
    if not (run / "checkpoints").is_dir():
        what = "has no checkpoints" if run.is_dir() else "there is no such folder"
        raise OutputError(f"nothing to resume: {run}: {what}; name the folder of a run, as it was printed")
    return run


def _newest_run(output_dir: str, name: str) -> Path:
    """The newest run with a checkpoint; if none has one, the newest with an empty folder of checkpoints."""
    runs = sorted(
        path.parent
        for path in Path(output_dir).glob(f"{name}-*-*/checkpoints")
        if re.fullmatch(re.escape(name) + r"-\d{8}-\d{6}", path.parent.name)
    )
    if not runs:
        raise OutputError(
            f"nothing to resume: no {name}-DATE-TIME/checkpoints in {output_dir}; start without --resume"
        )
    runs.sort(key=lambda run: any(run.glob("checkpoints/step-*")))  # equal ones stay in the order of time
    return runs[-1]


def _read_config(path: Path) -> dict[str, Any]:
    """The settings with which a run was last started."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        problem = " ".join(str(error).split())
    else:
        if isinstance(content, dict):
            return content
        problem = "it holds no settings"
    raise MissingFileError(
        f"{path}: the settings of the run cannot be read ({problem}); restore the file: each run.json in "
        f"{path.parent / 'checkpoints'} holds them under facts, config"
    )


def take_run(run_dir: Path, config: dict[str, Any]) -> int:
    """Lock a run's folder for this process, and write its configuration into the folder.

    Returns the lock's descriptor, with which the lock ends: when it is closed, or with the process.

    Raises:
        OutputError: another process has taken it, or the folder cannot be written.
    """
    lock = os.open(run_dir / ".lock", os.O_CREAT | os.O_RDWR, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(lock)
        raise OutputError(
            f"another process writes to {run_dir}; stop it first, or choose another exp_name"
        ) from error
    _write_config(run_dir, config)
    return lock


def _write_config(run_dir: Path, config: dict[str, Any]) -> None:
    try:
        write_whole(run_dir / "config.yaml", yaml.safe_dump(config, sort_keys=False))
    except OSError as error:
        raise OutputError(
            f"cannot write to {run_dir}: {error.strerror}; make room, or choose another folder"
        ) from error


def differences(earlier: Any, now: Any, key: str = "") -> list[tuple[str, Any, Any]]:
    """Each key of `now` whose value differs: dotted name, earlier value (None if missing), current value."""
    if isinstance(now, dict):
        sections = earlier if isinstance(earlier, dict) else {}
        return [
            difference
            for name in now
            for difference in differences(sections.get(name), now[name], f"{key}.{name}" if key else name)
        ]
    return [] if earlier == now else [(key, earlier, now)]
