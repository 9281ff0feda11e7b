"""A worker's game, policy and random stream: it fills slices, and can be saved and continued elsewhere, to the bit."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pi0.parallel.games import SIDE, Game
from pi0.parallel.policy import STACK, FramePolicy, log_probabilities
from pi0.parallel.slices import WEIGHT_BUFFERS, Layout

NEWEST = -1  # in place of a version of the weights


@dataclass(frozen=True)
class Episode:
    """An episode, or its part so far; played again from these, it is the same.

    Attributes:
        seed: what the game was reset with.
        noops: single frames without an action at its beginning.
        actions: uint16 numbers of the actions.
        score: sum of the raw rewards.
    """

    seed: int
    noops: int
    actions: bytes = b""
    score: float = 0.0

    @property
    def length(self) -> int:
        """Steps done."""
        return len(self.actions) // 2


@dataclass(frozen=True)
class Task:
    """A slice to fill.

    Attributes:
        worker: whose slice it is.
        number: slices of this worker before it.
        buffer: where to put it.
        steps: its length.
        version: version of the weights to act with, or `NEWEST`.
        exploration: share of uniform choice in the policy.
        state: where it begins (`Actor.state`); None for a worker that has filled the slice before it.
    """

    worker: int
    number: int
    buffer: int
    steps: int
    version: int
    exploration: float = 0.0
    state: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Filled:
    """A slice that was filled.

    Attributes:
        worker, number, buffer, steps: as in its `Task`.
        version: version of the weights that acted.
        state: where the next slice begins.
        episodes: the episodes that ended in it, in order.
        seconds: time for the game with its preprocessing, for the policy, and in all.
    """

    worker: int
    number: int
    buffer: int
    steps: int
    version: int
    state: Mapping[str, Any]
    episodes: tuple[Episode, ...]
    seconds: Mapping[str, float] = field(default_factory=dict)


def stream_seed(seed: int, worker: int, generation: int) -> np.random.SeedSequence:
    """What a worker's random stream begins from; `generation` counts its beginnings that continue nothing."""
    return np.random.SeedSequence((seed, worker, generation))


def new_stream(seed: int, worker: int, generation: int) -> np.random.Generator:
    """The random stream of a worker, for `stream_seed`."""
    return np.random.default_rng(stream_seed(seed, worker, generation))


