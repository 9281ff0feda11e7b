"""Which initial states succeed how often: the memory that lets practice pass over what is solved."""

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
    """What names a state across runs: suite, task and hash of the recorded state, joined by `/`."""
    return f"{task.suite}/{task.index}/{init.name}"


class RolloutStats:
    """Success history of initial states.

    A state whose last `skip_threshold` visits were all solved is passed over for a round (`pi0.ript.turns.Streaks`).

    What a rank decides depends on the file as it was at the start and on its own visits, never on when other
    processes write theirs, so that runs can be repeated.

    The file says how many visits each writer has added. One that goes on from a checkpoint and makes visits again adds
    only those that are new: a killed run counts nothing twice. (Where they come out otherwise, as after a rollback,
    which learns with other noise, the file keeps what came first.)

    Args:
        path: JSON file that grows from run to run; ranks and runs may share it. None keeps all in memory.
        skip_threshold: visits in a row, all of whose rollouts succeed, that make a state solved.
    Raises:
        StatsError: the file is there and not one of this kind.
    """

    def __init__(self, path: str | Path | None, skip_threshold: int):
        self.path = None if path is None else Path(path)
        self.history: dict[str, list[Visit]] = {}
        self._writer = secrets.token_hex(8)  # no run or rank has another's
        self._visits = 0
        self._unwritten: list[tuple[str, Visit]] = []  # the last ones
        self._streaks = Streaks(skip_threshold)
        if self.path is not None:
            self.history = _read(self.path)["states"]
            for name, visits in self.history.items():
                for visit in visits:
                    self._count(name, visit)

    def record(self, name: str, successes: int, rollouts: int) -> None:
        """Remember a visit."""
        visit = [int(successes), int(rollouts)]
        self.history.setdefault(name, []).append(visit)
        self._unwritten.append((name, visit))
        self._visits += 1
        self._count(name, visit)

    def pass_over(self, name: str) -> bool:
        """Whether the state, whose turn it is, is passed over this time."""
        return self._streaks.pass_over(name)

    def save(self) -> None:
        """Add the new visits to the file, whole or not at all, whoever else adds to it at the same time.

        Raises:
            StatsError: it cannot be read or written; the visits are kept for the next time.
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
        """What decides from here on, for a checkpoint."""
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

        What the disk had refused to those ranks is not written any more.
        """
        self._unwritten = []
        self._remember(states)

    def _remember(self, states: list[dict]) -> None:
        self.history, self._streaks.solved_in_a_row = {}, {}
        for state in states:
            for name, visits in state["history"].items():
                if len(visits) > len(self.history.get(name, [])):  # whoever visited it knows most
                    self.history[name] = list(visits)
                    self._streaks.solved_in_a_row[name] = state["solved_in_a_row"].get(name, 0)

    def _count(self, name: str, visit: Visit) -> None:
        successes, rollouts = visit
        self._streaks.record(name, successes == rollouts)


class SamplerState:
    """Where a sampler is and what it remembers, as a part of a checkpoint.

    Args:
        turns: whose turn it is.
        rings: the states of each task.
        stats: what was solved.
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
        """Continue from the statistics of all ranks of before, which had other states; rings begin again."""
        self._turns.load_state_dict(states[0])
        self._stats.join_state_dicts([state["stats"] for state in states])


def _read(path: Path) -> dict:
    """What the file holds: `states`, name to visits; `writers`, name to number of visits added."""
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
