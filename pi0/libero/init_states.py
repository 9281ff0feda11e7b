"""The two pools of initial states, which never overlap.

Evaluation uses the 50 recorded states of each task, as in LIBERO's benchmark; for the tasks of a folder, which have none,
as many are drawn with a seed that training never has. Training states are drawn with a seed
from LIBERO's own placement distribution, in any number, and kept in a file with their provenance. If there are
demonstrations, their first states come first.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from xml.etree import ElementTree

import mujoco
import numpy as np

from pi0.base.errors import MissingFileError
from pi0.base.files import write_whole
from pi0.base.paths import cache_dir
from pi0.base.progress import progress
from pi0.data.demonstrations import DataError
from pi0.libero.settings import MAX_SEED, RECORDED_STATES
from pi0.libero.stepping import SETTLE_ACTION, InitState, TaskSim, state_hash
from pi0.libero.suites import Task, suite_tasks

if TYPE_CHECKING:
    from pi0.libero.worker import Worker, WorkerSpec

logger = logging.getLogger(__name__)

# Placement of the fixtures (cabinet, stove) for evaluation; recorded states do not hold it.
FIXTURE_MODES = {
    "libero_eval": "state i gets the (i+1)-th placement after env.seed(0), as LIBERO's evaluation scripts run",
    "pinned": "every state gets the first placement after env.seed(0)",
}
SETTLE_STEPS = 10
# Standard deviation (rad) of the arm's joints around their initial pose: robosuite's default initialisation
# noise, as in LIBERO's recorded states.
ARM_NOISE = 0.02
# m sideways; if objects move further while they settle, the state is drawn again.
MAX_SETTLE_MOTION = 0.05
MAX_DRAWS_PER_STATE = 20
VALIDATION_SEED = MAX_SEED  # of validation states; training.seed is smaller
EVALUATION_SEED = MAX_SEED + 1  # of evaluation states, where none were recorded
BAR_AFTER_S = 10.0  # of making states, a bar shows how far it is


class Caller(Protocol):
    """Runs functions where scenes are open: a `RolloutPool`, or one worker in this process."""

    @property
    def spec(self) -> WorkerSpec:
        """The specification of the workers."""

    def call(
        self, function: Callable[..., Any], argument_lists: Sequence[tuple]
    ) -> Iterator[tuple[int, Any]]:
        """Yield (index, result) of `function(worker, *arguments)` for each item of the list, in any order."""


@dataclass(frozen=True)
class InitStatePool:
    """Initial states of one task.

    Attributes:
        task: the task.
        kind: `evaluation` or `training`.
        states: initial states of episodes.
        provenance: how they were made; drawn states keep it in their cache file.
    """

    task: Task
    kind: str
    states: list[InitState]
    provenance: dict

    def __len__(self) -> int:
        return len(self.states)


def evaluation_pools(pool: Caller, tasks: list[Task], fixtures: str) -> list[InitStatePool]:
    """All 50 recorded states of each task, with fixtures placed by `fixtures`, a key of `FIXTURE_MODES`.

    For a folder's tasks 50 states are drawn, fixtures with them.
    """
    if fixtures not in FIXTURE_MODES:
        raise ValueError(f"unknown fixture placement {fixtures!r}; use one of {', '.join(FIXTURE_MODES)}")
    if not all(task.has_recorded_states for task in tasks):
        drawn = training_pools(pool, tasks, RECORDED_STATES, EVALUATION_SEED)
        return [replace(states, kind="evaluation") for states in drawn]
    recorded = [task.recorded_init_states() for task in tasks]
    counts: dict[Task, int] = {}
    for task, states in zip(tasks, recorded, strict=True):
        counts[task.scene] = max(len(states), counts.get(task.scene, 0))
    jobs = [(scene, count, fixtures) for scene, count in counts.items()]
    files = [_cache_file("fixtures", pool, scene, f"{fixtures}-{count}") for scene, count, _ in jobs]
    made = _kept_or_made(pool, files, ["fixtures"], _place_fixtures, jobs)
    placed = dict(zip(counts, made, strict=True))
    return [
        InitStatePool(
            task,
            "evaluation",
            [
                InitState(state, fixture)
                for state, fixture in zip(recorded[index], placed[task.scene]["fixtures"], strict=True)
            ],
            {"source": Path(task.init_states_file).name, "fixtures": fixtures, "count": len(recorded[index])},
        )
        for index, task in enumerate(tasks)
    ]


def recorded_pools(
    pool: Caller, tasks: list[Task], fixtures: str, held_out: int, count: int
) -> list[InitStatePool]:
    """Training states of each task: at most `count` of the recorded ones after the first `held_out`."""
    return [
        InitStatePool(
            states.task,
            "training",
            states.states[held_out : held_out + count],
            {**states.provenance, "held_out": held_out},
        )
        for states in evaluation_pools(pool, tasks, fixtures)
    ]


def training_pools(pool: Caller, tasks: list[Task], count: int, seed: int) -> list[InitStatePool]:
    """`count` states of each task, drawn with `seed`; the first ones are the same for every `count`."""
    files = [_cache_file("init_states", pool, task, f"seed{seed}-{count}") for task in tasks]
    jobs = [(task, count, seed) for task in tasks]
    entries = _kept_or_made(pool, files, ["states", "fixtures", "provenance"], _draw_states, jobs)
    pools = []
    for task, file, entry in zip(tasks, files, entries, strict=True):
        states = [InitState(*pair) for pair in zip(entry["states"], entry["fixtures"], strict=True)]
        provenance = json.loads(str(entry["provenance"]))
        pools.append(InitStatePool(task, "training", states, {**provenance, "file": str(file)}))
    return pools


def with_demonstrated(pool: Caller, drawn: list[InitStatePool], folder: str | Path) -> list[InitStatePool]:
    """Pools as large as the drawn ones, in which the first states of demonstrations come first.

    Args:
        pool: workers that open the scenes.
        drawn: training states of each task.
        folder: folder of LIBERO's HDF5 files, with LIBERO's names: TASK_demo.hdf5. A task without a file keeps its
            drawn states.

    Raises:
        MissingFileError: there is no file of any task of the suite.
        DataError: a file cannot be read, or belongs to another scene.
    """
    from pi0.data.libero_hdf5 import read_starts  # large; most runs have no demonstrations

    files = [Path(folder) / f"{states.task.name}_demo.hdf5" for states in drawn]
    there = [index for index, file in enumerate(files) if file.is_file()]
    if drawn and not there:
        names = [f"{task.name}_demo.hdf5" for task in suite_tasks(drawn[0].task.suite)]
        # If ranks share the tasks, some ranks may have no task with a file.
        if not any((Path(folder) / name).is_file() for name in names):
            raise MissingFileError(f"{folder} has no demonstrations of the tasks, such as {files[0].name}")
    pools = list(drawn)
    starts = [read_starts(files[index], drawn[index].states[0].state.size) for index in there]
    jobs = [
        (drawn[index].task, [scene for _, scene in begun]) for index, begun in zip(there, starts, strict=True)
    ]
    for job, fixtures in pool.call(_fixtures_in, jobs):
        index = there[job]
        task = drawn[index].task
        recorded = set(map(state_hash, task.recorded_init_states())) if task.has_recorded_states else set()
        if isinstance(fixtures, str):
            raise DataError(f"{files[index]}: {fixtures}; it belongs to another task than {task.name}")
        states = [
            InitState(state, placement)
            for (state, _), placement in zip(starts[job], fixtures, strict=True)
            if state_hash(state) not in recorded  # evaluation states are never trained on
        ]
        provenance = {
            **drawn[index].provenance,
            "demonstrations": str(files[index]),
            "demonstrated": min(len(states), len(drawn[index])),
            "left_out": len(starts[job]) - len(states),
        }
        chosen = (states + drawn[index].states)[: len(drawn[index])]
        pools[index] = InitStatePool(task, "training", chosen, provenance)
    return pools


def _fixtures_in(worker: Worker, task: Task, scenes: list[str]) -> list[np.ndarray] | str:
    """Runs in a worker: placements of the fixtures in each scene, or the reason why there are none."""
    sim, _ = worker.open(task)
    try:
        return [sim.fixtures_in(scene) for scene in scenes]
    except (ValueError, ElementTree.ParseError) as error:
        return str(error)


def _place_fixtures(worker: Worker, task: Task, count: int, mode: str) -> dict[str, np.ndarray]:
    """Runs in a worker: fixtures, float64 [count, number of fixtures, 7]."""
    sim, _ = worker.open(task)
    np.random.seed(0)
    if mode == "pinned":
        return {"fixtures": np.repeat(sim.draw_init_state().fixtures[None], count, axis=0)}
    return {"fixtures": np.array([sim.draw_init_state(resets=reset + 1).fixtures for reset in range(count)])}


def _draw_states(worker: Worker, task: Task, count: int, seed: int) -> dict[str, np.ndarray]:
    """Runs in a worker: states, their fixtures, and their provenance as JSON.

    Draws are rejected, and counted, if objects moved or the task was solved.
    """
    sim, _ = worker.open(task)
    np.random.seed(int.from_bytes(hashlib.sha256(f"{seed} {task.name}".encode()).digest()[:4], "little"))
    states: list[InitState] = []
    for draw in range(1, MAX_DRAWS_PER_STATE * count + 1):
        state = sim.draw_init_state()
        state.state[1 + sim.arm_qpos] += ARM_NOISE * np.random.randn(len(sim.arm_qpos))
        if _settles(sim, state):
            states.append(state)
        if len(states) == count:
            provenance = {
                "source": "LIBERO's placement distribution",
                "suite": task.suite,
                "task": task.name,
                "seed": seed,
                "count": count,
                "rejected": draw - count,
                "assets": worker.spec.assets.describe(),
            }
            return {
                "states": np.array([state.state for state in states]),
                "fixtures": np.array([state.fixtures for state in states]),
                "provenance": np.array(json.dumps(provenance)),
            }
    raise RuntimeError(
        f"{task.name}: only {len(states)} of {MAX_DRAWS_PER_STATE * count} drawn states settle; {count} are needed"
    )


def _settles(sim: TaskSim, state: InitState) -> bool:
    sim.reset(state)
    bodies = list(sim.libero.obj_body_id.values())
    before = np.array(sim.data.xpos[bodies])
    for _ in range(SETTLE_STEPS):
        if sim.step(SETTLE_ACTION):
            return False
    mujoco.mj_kinematics(sim.model, sim.data)
    return bool(np.linalg.norm((sim.data.xpos[bodies] - before)[:, :2], axis=1).max() < MAX_SETTLE_MOTION)


def _cache_file(folder: str, pool: Caller, task: Task, what: str) -> Path:
    assets = json.dumps(pool.spec.assets.describe(), sort_keys=True)
    of_file = "" if task.has_recorded_states else f" {task.bddl_hash()}"  # a package's files stay as they are
    key = hashlib.sha256(f"{assets} {task.name} {what}{of_file}".encode()).hexdigest()[:12]
    return cache_dir() / folder / f"{task.label}-{what}-{key}.npz"


def _kept_or_made(
    pool: Caller,
    files: Sequence[Path],
    names: Sequence[str],
    make: Callable[..., dict[str, np.ndarray]],
    jobs: Sequence[tuple],
) -> list[dict[str, np.ndarray]]:
    """What each of the cache's `files` holds; what is missing or damaged is made by workers and kept.

    If the cache cannot be written, this only costs time.

    Args:
        pool: workers.
        files: a file for each job.
        names: the arrays in a file.
        make: makes them, in a worker.
        jobs: its arguments: the task, the number of states and another.
    """
    found = [_load(file, names, count) for file, (_, count, _) in zip(files, jobs, strict=True)]
    missing = [index for index, entry in enumerate(found) if entry is None]
    with progress(len(missing), "initial states", "scene", delay=BAR_AFTER_S) as bar:
        for job, entry in pool.call(make, [jobs[index] for index in missing]):
            found[missing[job]] = entry
            _save(files[missing[job]], entry)
            bar.update()
    return [entry for entry in found if entry is not None]


def _save(file: Path, entry: dict[str, np.ndarray]) -> None:
    content = io.BytesIO()
    np.savez(content, allow_pickle=False, **entry)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, content.getvalue())
    except OSError as error:
        logger.warning("initial states could not be kept in %s: %s", file.parent, error)


def _load(file: Path, names: Sequence[str], count: int) -> dict[str, np.ndarray] | None:
    try:
        with np.load(file, allow_pickle=False) as content:
            entry = {name: content[name] for name in names}
        if any(array.ndim and len(array) != count for array in entry.values()):
            raise ValueError(f"it does not hold {count} states")
        return entry
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        logger.warning("the initial states in %s are damaged (%s); they are made again", file, error)
        return None
