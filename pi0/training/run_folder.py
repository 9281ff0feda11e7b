"""The folder of a run: its name holds the run's name and time, `--resume` finds it, one process writes to it.

It holds config.yaml, the settings with which the run was last started. They are nested plain values, with the names
of their fixed keys (`pi0.base.typed_yaml.fixed_keys`), so any trainer can use this module.
"""

from __future__ import annotations

import fcntl
import os
import re
import time
from collections.abc import Collection
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from pi0.base.errors import OutputError
from pi0.base.files import writable_dir, write_whole


def new_run_dir(output_dir: str, name: str, config: dict[str, Any]) -> Path:
    """Make `output_dir/name-DATE-TIME` and write the configuration into it.

    Raises:
        OutputError: the folder cannot be made or written.
    """
    folder = writable_dir(output_dir)
    while True:
        run_dir = folder / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
        try:
            run_dir.mkdir(parents=True)  # a name may have folders in it
        except FileExistsError:
            time.sleep(0.1)  # another run has started in the same second
        else:
            _write_config(run_dir, config)
            return run_dir


def newest_run(output_dir: str, name: str, config: dict[str, Any], fixed: Collection[str]) -> Path:
    """The newest `output_dir/name-DATE-TIME` with checkpoints; prints how its configuration differed.

    If none has a checkpoint, it is the newest with an empty folder of checkpoints.

    Args:
        output_dir, name: as for `new_run_dir`.
        config: configuration for the resumed run.
        fixed: dotted names of the keys that must keep their values.
    Raises:
        OutputError: there is no such folder, or a fixed key differs.
    """
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
    earlier = yaml.safe_load((runs[-1] / "config.yaml").read_text())
    differences = _differences(earlier, config)
    if changed := [difference for difference in differences if difference[0] in fixed]:
        changes = "; ".join(f"{key} was {was!r} and is {now!r}" for key, was, now in changed)
        raise OutputError(
            f"{runs[-1]} cannot be resumed with other settings ({changes}); restore them, or start a new run with "
            f"policy_path = {runs[-1] / 'policy'}"
        )
    for key, was, now in differences:
        print(f"resuming with {key} = {now!r}, which was {was!r}")
    return runs[-1]


def take_run(run_dir: Path, config: dict[str, Any]) -> None:
    """Lock a run's folder for this process until it ends, and write its configuration into the folder.

    Raises:
        OutputError: another process has taken it, or the folder cannot be written.
    """
    lock = os.open(run_dir / ".lock", os.O_CREAT | os.O_RDWR, 0o644)  # open until the process ends
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(lock)
        raise OutputError(
            f"another process writes to {run_dir}; stop it first, or choose another exp_name"
        ) from error
    _write_config(run_dir, config)


def _write_config(run_dir: Path, config: dict[str, Any]) -> None:
    try:
        write_whole(run_dir / "config.yaml", yaml.safe_dump(config, sort_keys=False))
    except OSError as error:
        raise OutputError(
            f"cannot write to {run_dir}: {error.strerror}; make room, or choose another folder"
        ) from error


def _differences(earlier: Any, now: Any, key: str = "") -> list[tuple[str, Any, Any]]:
    """Each key of `now` whose value differs: dotted name, earlier value (None if missing), current value."""
    if isinstance(now, dict):
        sections = earlier if isinstance(earlier, dict) else {}
        return [
            difference
            for name in now
            for difference in _differences(sections.get(name), now[name], f"{key}.{name}" if key else name)
        ]
    return [] if earlier == now else [(key, earlier, now)]
