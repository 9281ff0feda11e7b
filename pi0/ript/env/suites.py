"""LIBERO's suites and tasks, as the installed package lists them."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pi0.errors import InputError
from pi0.ript.env.libero_import import libero_package_root, prepare_libero

# Longest demonstration of each suite, rounded up: openpi examples/libero/main.py, OpenVLA's LIBERO evaluation.
HORIZONS = {
    "libero_spatial": 220,
    "libero_object": 280,
    "libero_goal": 300,
    "libero_10": 520,
    "libero_90": 400,
}


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
        """Control steps an episode may take, settle steps not counted."""
        return HORIZONS[self.suite]

    def recorded_init_states(self) -> np.ndarray:
        """LIBERO's recorded initial states, float64 [50, state size]: time, qpos, qvel.

        They are pickles; only files of the installed package are ever opened.
        """
        import torch

        prepare_libero()
        package = libero_package_root().resolve()
        file = Path(self.init_states_file).resolve()
        if not file.is_relative_to(package):
            raise ValueError(f"{file} is not one of LIBERO's own initial-state files and is not opened")
        return np.asarray(torch.load(file, weights_only=False), dtype=np.float64)


def suite_tasks(suite: str) -> list[Task]:
    """All tasks of a suite, in LIBERO's order.

    Raises:
        UnknownTaskError: unknown suite, with the nearest known one.
    """
    if suite not in HORIZONS:
        raise UnknownTaskError(
            f"unknown suite {suite!r}{_nearest(suite, list(HORIZONS))}; known: {', '.join(HORIZONS)}"
        )
    prepare_libero()
    root = libero_package_root()
    from libero.libero.benchmark import task_maps

    return [
        Task(
            suite=suite,
            index=index,
            name=task.name,
            prompt=task.language,
            bddl_file=str(root / "bddl_files" / task.problem_folder / task.bddl_file),
            init_states_file=str(root / "init_files" / task.problem_folder / task.init_states_file),
        )
        for index, task in enumerate(task_maps[suite].values())
    ]


def find_tasks(suite: str, names: list[str | int]) -> list[Task]:
    """The tasks of a suite by index or name; an empty list of names is every task.

    Raises:
        UnknownTaskError: unknown suite, name or index, with the nearest known one.
    """
    tasks = suite_tasks(suite)
    if not names:
        return tasks
    by_name = {task.name: task for task in tasks}
    found = []
    for name in names:
        if isinstance(name, int) or str(name).isdigit():
            if int(name) >= len(tasks):
                raise UnknownTaskError(f"{suite} has tasks 0 to {len(tasks) - 1}, not {name}")
            found.append(tasks[int(name)])
        elif name in by_name:
            found.append(by_name[name])
        else:
            raise UnknownTaskError(f"unknown task {name!r} in {suite}{_nearest(name, list(by_name))}")
    return found


def _nearest(name: str, known: list[str]) -> str:
    match = difflib.get_close_matches(name, known, n=1, cutoff=0.3)
    return f"; did you mean {match[0]!r}?" if match else ""
