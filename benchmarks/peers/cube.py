"""OGBench's cube-single in an environment of its own (.venv-qc): data of its oracle, episodes, and qc's learner.

    .venv-qc/bin/python benchmarks/peers/cube.py data --output FILE --episodes 100
    .venv-qc/bin/python benchmarks/peers/cube.py learn --qc FOLDER --data FILE --seed 0
    .venv-qc/bin/python benchmarks/peers/cube.py play --count 100       # a chunk a line on stdin, an observation a line on stdout

benchmarks/qc.py calls it. FOLDER is a checkout of https://github.com/ColinQiyangLi/qc, whose code learns unchanged.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("MUJOCO_GL", "disable")  # nothing is drawn

sys.path.append(str(Path(__file__).resolve().parents[2]))

import gymnasium
import numpy as np
import ogbench.manipspace  # noqa: F401 - registers its environments

from pi0.base.arguments import ranged
from pi0.base.progress import progress

LONGEST = 200  # steps of an episode that is scored
PLAY_STEPS = 1001  # of an episode of data: OGBench's data_gen_scripts/generate_manipspace.py, "play"
FIRST_STATE = 1_000_000  # seeds of the scored episodes' first states
warnings.filterwarnings(
    "ignore", message=".*precision lowered by casting"
)  # of the action space, which is float32


def main() -> None:
    """Do one of the three."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["data", "learn", "play"])
    parser.add_argument(
        "--task", type=ranged(int, low=1, high=5), default=2, help="2 is OGBench's default of cube-single"
    )
    parser.add_argument("--output", type=Path)
    parser.add_argument(
        "--episodes", type=ranged(int, low=1), default=100, help="of the oracle, 1000 steps each"
    )
    parser.add_argument("--qc", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--settings", type=json.loads, default={}, help="of the learner, JSON")
    parser.add_argument("--seed", type=ranged(int, low=0), default=0)
    parser.add_argument("--count", type=ranged(int, low=1), default=100, help="episodes that are scored")
    options = parser.parse_args()
    {"data": make_data, "learn": learn, "play": play}[options.what](options)


def task_environment(task: int) -> gymnasium.Env:
    """The environment of a task: reward is 0 where the cube is in its place and -1 elsewhere."""
    return gymnasium.make(f"cube-single-singletask-task{task}-v0")


def make_data(options: argparse.Namespace) -> None:
    """Episodes of OGBench's oracle, which moves the cube from place to place, with the rewards of the task."""
    from ogbench.manipspace.oracles.plan.cube_plan import CubePlanOracle
    from ogbench.relabel_utils import relabel_dataset

    env = gymnasium.make(
        "cube-single-v0", terminate_at_goal=False, mode="data_collection", max_episode_steps=PLAY_STEPS
    )
    oracle = CubePlanOracle(env=env, noise=0.1, noise_smoothing=0.5)
    np.random.seed(options.seed)
    rows: dict[str, list[np.ndarray]] = {
        name: [] for name in ("observations", "actions", "next_observations", "terminals", "qpos")
    }
    with progress(options.episodes, "data", "episode") as bar:
        for episode in range(options.episodes):
            seen, info = env.reset(seed=1000 * options.seed + episode)
            oracle.reset(seen, info)
            done, steps = False, []
            while not done:
                action = np.clip(oracle.select_action(seen, info), -1, 1).astype(np.float32)
                then, _, terminated, truncated, info = env.step(action)
                done = terminated or truncated
                if oracle.done:
                    oracle.reset(*env.unwrapped.set_new_target(p_stack=0.0))
                steps.append((seen, action, then, info["prev_qpos"]))
                seen = then
            for number, (seen, action, then, qpos) in enumerate(steps):
                rows["observations"].append(seen.astype(np.float32))
                rows["actions"].append(action)
                rows["next_observations"].append(then.astype(np.float32))
                rows["terminals"].append(np.float32(number == len(steps) - 1))
                rows["qpos"].append(qpos.astype(np.float32))
            bar.update(1)
    data = {name: np.stack(values) for name, values in rows.items()}
    name = f"cube-single-singletask-task{options.task}-v0"
    relabel_dataset(name, task_environment(options.task), data)  # adds rewards and masks
    del data["qpos"]
    np.savez(options.output, **data)
    solved = int((data["masks"] == 0).sum())
    print(json.dumps({"steps": len(data["actions"]), "steps_in_place": solved}))


def learn(options: argparse.Namespace) -> None:
    """qc's agent from the data; prints its score and speed as JSON."""
    sys.path.insert(0, str(options.qc.resolve()))
    import jax
    from agents.acfql import ACFQLAgent, get_config
    from utils.datasets import Dataset

    settings = options.settings
    config = get_config()
    config.actor_type = "best-of-n"
    config.actor_num_samples = settings["samples"]
    config.actor_hidden_dims = config.value_hidden_dims = (settings["hidden"],) * settings["layers"]
    config.batch_size, config.horizon_length = settings["batch"], settings["horizon"]
    config.discount, config.lr, config.tau = (
        settings["discount"],
        settings["lr"],
        settings["target_update_rate"],
    )
    np.random.seed(options.seed)
    with np.load(options.data) as file:
        dataset = Dataset.create(**{name: file[name] for name in file.files})
    # As qc's make_env_and_datasets does it.
    clipped = np.clip(dataset["actions"], -1 + 1e-5, 1 - 1e-5)
    dataset = dataset.copy(add_or_replace={"actions": clipped})
    example = dataset.sample(())
    agent = ACFQLAgent.create(options.seed, example["observations"], example["actions"], config)
    started = None
    with progress(settings["updates"], f"qc, seed {options.seed}", "update") as bar:
        for number in range(settings["updates"]):
            batch = dataset.sample_sequence(config.batch_size, config.horizon_length, config.discount)
            agent, info = agent.update(batch)
            if started is None:  # compiled
                jax.block_until_ready(info)
                started = time.perf_counter()
            shown = f"critic loss {float(info['critic/critic_loss']):.4f}" if number % 1000 == 0 else ""
            bar.update(1, shown)
    jax.block_until_ready(info)
    seconds = time.perf_counter() - started
    key = jax.random.PRNGKey(options.seed)

    def act(seen: np.ndarray) -> np.ndarray:
        nonlocal key
        key, own = jax.random.split(key)
        chosen = agent.sample_actions(observations=seen, rng=own)
        return np.asarray(chosen).reshape(config.horizon_length, -1)

    outcomes = score(options.task, options.count, act)
    print(json.dumps({"outcomes": outcomes, "updates_per_s": (settings["updates"] - 1) / seconds}))


def play(options: argparse.Namespace) -> None:
    """Episodes for a policy in another process: prints an observation, reads a chunk; at the end prints the outcomes."""

    def ask(seen: np.ndarray) -> np.ndarray:
        print(json.dumps({"seen": seen.tolist()}), flush=True)
        return np.array(json.loads(sys.stdin.readline()), np.float32)

    print(json.dumps({"outcomes": score(options.task, options.count, ask)}))


def score(task: int, count: int, act: Callable[[np.ndarray], np.ndarray]) -> list[bool]:
    """Whether each of `count` episodes put the cube in its place; `act` gives a chunk, which is carried out as a whole.

    The first states are the same for everyone.
    """
    env = task_environment(task)
    outcomes = []
    with progress(count, "score", "episode") as bar:
        for episode in range(count):
            seen, info = env.reset(seed=FIRST_STATE + episode)
            done, steps = False, 0
            while not done:
                for action in act(seen):
                    seen, _, terminated, truncated, info = env.step(np.clip(action, -1, 1))
                    steps += 1
                    done = terminated or truncated or steps == LONGEST
                    if done:
                        break
            outcomes.append(bool(info["success"]))
            bar.update(1)
    return outcomes


if __name__ == "__main__":
    main()
