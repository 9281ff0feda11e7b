"""Scores of the policy before, while and after it is trained, and films of its episodes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pi0.base.stats import format_mean
from pi0.base.video import captioned, write_video
from pi0.parallel.actor import Episode
from pi0.parallel.config import Config
from pi0.parallel.policy import views
from pi0.parallel.slices import Layout, publish
from pi0.parallel.worker import PlayerSpec
from pi0.workers.pool import ATTEMPTS, Loss, WorkerPool
from pi0.workers.process import LostWorkersError, WorkerError

EVALUATION_SEED = 1_000_003  # added to the run's seed: no episode of a score is one of training
WAYS = ("sampled", "greedy")  # how actions are chosen for a score
FILM_EVERY = 2  # steps from one frame of a video to the next
FILM_FPS = 15  # twice as fast as the game, which makes 15 steps of 4 frames a second
FILM_STEPS = 2000  # a video shows at most so many steps of an episode


class Scorer:
    """Scores policies and films episodes, in processes of its own; as a part of a checkpoint, the scores.

    Attributes:
        during: scores from while training went on, each with `step`, `sampled` and `greedy`.

    Args:
        spec: the game as the workers play it.
        config: the run's settings.
        check: called while it waits; what it raises ends the waiting.
    """

    def __init__(self, spec: PlayerSpec, config: Config, check: Callable[[], None]):
        self._layout = Layout(1, 1, 1, spec.layout.actions)
        self._spec = replace(spec, layout=self._layout)
        self._config = config
        self._check = check
        self._processes: WorkerPool | None = None
        self._version = 0
        self._under_way: tuple[int, np.ndarray] | None = None  # step and weights that `begin` was given
        self._found: dict[int, list[Episode]] = {}
        self._attempts = 0
        self.during: list[dict[str, Any]] = []

    def close(self) -> None:
        """End the processes; they are started again where they are needed."""
        if self._processes is not None:
            self._processes.close()
            self._processes = None

    def score(self, weights: np.ndarray, label: str) -> dict[str, Any]:
        """Raw scores of whole episodes, sampled as in training and greedy, always on the same seeds.

        Returns:
            "sampled" and "greedy", each with its `scores`, and as `episode` the one with the middle score.
        Raises:
            WorkerError: a game raised an error.
            LostWorkersError: a process was lost time and again.
        """
        if not self._config.evaluation_episodes:
            return {}
        self.finish()
        self._ask(weights)
        result: dict[str, Any] = {}
        for how, played in zip(WAYS, self._played(math.inf) or [], strict=True):
            scores = [episode.score for episode in played]
            middle = played[int(np.argsort(scores)[len(scores) // 2])]
            result[how] = {"scores": scores, "episode": {**asdict(middle), "actions": middle.actions.hex()}}
            print(f"score {label} training, {how}: {format_mean(scores)}")
        return result

    def begin(self, step: int, weights: np.ndarray) -> None:
        """Score the policy after `step` updates while training goes on; an earlier score is waited for."""
        self.finish()
        self._under_way = step, weights
        self._ask(weights)

    def finish(self, patience_s: float = math.inf) -> dict[str, Any] | None:
        """The score that `begin` began, once: `step`, and the scores `sampled` and `greedy`; it is in `during`, too.

        Returns None if none was begun, or it has not come in `patience_s` seconds.
        """
        if self._under_way is None or (played := self._played(patience_s)) is None:
            return None
        (step, _), self._under_way = self._under_way, None
        scores = {how: [each.score for each in of_way] for how, of_way in zip(WAYS, played, strict=True)}
        self.during.append({"step": step, **scores})
        print(
            "; ".join([f"score after {step} updates", *(f"{how} {format_mean(scores[how])}" for how in WAYS)])
        )
        return self.during[-1]

    def state_dict(self) -> dict[str, Any]:
        """The scores that have come, and the weights of the one that has not."""
        under_way = None
        if self._under_way is not None:
            step, weights = self._under_way
            under_way = {"step": step, "weights": torch.from_numpy(weights)}
        return {"during": list(self.during), "under_way": under_way}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`."""
        self.finish()  # of a run that returns to a checkpoint
        self.during = list(state["during"])
        if (under_way := state["under_way"]) is not None:
            self.begin(under_way["step"], under_way["weights"].numpy())

    def join_state_dicts(self, states: list[dict], place: Any) -> None:
        """Never called: one process scores, so its number never changes."""
        raise NotImplementedError

    @property
    def _pool(self) -> WorkerPool:
        if self._processes is None:
            self._processes = WorkerPool(
                "pi0.parallel.worker:worker_process",
                self._spec,
                {},
                len(WAYS),
                streams=np.random.SeedSequence(0),
                limit_s=3600.0,
                check=self._check,
                common=self._layout.table,
            )
        return self._processes

    def _ask(self, weights: np.ndarray) -> None:
        self._version += 2  # always the same buffer
        publish(self._layout, self._pool.common, views(weights, self._layout.actions), self._version)
        self._found, self._attempts = {}, 0
        for number in range(len(WAYS)):
            self._send(number)

    def _send(self, number: int) -> None:
        seed = self._config.seed + EVALUATION_SEED
        self._pool.send(number, "play", (self._config.evaluation_episodes, WAYS[number] == "greedy", seed))

    def _played(self, patience_s: float) -> list[list[Episode]] | None:
        """Episodes of each way of `_ask`; None if they have not come in `patience_s` seconds."""
        while len(self._found) < len(WAYS):
            if (answer := self._pool.next_outcome(patience_s)) is None:
                return None
            number, outcome = answer
            if isinstance(outcome, WorkerError):
                raise outcome
            if not isinstance(outcome, Loss):
                self._found[number] = outcome
                continue
            self._attempts += 1
            if self._attempts == ATTEMPTS:
                raise LostWorkersError(
                    f"{outcome}, {ATTEMPTS} times; look for what ends it, such as too little memory"
                )
            self._send(number)
        return [self._found[number] for number in range(len(WAYS))]

    def film(self, run_dir: Path, best: Episode | None, facts: Mapping[str, Any]) -> None:
        """Videos: the best episode of training, and the middle sampled episodes before and after it."""
        if best is not None:
            screens = captioned(self._screens(best), f"best of training: {best.score:.0f}")
            write_video(run_dir / "best_episode.mp4", [_even(screen) for screen in screens], FILM_FPS)
        halves = []
        for when in ("before", "after"):
            if "sampled" in facts.get(when, {}):
                saved = facts[when]["sampled"]["episode"]
                episode = Episode(**{**saved, "actions": bytes.fromhex(saved["actions"])})
                halves.append(captioned(self._screens(episode), f"{when} training: {episode.score:.0f}"))
        if len(halves) == 2:
            longest = max(map(len, halves))
            halves = [half + [half[-1]] * (longest - len(half)) for half in halves]
            both = [_even(np.concatenate(pair, 1)) for pair in zip(*halves, strict=True)]
            write_video(run_dir / "before_after.mp4", both, FILM_FPS)

    def _screens(self, episode: Episode) -> list[np.ndarray]:
        shown = replace(episode, actions=episode.actions[: 2 * FILM_STEPS])
        ((_, screens),) = self._pool.call("film", [(shown, FILM_EVERY)])
        return screens


def _even(frame: np.ndarray) -> np.ndarray:
    """With even sides, as H.264 needs them."""
    return frame[: frame.shape[0] // 2 * 2, : frame.shape[1] // 2 * 2]
