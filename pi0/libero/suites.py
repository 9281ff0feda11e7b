"""LIBERO's suites and tasks, from the installed package."""

from __future__ import annotations

import codecs
import difflib
import importlib.metadata
import io
import pickle
import runpy
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pi0.base.errors import InputError
from pi0.data.instructions import instruction_in
from pi0.libero.libero_import import libero_package_root

# Longest demonstration of each suite, rounded up: openpi examples/libero/main.py, OpenVLA's LIBERO evaluation.
HORIZONS = {
    "libero_spatial": 220,
    "libero_object": 280,
    "libero_goal": 300,
    "libero_10": 520,
    "libero_90": 400,
}


# The functions and classes in the pickle of an array.
_ARRAY_PARTS: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): codecs.encode,
}


class DamagedPackageError(InputError, ValueError):
    """A file of the installed LIBERO is missing or damaged."""


class RepeatedTaskError(InputError, ValueError):
    """A list of tasks names one of them twice."""


class UnknownTaskError(InputError, ValueError):
    """LIBERO has no such suite or task."""


@dataclass(frozen=True)
class Task:
    """One LIBERO task. `index` is its position in the suite (LIBERO's task order 0)."""

    suite: str
    index: int
    name: str
    prompt: str
    bddl_file: str
    init_states_file: str

    @property
    def horizon(self) -> int:
        """Control steps that an episode may take, without the settle steps."""
        return HORIZONS[self.suite]

    def recorded_init_states(self) -> np.ndarray:
        """LIBERO's recorded initial states, float64 [50, state size]: time, qpos, qvel.

        They are pickles: only files of the installed package are opened, and only arrays are read from them.

        Raises:
            ValueError: the file is not one of the installed package.
            DamagedPackageError: it is missing or damaged.
        """
        package = libero_package_root().resolve()
        file = Path(self.init_states_file).resolve()
        if not file.is_relative_to(package):
            raise ValueError(f"{file} is not one of LIBERO's own initial-state files and is not opened")
        try:
            with zipfile.ZipFile(file) as archive:
                (entry,) = (name for name in archive.namelist() if name.endswith("data.pkl"))
                return np.asarray(_ArrayUnpickler(io.BytesIO(archive.read(entry))).load(), dtype=np.float64)
        except (
            OSError,
            ValueError,
            EOFError,
            zipfile.BadZipFile,
            zlib.error,
            pickle.UnpicklingError,
        ) as error:
            raise DamagedPackageError(
                f"{file}: LIBERO's recorded initial states cannot be read ({error}); install its package again: "
                f"pip install --force-reinstall --no-deps hf-libero=={importlib.metadata.version('hf-libero')}"
            ) from error


class _ArrayUnpickler(pickle.Unpickler):
    """Reads NumPy arrays and refuses everything else."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ARRAY_PARTS[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"{module}.{name} has no place in an array") from None


def suite_tasks(suite: str) -> list[Task]:
    """All tasks of a suite, in LIBERO's order.

    Raises:
        UnknownTaskError: unknown suite, with the nearest known one.
    """
    if suite not in HORIZONS:
        raise UnknownTaskError(
            f"unknown suite {suite!r}{_nearest(suite, list(HORIZONS))}; known: {', '.join(HORIZONS)}"
        )
    root = libero_package_root()
    # Only this file is run: importing LIBERO's `benchmark` package would load torch, which simulators do not need.
    names = runpy.run_path(str(root / "benchmark" / "libero_suite_task_map.py"))["libero_task_map"][suite]
    return [
        Task(
            suite=suite,
            index=index,
            name=name,
            prompt=instruction_in(name),
            bddl_file=str(root / "bddl_files" / suite / f"{name}.bddl"),
            init_states_file=str(root / "init_files" / suite / f"{name}.pruned_init"),
        )
        for index, name in enumerate(names)
    ]


def find_tasks(suite: str, names: list[str | int]) -> list[Task]:
    """The tasks of a suite by index or name; an empty list of names means every task.

    Raises:
        UnknownTaskError: unknown suite, name or index, with the nearest known one.
        RepeatedTaskError: a task is named twice; its episodes would count twice.
    """
    tasks = suite_tasks(suite)
    if not names:
        return tasks
    by_name = {task.name: task for task in tasks}
    found = []
    for name in names:
        if isinstance(name, int) or str(name).isdigit():
            if not 0 <= int(name) < len(tasks):
                raise UnknownTaskError(f"{suite} has tasks 0 to {len(tasks) - 1}, not {name}")
            found.append(tasks[int(name)])
        elif name in by_name:
            found.append(by_name[name])
        else:
            raise UnknownTaskError(f"unknown task {name!r} in {suite}{_nearest(name, list(by_name))}")
    for number, task in enumerate(found):
        if task in found[:number]:
            raise RepeatedTaskError(
                f"task {task.index} of {suite} ({task.name}) is named twice, and its episodes would count twice; "
                "name it once"
            )
    return found


def _nearest(name: str, known: list[str]) -> str:
    match = difflib.get_close_matches(name, known, n=1, cutoff=0.3)
    return f"; did you mean {match[0]!r}?" if match else ""
