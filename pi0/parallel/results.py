"""Scores before and after training, and what is left of a run for people: results.json, the table, the videos."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from pi0.base.errors import InputError
from pi0.base.files import write_json
from pi0.base.stats import mean_interval
from pi0.base.video import captioned, write_video
from pi0.parallel.actor import Episode
from pi0.parallel.config import Config, to_dict
from pi0.parallel.network import ActorCritic
from pi0.parallel.slices import Layout
from pi0.parallel.worker import PlayerSpec
from pi0.training.machine import machine
from pi0.workers.pool import Loss, WorkerPool
from pi0.workers.process import WorkerError

EVALUATION_SEED = 1_000_003  # added to the run's seed: no episode of a score is one of training
FILM_EVERY = 2  # steps from one frame of a video to the next
FILM_FPS = 15  # twice as fast as the game, which makes 15 steps of 4 frames a second
FILM_STEPS = 2000  # a video shows at most so many steps of an episode


class Scorer:
    """Scores policies and films episodes, in a process of its own.

    Args:
        spec: the game as the workers play it.
        config: the run's settings.
        network: gives the number of weights.
    """

    def __init__(self, spec: PlayerSpec, config: Config, network: ActorCritic):
        layout = Layout(1, 1, 1, spec.layout.actions)
        self._config = config
        self._pool = WorkerPool(
            "pi0.parallel.worker:worker_process",
            replace(spec, layout=layout, nice=0),
            {},
            1,
            streams=np.random.SeedSequence(0),
            limit_s=3600.0,
            common=layout.table,
        )
        self._version = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.close()

    def score(self, weights: np.ndarray, label: str) -> dict[str, Any]:
        """Raw scores of whole episodes, sampled as in training and greedy, always on the same seeds.

        Returns:
            "sampled" and "greedy", each with `scores`, and under `episode` the middle one of the sampled.
        """
        episodes = self._config.evaluation_episodes
        result: dict[str, Any] = {}
        self._version += 2  # always the same buffer
        arrays = self._pool.common
        arrays["weights"][0] = weights
        arrays["versions"][0] = self._version
        for how in ("sampled", "greedy") if episodes else ():
            seed = self._config.seed + EVALUATION_SEED
            played: list[Episode] = self._call("play", (episodes, how == "greedy", seed))
            scores = [episode.score for episode in played]
            middle = played[int(np.argsort(scores)[len(scores) // 2])]
            result[how] = {"scores": scores, "episode": {**asdict(middle), "actions": middle.actions.hex()}}
            print(f"score {label} training, {how}: {format_mean(scores)}")
        return result

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
        return self._call("film", (shown, FILM_EVERY))

    def _call(self, function: str, arguments: tuple) -> Any:
        self._pool.send(0, function, arguments)
        outcome = self._pool.next_outcome()
        assert outcome is not None
        if isinstance(outcome[1], Loss | WorkerError):
            raise InputError(f"the process that scores policies: {outcome[1]}")
        return outcome[1]


def _even(frame: np.ndarray) -> np.ndarray:
    """With even sides, as H.264 needs them."""
    return frame[: frame.shape[0] // 2 * 2, : frame.shape[1] // 2 * 2]


def format_mean(scores: Sequence[float]) -> str:
    """A mean as text: "212.0 (95% interval 180.3 to 243.7, 20 episodes)"."""
    if not len(scores):
        return "no episodes"
    if len(scores) == 1:
        return f"{scores[0]:.1f} (1 episode)"
    mean, low, high = mean_interval(scores)
    return f"{mean:.1f} (95% interval {low:.1f} to {high:.1f}, {len(scores)} episodes)"


def results_table(facts: Mapping[str, Any]) -> list[list[str]]:
    """Rows: how, mean score before and after, each with its interval; the first row is the head."""
    rows = [["raw score", "before training", "after training"]]
    for how in ("sampled", "greedy"):
        cells = [facts.get(when, {}).get(how, {}).get("scores", []) for when in ("before", "after")]
        if any(cells):
            rows.append([how, *map(format_mean, cells)])
    return rows


def write_results(
    run_dir: Path, config: Config, facts: Mapping[str, Any], history: list[dict[str, Any]], seconds: float
) -> None:
    """Write results.json and print the table."""
    table = results_table(facts)
    results = {
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(sys.argv),
        "config": to_dict(config),
        "machine": machine(),
        "seconds": seconds,
        "scores": {when: facts.get(when, {}) for when in ("before", "after")},
        "table": table,
        "history": history,
    }
    write_json(run_dir / "results.json", results)
    widths = [max(len(row[column]) for row in table) for column in range(3)]
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    if history:
        last = history[-1]
        speed = last["steps"] / max(1e-9, last["seconds"])
        print(
            f"{last['steps']:,} steps, {last['episodes']:,} episodes in {seconds / 60:.1f} minutes with scores; "
            f"{speed:.0f} steps/s, best episode {last['best_score']}"
        )
    print(f"  {run_dir}")
