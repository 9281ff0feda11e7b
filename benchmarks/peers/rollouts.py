"""Steps a second of Stable-Baselines3's environments without learning, and the time of their parts.

    .venv-peers/bin/python benchmarks/peers/rollouts.py --envs 8 --threads 1 --seconds 10
    .venv-peers/bin/python benchmarks/peers/rollouts.py --parts --seconds 10

benchmarks/parallel.py runs this in .venv-peers. A torch policy in this process acts on the stacks of all environments
of SubprocVecEnv with VecFrameStack. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from games import STACK, NatureNetwork, make_console, make_env, parameters, resident_mb
from stable_baselines3.common.vec_env import SubprocVecEnv, VecFrameStack

from pi0.base.arguments import ranged

WARM_UP = 100  # calls before a measurement


def rollouts(envs: int, seconds: float) -> dict[str, float]:
    """Steps a second of all environments."""
    games = SubprocVecEnv([make_env] * envs)
    stacked = VecFrameStack(games, STACK)
    network = NatureNetwork(int(stacked.action_space.n))
    now = stacked.reset()

    def step() -> None:
        nonlocal now
        now = stacked.step(act(network, now))[0]

    rate = 1 / call_s(step, seconds)
    memory = [resident_mb(process.pid) for process in games.processes]
    stacked.close()
    return {
        "steps_per_s": envs * rate,
        "worker_mb": sum(memory) / len(memory),
        "parameters": parameters(network),
    }


def act(network: NatureNetwork, stacks: np.ndarray) -> np.ndarray:
    """Sampled actions for stacks, uint8 [B, 84, 84, 4]."""
    with torch.inference_mode():
        logits, _ = network(torch.from_numpy(stacks).permute(0, 3, 1, 2).float())
        return torch.distributions.Categorical(logits=logits).sample().numpy()


def parts(envs: int, seconds: float) -> dict[str, float]:
    """Milliseconds of the parts of a step, each measured alone."""
    seconds /= 4
    found = {}
    console = make_console()
    console.reset()
    actions = int(console.action_space.n)

    def frame() -> None:
        if console.step(random.randrange(actions))[2]:
            console.reset()

    found["emulator"] = 4e3 * call_s(frame, seconds)
    console.close()
    env = make_env()
    env.reset()

    def step() -> None:
        _, _, terminated, truncated, _ = env.step(random.randrange(actions))
        if terminated or truncated:
            env.reset()

    whole = 1e3 * call_s(step, seconds)
    found["preprocessing"] = whole - found["emulator"]
    env.close()
    network = NatureNetwork(actions)
    stacks = np.random.default_rng(0).integers(0, 256, (envs, 84, 84, STACK), np.uint8)
    found["inference"] = 1e3 * call_s(lambda: act(network, stacks), seconds) / envs
    stacked = VecFrameStack(SubprocVecEnv([make_env]), STACK)
    stacked.reset()
    there_and_back = 1e3 * call_s(lambda: stacked.step([random.randrange(actions)]), seconds)
    found["transport"] = there_and_back - whole
    stacked.close()
    return found


def call_s(call: Callable[[], object], seconds: float) -> float:
    """Seconds of a call, the mean over so many seconds."""
    for _ in range(WARM_UP):
        call()
    calls, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < seconds:
        call()
        calls += 1
    return elapsed / calls


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--envs", type=ranged(int, 1), default=8)
    parser.add_argument("--threads", type=ranged(int, 1), default=1, help="torch threads")
    parser.add_argument(
        "--seconds", type=ranged(float, above=0), default=10.0, help="length of the measurement"
    )
    parser.add_argument("--parts", action="store_true", help="the parts of a step instead")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(json.dumps((parts if options.parts else rollouts)(options.envs, options.seconds)))


if __name__ == "__main__":
    main()
