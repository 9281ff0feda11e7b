"""The object in a worker process: a game and its actor; and the same for all workers one after another, in one process."""

from __future__ import annotations

import os
import resource
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from pi0.parallel.actor import NEWEST, Actor, Episode, Filled, Task, begin, new_stream, stream_seed
from pi0.parallel.games import Game, GameSpec, make_game
from pi0.parallel.slices import Layout


@dataclass(frozen=True)
class PlayerSpec:
    """What a worker needs to know.

    Attributes:
        game: its game.
        layout: the shared memory.
        max_steps, noop_max: as for `Actor`.
        nice: by how much its priority is lowered.
        one_stream: every worker gets the same stream, to show that this is found.
    """

    game: GameSpec
    layout: Layout
    max_steps: int
    noop_max: int
    nice: int = 0
    one_stream: bool = False


class Player:
    """Answers the trainer's calls.

    Args:
        spec: what to play.
        arrays: those of `Layout`.
        random: not used: a worker's streams depend on the run's seed and its number alone, whoever replaces it.
    """

    def __init__(
        self, spec: PlayerSpec, arrays: Mapping[str, np.ndarray], random: np.random.Generator | None = None
    ):
        cv2.setNumThreads(1)  # processes are the parallelism
        if spec.nice:
            os.nice(spec.nice)
        self._spec = spec
        self._arrays = arrays
        self._actors: dict[int, Actor] = {}
        self._game: Game | None = None

    def begin(self, seed: int, worker: int, generation: int) -> Mapping[str, Any]:
        """Begin a worker's first episode; returns the state before its first slice."""
        stream = new_stream(seed, 0 if self._spec.one_stream else worker, generation)
        return self._actor(worker).begin(worker, stream)

    def fill(self, task: Task) -> Filled:
        """Fill a slice."""
        return self._actor(task.worker).fill(task)

    def play(self, episodes: int, greedy: bool, seed: int) -> list[Episode]:
        """Whole episodes with the newest weights."""
        return self._actor(0).play(episodes, greedy, np.random.default_rng(seed))

    def film(self, episode: Episode, every: int) -> list[np.ndarray]:
        """Every so many steps' screen of an episode that is played again."""
        game = self._any_game()
        begin(game, episode.seed, episode.noops)
        screens = [game.screen().copy()]
        for number, action in enumerate(np.frombuffer(episode.actions, np.uint16), 1):
            game.step(int(action))
            if number % every == 0:
                screens.append(game.screen().copy())
        return screens

    def look(self, steps: int, draws: int, seed: int, worker: int) -> tuple[int, bytes, bytes, bytes]:
        """What a worker has and does under the newest weights: the seed of its stream, the stream's first numbers, its
        first actions and the frames that it sees."""
        whose = 0 if self._spec.one_stream else worker
        seed_of_stream = int(stream_seed(seed, whose, 0).generate_state(1, np.uint64)[0])
        numbers = new_stream(seed, whose, 0).random(draws)
        self.begin(seed, worker, 0)
        self.fill(Task(worker, 0, 0, steps, NEWEST))
        first = self._spec.layout.first_frame(0, worker)
        frames = self._arrays["frames"][first : first + steps]
        actions = self._arrays["actions"][0, worker, :steps]
        return seed_of_stream, numbers.tobytes(), actions.tobytes(), frames.tobytes()

    def report(self) -> dict[str, float]:
        """Memory of this process, MB, and the CPU time that it has used, s."""
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        used = resource.getrusage(resource.RUSAGE_SELF)
        return {
            "memory_mb": pages * os.sysconf("SC_PAGE_SIZE") / 1e6,
            "cpu_s": used.ru_utime + used.ru_stime,
        }

    def close(self) -> None:
        """End the games."""
        for game in {id(each): each for each in [a.game for a in self._actors.values()]}.values():
            game.close()
        self._actors = {}

    def _any_game(self) -> Game:
        if self._game is None:
            self._game = make_game(self._spec.game)
        return self._game

    def _actor(self, worker: int) -> Actor:
        """The actor of a worker. All share one where the process can hold one game only; then slices name their states."""
        game = self._any_game()
        key = worker if game.shares_process else 0
        if key not in self._actors:
            own = game if not self._actors else make_game(self._spec.game)
            spec = self._spec
            self._actors[key] = Actor(own, spec.layout, self._arrays, spec.max_steps, spec.noop_max)
        return self._actors[key]


def action_parts(spec: GameSpec) -> tuple[int, ...]:
    """`Game.parts` of a game."""
    game = make_game(spec)
    try:
        return game.parts
    finally:
        game.close()


def worker_process(spec: PlayerSpec, arrays: Mapping[str, np.ndarray], random: np.random.Generator) -> Player:
    """What runs in a worker process (`pi0.workers.serve` calls it): a `Player`, which answers the trainer's calls."""
    return Player(spec, arrays, random)
