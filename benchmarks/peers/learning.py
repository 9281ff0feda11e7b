"""Scores of Stable-Baselines3's PPO while it learns, for benchmarks/parallel_learning.py, which runs this in .venv-peers.

    .venv-peers/bin/python benchmarks/peers/learning.py --updates 50 --seed 0 --threads 2 --output outputs/sb3.jsonl

Each update adds a line to the file: seconds since the first step, steps, and the raw scores of the episodes that ended.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))

import torch
from games import STACK, UPDATE_INTERVAL, make_scored_env
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import SubprocVecEnv, VecFrameStack
from training import CLIP, ENTROPY, LR, stable_baselines3_ppo

from pi0.base.arguments import ranged


class Scores(BaseCallback):
    """Writes the scores after each update."""

    def __init__(self, file: Path):
        super().__init__()
        self._file = file
        self._scores: list[float] = []

    def _on_training_start(self) -> None:
        self._started = time.perf_counter()

    def _on_step(self) -> bool:
        self._scores += [float(info["episode"]["r"]) for info in self.locals["infos"] if "episode" in info]
        return True

    def _on_rollout_start(self) -> None:
        if self.num_timesteps:  # an update is done
            self._write()

    def _on_training_end(self) -> None:
        self._write()

    def _write(self) -> None:
        line = {
            "seconds": time.perf_counter() - self._started,
            "steps": self.num_timesteps,
            "scores": self._scores,
        }
        with self._file.open("a") as file:
            file.write(json.dumps(line) + "\n")
        self._scores = []


def main() -> None:
    """Train."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--envs", type=ranged(int, 1), default=8)
    parser.add_argument("--threads", type=ranged(int, 1), default=1, help="torch threads")
    parser.add_argument("--updates", type=ranged(int, 1), default=50)
    parser.add_argument("--seed", type=ranged(int, 0), default=0)
    parser.add_argument("--lr", type=ranged(float, above=0), default=LR)
    parser.add_argument("--clip", type=ranged(float, above=0), default=CLIP)
    parser.add_argument("--entropy_weight", type=ranged(float, low=0), default=ENTROPY)
    parser.add_argument("--output", type=Path, required=True, help="JSON lines")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    games = VecFrameStack(SubprocVecEnv([make_scored_env] * options.envs), STACK)
    ppo = stable_baselines3_ppo(games, options.seed, options.lr, options.clip, options.entropy_weight)
    ppo.learn(options.updates * UPDATE_INTERVAL, Scores(options.output))
    games.close()


if __name__ == "__main__":
    main()
