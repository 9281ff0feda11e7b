"""Scores before and after training, and what is left of a run for people: results.json, the table, the videos."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from pi0.base.files import write_json
from pi0.base.stats import mean_interval
from pi0.base.video import captioned, write_video
from pi0.parallel.actor import Episode
from pi0.parallel.config import Config, to_dict
from pi0.parallel.policy import views
from pi0.parallel.slices import Layout, publish
from pi0.parallel.worker import PlayerSpec
from pi0.training.machine import machine
from pi0.workers.pool import WorkerPool

EVALUATION_SEED = 1_000_003  # added to the run's seed: no episode of a score is one of training
WAYS = ("sampled", "greedy")  # how actions are chosen for a score
FILM_EVERY = 2  # steps from one frame of a video to the next
FILM_FPS = 15  # twice as fast as the game, which makes 15 steps of 4 frames a second
FILM_STEPS = 2000  # a video shows at most so many steps of an episode


class Scorer:
    """Scores policies and films episodes, in processes of its own.

    Args:
        spec: the game as the workers play it.
        config: the run's settings.
        check: called while it waits; what it raises ends the waiting.
    """

    def __init__(self, spec: PlayerSpec, config: Config, check: Callable[[], None]):
        layout = self._layout = Layout(1, 1, 1, spec.layout.actions)
        self._config = config
        self._pool = WorkerPool(
            "pi0.parallel.worker:worker_process",
            replace(spec, layout=layout, nice=0),
            {},
            len(WAYS),
            streams=np.random.SeedSequence(0),
            limit_s=3600.0,
            check=check,
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
            "sampled" and "greedy", each with its `scores`, and as `episode` the one with the middle score.
        """
        if not self._config.evaluation_episodes:
            return {}
        self._version += 2  # always the same buffer
        publish(self._layout, self._pool.common, views(weights, self._layout.actions), self._version)
        seed = self._config.seed + EVALUATION_SEED
        calls = [(self._config.evaluation_episodes, how == "greedy", seed) for how in WAYS]
        result: dict[str, Any] = {}
        for how, played in zip(WAYS, self._call("play", calls), strict=True):
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
        (screens,) = self._call("film", [(shown, FILM_EVERY)])
        return screens

    def _call(self, function: str, calls: Sequence[tuple]) -> list[Any]:
        """Results of calls, in their order, each in a process of its own."""
        return [result for _, result in sorted(self._pool.call(function, calls), key=lambda pair: pair[0])]


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
    for how in WAYS:
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
    for row in table if len(table) > 1 else []:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    if history:
        last = history[-1]
        speed = last["steps"] / max(1e-9, last["seconds"])
        best = (
            "no episode has ended" if last["best_score"] is None else f"best score {last['best_score']:.0f}"
        )
        print(
            f"{last['steps']:,} steps, {last['episodes']:,} episodes in {seconds / 60:.1f} minutes with scores; "
            f"{speed:.0f} steps/s, {best}"
        )
    print(f"  {run_dir}")