class Actor:
    """Plays a game with the policy.

    Args:
        game: the game; nobody else uses it.
        layout, arrays: the shared memory.
        max_steps: steps after which an episode is truncated.
        noop_max: most frames without an action at the beginning of an episode.
    """

    def __init__(
        self, game: Game, layout: Layout, arrays: Mapping[str, np.ndarray], max_steps: int, noop_max: int
    ):
        self.game = game
        self._layout = layout
        self._arrays = arrays
        self._max_steps = max_steps
        self._noop_max = noop_max
        self._policy = FramePolicy(layout.actions)
        self._version: int | None = None
        self._at: tuple[int, int] | None = None  # worker and number of the slice that comes next
        self._random = np.random.default_rng()
        self._episode = Episode(0, 0)
        self._actions = bytearray()
        self._frames = np.zeros((STACK, SIDE, SIDE), np.uint8)  # the last ones, oldest first

    def begin(self, worker: int, random: np.random.Generator) -> Mapping[str, Any]:
        """Begin a first episode with a random stream; returns the state before the worker's first slice."""
        self._random = random
        self._reset()
        self._at = worker, 0
        return self.state()

    def state(self) -> dict[str, Any]:
        """All that the next slice depends on besides the weights: numbers, strings, bytes and an array."""
        return {
            "random": json.dumps(self._random.bit_generator.state),
            "game": self.game.save(),
            "frames": self._frames.copy(),
            "seed": self._episode.seed,
            "noops": self._episode.noops,
            "actions": bytes(self._actions),
            "score": self._episode.score,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from `state()`, of this process or another."""
        self._random = np.random.default_rng()
        self._random.bit_generator.state = json.loads(state["random"])
        self._episode = Episode(state["seed"], state["noops"], b"", state["score"])
        self._actions = bytearray(state["actions"])
        self._frames = np.array(state["frames"])
        if state["game"]:
            self.game.restore(state["game"])
        else:
            replay(self.game, Episode(state["seed"], state["noops"], state["actions"]))
        self._version = None  # after a return to a checkpoint a version may have other weights
        self._policy.clear()
        age = len(self._actions) // 2
        for back in range(min(age, STACK - 1), -1, -1):
            self._policy.show(self._frames[STACK - 1 - back], age - back)

    def fill(self, task: Task) -> Filled:
        """Fill a slice.

        Raises:
            RuntimeError: the weights that it should act with are not there.
        """
        if self._at != (task.worker, task.number):
            if task.state is None:
                raise RuntimeError(
                    f"this worker is at {self._at}, not at slice {task.number} of {task.worker}"
                )
            self.restore(task.state)
        self._load(task.version)
        started = time.perf_counter()
        buffer, worker = task.buffer, task.worker
        first = self._layout.first_frame(buffer, worker)
        arrays = {
            name: self._arrays[name][buffer, worker]
            for name in ("ages", "actions", "log_probs", "values", "rewards", "ended", "bootstraps")
        }
        frames = self._arrays["frames"]
        frames[first - STACK + 1 : first] = self._frames[:-1]
        clock = time.perf_counter
        thinking = playing = 0.0
        episodes = []
        for step in range(task.steps):
            age = len(self._actions) // 2
            frames[first + step] = self._frames[-1]
            arrays["ages"][step] = min(age, STACK - 1)
            before = clock()
            logits, value = self._policy(age)
            logs = log_probabilities(logits, task.exploration)
            action = self._choose(logs)
            decided = clock()
            thinking += decided - before
            played = self.game.step(action)
            playing += clock() - decided
            self._actions += action.to_bytes(2, "little")
            self._episode = Episode(
                self._episode.seed, self._episode.noops, b"", self._episode.score + played.reward
            )
            arrays["actions"][step] = action
            arrays["log_probs"][step] = logs[action]
            arrays["values"][step] = value
            arrays["rewards"][step] = played.reward
            ends = played.terminated or played.truncated or age + 1 >= self._max_steps
            arrays["ended"][step] = ends
            arrays["bootstraps"][step] = 0.0
            if not played.terminated:
                assert played.frame is not None
                self._see(played.frame)
                if ends:
                    arrays["bootstraps"][step] = self._policy(age + 1)[1]
            if ends:
                episodes.append(
                    Episode(
                        self._episode.seed, self._episode.noops, bytes(self._actions), self._episode.score
                    )
                )
                before = clock()
                self._reset()
                playing += clock() - before
        age = len(self._actions) // 2
        frames[first + task.steps] = self._frames[-1]
        arrays["ages"][task.steps] = min(age, STACK - 1)
        self._arrays["last_values"][buffer, worker] = self._policy(age)[1]
        self._at = worker, task.number + 1
        seconds = {"game": playing, "policy": thinking, "all": clock() - started}
        return Filled(
            worker,
            task.number,
            buffer,
            task.steps,
            self._version or 0,
            self.state(),
            tuple(episodes),
            seconds,
        )

    def play(self, episodes: int, greedy: bool, random: np.random.Generator) -> list[Episode]:
        """Whole episodes with the newest weights, for a score."""
        self._load(NEWEST)
        self._random, self._at = random, None
        played: list[Episode] = []
        while len(played) < episodes:
            self._reset()
            ends = False
            while not ends:
                age = len(self._actions) // 2
                logits, _ = self._policy(age)
                action = int(logits.argmax()) if greedy else self._choose(log_probabilities(logits, 0.0))
                step = self.game.step(action)
                self._actions += action.to_bytes(2, "little")
                self._episode = Episode(
                    self._episode.seed, self._episode.noops, b"", self._episode.score + step.reward
                )
                ends = step.terminated or step.truncated or age + 1 >= self._max_steps
                if not ends:
                    assert step.frame is not None
                    self._see(step.frame)
            played.append(
                Episode(self._episode.seed, self._episode.noops, bytes(self._actions), self._episode.score)
            )
        return played

    def _choose(self, logs: np.ndarray) -> int:
        """Draw an action from log-probabilities."""
        total = np.cumsum(np.exp(logs))
        return int(min(np.searchsorted(total, self._random.random() * total[-1], "right"), len(logs) - 1))

    def _reset(self) -> None:
        """Begin an episode; its seed and its no-ops come from the worker's stream."""
        frame, seed, noops = None, 0, 0
        while frame is None:  # an episode may end while nothing is done
            seed, noops = (int(self._random.integers(high)) for high in (2**31, self._noop_max + 1))
            frame = begin(self.game, seed, noops)
        self._episode, self._actions = Episode(seed, noops), bytearray()
        self._frames[:] = 0
        self._frames[-1] = frame
        self._policy.clear()
        self._policy.show(frame, 0)

    def _see(self, frame: np.ndarray) -> None:
        self._frames[:-1] = self._frames[1:]
        self._frames[-1] = frame
        self._policy.show(frame, len(self._actions) // 2)

    def _load(self, version: int) -> None:
        """Act with the weights of a version, or the newest ones.

        Those of a version stay as they are until its slices are filled, so all workers read the same memory, which then
        stays in the processor's cache. The newest ones are copied: the trainer may write two versions meanwhile.
        """
        weights, versions = self._arrays["weights"], self._arrays["versions"]
        while self._version is None or self._version != version:
            wanted = int(versions.max()) if version == NEWEST else version
            buffer = wanted % WEIGHT_BUFFERS
            if wanted == self._version:
                return
            found = weights[buffer].copy() if version == NEWEST else weights[buffer]
            if versions[buffer] == wanted:
                self._policy.use(self._layout.weights_in(found))
                self._version = wanted
                return
            if version != NEWEST:
                raise RuntimeError(f"weights {version} are not there, but {versions.tolist()}")


def begin(game: Game, seed: int, noops: int) -> np.ndarray | None:
    """Begin an episode of a game; None if it has ended before its first step."""
    frame = game.reset(seed)
    return game.noop(noops) if noops else frame


def replay(game: Game, episode: Episode) -> None:
    """Play an episode again."""
    begin(game, episode.seed, episode.noops)
    for action in np.frombuffer(episode.actions, np.uint16):
        game.step(int(action))
