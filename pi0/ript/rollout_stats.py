"""Success history of initial states, so that training can skip solved states."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from pathlib import Path

from pi0.base.errors import InputError
from pi0.base.files import locked, write_whole
from pi0.libero.stepping import InitState
from pi0.libero.suites import Task
from pi0.ript.turns import Ring, Streaks, TaskTurns
from pi0.training.state import Place

FORMAT = 1
# A visit: [successes, rollouts] of all rollouts from the state in one iteration.
Visit = list[int]


class StatsError(InputError):
    """A statistics file cannot be read or written."""


def state_name(task: Task, init: InitState) -> str:
    """Name of a state in all runs: suite, task and hash of the recorded state, joined by `/`."""
    return f"{task.suite}/{task.index}/{init.name}"


class RolloutStats:
    """Success history of initial states.

    A state whose last `skip_threshold` visits were all solved is skipped for a round (`pi0.ript.turns.Streaks`).

    A rank's decisions depend on the file at the start and on its own visits, never on the time when other processes
    write, so that runs can be repeated.

    The file holds how many visits each writer has added. A writer that resumes from a checkpoint and repeats visits
    adds only the new ones, so a killed run counts nothing twice. (If repeated visits have other outcomes, as after a
    rollback, which uses other noise, the file keeps the first outcomes.)

    Args:
        path: JSON file that grows from run to run; ranks and runs may share it. None keeps all in memory.
        skip_threshold: a state counts as solved after so many visits in a row in which all rollouts succeed.
    Raises:
        StatsError: the file exists and is not one of this kind.
    """

    def __init__(self, path: str | Path | None, skip_threshold: int):
        self.path = None if path is None else Path(path)
        self.history: dict[str, list[Visit]] = {}
        self._writer = secrets.token_hex(8)  # unique for each run and rank
        self._visits = 0
        self._unwritten: list[tuple[str, Visit]] = []  # the latest visits
        self._streaks = Streaks(skip_threshold)
        if self.path is not None:
            self.history = _read(self.path)["states"]
            for name, visits in self.history.items():
                for visit in visits:
                    self._count(name, visit)

    def record(self, name: str, successes: int, rollouts: int) -> None:
        """Record a visit."""
        visit = [int(successes), int(rollouts)]
        self.history.setdefault(name, []).append(visit)
        self._unwritten.append((name, visit))
        self._visits += 1
        self._count(name, visit)

    def skip(self, name: str) -> bool:
        """Whether the state, which has its turn, is skipped this time."""
        return self._streaks.skip(name)

    def save(self) -> None:
        """Add the new visits to the file, whole or not at all; other processes may add visits at the same time.

        Raises:
            StatsError: the file cannot be read or written; the visits are kept for the next time.
        """
        if self.path is None or not self._unwritten:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with locked(self.path.with_name(f".{self.path.name}.lock")):
                content = _read(self.path)
                added = content["writers"].get(self._writer, 0)
                for number, (name, visit) in enumerate(self._unwritten, self._visits - len(self._unwritten)):
                    if number >= added:
                        content["states"].setdefault(name, []).append(visit)
                content["writers"][self._writer] = max(added, self._visits)
                write_whole(self.path, json.dumps(content))
        except OSError as error:
            raise StatsError(
                f"cannot write {self.path}: {error.strerror}; choose another algo.rollout_stats_path"
            ) from error
        self._unwritten = []

    def state_dict(self) -> dict:
        """The state for a checkpoint."""
        return {
            "history": {name: list(visits) for name, visits in self.history.items()},
            "writer": self._writer,
            "visits": self._visits,
            "unwritten": list(self._unwritten),
            "solved_in_a_row": dict(self._streaks.solved_in_a_row),
        }

    def load_state_dict(self, state: dict) -> None:
        """Continue from `state_dict()`, as the same writer of the file."""
        self._writer, self._visits = state["writer"], state["visits"]
        self._unwritten = [(name, visit) for name, visit in state["unwritten"]]
        self._remember([state])

    def join_state_dicts(self, states: list[dict]) -> None:
        """Continue from the states of other ranks, which visited different states, as a new writer of the file.

        Visits that those ranks could not write to the file are not written any more.
        """
        self._unwritten = []
        self._remember(states)

    def _remember(self, states: list[dict]) -> None:
        self.history, self._streaks.solved_in_a_row = {}, {}
        for state in states:
            for name, visits in state["history"].items():
                if len(visits) > len(
                    self.history.get(name, [])
                ):  # the rank that visited it has the longest list
                    self.history[name] = list(visits)
                    self._streaks.solved_in_a_row[name] = state["solved_in_a_row"].get(name, 0)

    def _count(self, name: str, visit: Visit) -> None:
        successes, rollouts = visit
        self._streaks.record(name, successes == rollouts)


class SamplerState:
    """A sampler's position and memory, as a part of a checkpoint.

    Args:
        turns: turns of the tasks.
        rings: the states of each task.
        stats: success history of the states.
    """

    def __init__(self, turns: TaskTurns, rings: Sequence[Ring], stats: RolloutStats):
        self._turns = turns
        self._rings = rings
        self._stats = stats

    def state_dict(self) -> dict:
        """Credit and success rates of the tasks, the rings' cursors, and the statistics."""
        cursors = [ring.init_state_cursor for ring in self._rings]
        return {**self._turns.state_dict(), "init_state_cursor": cursors, "stats": self._stats.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Continue from `state_dict()`."""
        self._turns.load_state_dict(state)
        for ring, cursor in zip(self._rings, state["init_state_cursor"], strict=True):
            ring.init_state_cursor = cursor
        self._stats.load_state_dict(state["stats"])

    def join_state_dicts(self, states: list[dict], place: Place) -> None:
        """Continue from the statistics of all earlier ranks, which had other states; rings begin again."""
        self._turns.load_state_dict(states[0])
        self._stats.join_state_dicts([state["stats"] for state in states])


def _read(path: Path) -> dict:
    """The file's content: `states`, name to visits; `writers`, name to number of visits added."""
    empty = {"format": FORMAT, "visit": ["successes", "rollouts"], "states": {}, "writers": {}}
    if not path.exists():
        return empty
    mend = "move it away, or choose another algo.rollout_stats_path"
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise StatsError(f"{path} is not JSON ({error}); {mend}") from error
    except OSError as error:
        raise StatsError(f"{path} cannot be read: {error.strerror}; {mend}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT or "states" not in content:
        raise StatsError(f"{path} is not a statistics file of format {FORMAT}; {mend}")
    return empty | content
