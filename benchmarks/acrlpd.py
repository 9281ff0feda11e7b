"""What do ACRLPD's caches and shared prefixes save, and what does its memory hold? Prints tables.

    python benchmarks/acrlpd.py                                   # 27 minutes on 2 cores, with nothing beside it
    python benchmarks/acrlpd.py --parts update --turns 5
    python benchmarks/acrlpd.py --parts memory                    # a second: only counts
    python benchmarks/acrlpd.py --table benchmarks/results/acrlpd.json

| part | what is compared |
|---|---|
| update | a step of the critics with kept features and candidate chunks, and one that computes them from images |
| sampling | N chunks of an observation whose prefix is computed once, and N times: the published proportions with all widths a quarter, and the tiny policy |
| rollouts | the same rollouts with the best of 1, 8 and 32 chunks; settings of configs/acrlpd_quickstart.yaml |
| memory | not measured: what the states of configs/acrlpd_pi0_libero.yaml take on each of 1, 2, 4 and 8 cards, without activations |

Sides take turns, the order changes every turn, and one turn before does not count. Times are medians (lowest to
highest), ratios the geometric mean over turns with Student's 95% interval. Episodes of `update` are made up, weights of the critics
and of the quarter-size policy random: no time depends on them.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import torch

from benchmarks.pi0 import make_policy, noise_for, observations, repeat
from pi0 import PI0Policy
from pi0.acrlpd.acrlpd_data_loader import ACRLPDDataLoader
from pi0.acrlpd.acrlpd_pi0_agent import create_acrlpd_pi0_agent_from_rl_config
from pi0.acrlpd.config import get_config
from pi0.acrlpd.episodes import RecordedEpisode
from pi0.acrlpd.fsdp_support import create_global_optimizers
from pi0.acrlpd.practice import choose_rollouts, practise
from pi0.base.arguments import Collect, ranged
from pi0.base.errors import run_command
from pi0.base.files import read_json, write_json
from pi0.base.progress import progress
from pi0.base.stats import mean_interval
from pi0.libero.environments import Environments
from pi0.model.config import Pi0Config
from pi0.policy.critics import BestOfPolicy, PolicyFeatures
from pi0.training.machine import machine
from pi0.training.memory import release

PARTS = ("update", "sampling", "rollouts", "memory")
LOOKS = 20  # observations of a made-up episode
SAMPLES = 32
COUNTS = (1, 8, 32)
# At least, over the side that saves nothing; and for rollouts, of the speed with one sample.
GOALS = {"update": 5.0, "sampling, a quarter of pi0": 6.0, "rollouts, best of 8": 0.8}
Times = dict[str, list[float]]


def main() -> None:
    """Measure, save, print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", action=Collect, nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--turns", type=ranged(int, low=1), default=5, help="measurements of each side")
    parser.add_argument(
        "--episodes", type=ranged(int, low=1), default=40, help="made-up episodes of `update`"
    )
    parser.add_argument("--rollouts", type=ranged(int, low=1), default=24, help="rollouts of a measurement")
    parser.add_argument("--shrink", type=int, default=4, choices=[1, 2, 4, 8], help="divisor of pi0's widths")
    parser.add_argument("--output", default="outputs/acrlpd.json")
    parser.add_argument("--table", metavar="FILE", help="only print the tables of this file")
    options = parser.parse_args()
    if options.table:
        print(tables(read_json(Path(options.table))))
        return
    found: dict[str, Times] = {}
    for part in (part for part in options.parts if part != "memory"):
        found |= {"update": update, "sampling": sampling, "rollouts": rollouts}[part](options)
    result = {"date": time.strftime("%Y-%m-%d"), "machine": machine(), "turns": options.turns, "parts": found}
    if "memory" in options.parts:
        result["memory"] = memory()
    write_json(Path(options.output), result)
    print(tables(result))


def in_turns(label: str, sides: Mapping[str, Callable[[], Any]], turns: int) -> Times:
    """Seconds of each side."""
    taken: Times = {name: [] for name in sides}
    with progress(total=(turns + 1) * len(sides), label=label, unit="run") as bar:
        for turn in range(turns + 1):
            for name in list(sides)[:: 1 if turn % 2 else -1]:
                started = time.perf_counter()
                sides[name]()
                seconds = time.perf_counter() - started
                if turn:
                    taken[name].append(seconds)
                bar.update(1, f"{name}: {1e3 * seconds:.1f} ms")
    return taken


def update(options: argparse.Namespace) -> dict[str, Times]:
    """Steps of the critics, and what keeping costs once an iteration."""
    config = get_config("acrlpd_quickstart")
    policy = PI0Policy.from_pretrained(config.policy_path)
    agent = create_acrlpd_pi0_agent_from_rl_config(config, policy)
    create_global_optimizers(agent, config)
    loader = ACRLPDDataLoader(policy, agent.features.network, 10**6)
    random = np.random.default_rng(0)
    loader.add(
        [made_episode(policy, config.qchunking.horizon_length, random) for _ in range(options.episodes)]
    )
    loader.caches.refresh(loader.replay, agent.sample)
    kept = ("features", "next_features", "candidates", "next_candidates")
    size = config.data.batch_size

    release()  # as the trainer does

    def fresh() -> None:
        candidates, loader.caches.candidates = loader.caches.candidates, None  # so that images come along
        batch = loader.sample_batch(size)
        loader.caches.candidates = candidates
        agent.critic_step({name: value for name, value in batch.items() if name not in kept})

    times = in_turns(
        "update",
        {"cached": lambda: agent.critic_step(loader.sample_batch(size, images=False)), "fresh": fresh},
        options.turns,
    )
    once = in_turns("refresh", {"all": lambda: loader.caches.refresh(loader.replay, agent.sample)}, 1)["all"]
    each = [seconds / len(loader.replay.states) for seconds in once]
    return {"update": times, "candidates of an observation": {"8 chunks": each}}


def made_episode(policy: PI0Policy, horizon: int, random: np.random.Generator) -> RecordedEpisode:
    """A successful episode of noise."""
    size = policy.config.image_size
    rewards = np.zeros((LOOKS, horizon), np.float32)
    rewards[-1, -1] = 1
    return RecordedEpisode(
        prompt="pick up the black bowl on the cookie box and place it on the plate",
        images={
            camera: random.integers(0, 256, (LOOKS + 1, size, size, 3), dtype=np.uint8)
            for camera in policy.config.cameras
        },
        states=random.normal(size=(LOOKS + 1, policy.config.robot_state_dim)).astype(np.float32),
        actions=random.uniform(-1, 1, (LOOKS, horizon, policy.config.robot_action_dim)).astype(np.float32),
        executed=np.full(LOOKS, horizon),
        rewards=rewards,
        terminated=True,
        success=True,
    )


@torch.inference_mode()
def sampling(options: argparse.Namespace) -> dict[str, Times]:
    """Chunks of one observation, with a prefix for all or for each."""
    quarter = {"preset": "pi0", "shrink": options.shrink, "dtype": "float32"}
    name = {4: "a quarter of pi0", 1: "pi0"}.get(options.shrink, f"pi0 with widths / {options.shrink}")
    policies = {
        name: make_policy(quarter, torch.device("cpu")),
        "the tiny policy": PI0Policy.from_pretrained(ROOT / "checkpoints" / "pi0_tiny_libero_spatial"),
    }
    found = {}
    for which, policy in policies.items():
        once, noise = observations(policy, 1), noise_for(policy, SAMPLES)
        alike = {key: repeat(value, SAMPLES) for key, value in once.items()}

        def shared(policy=policy, once=once, noise=noise) -> torch.Tensor:
            return policy.sample_actions(**once, noise=noise[:, None])[:, 0]

        def recomputed(policy=policy, alike=alike, noise=noise) -> torch.Tensor:
            return policy.sample_actions(**alike, noise=noise)

        difference = (shared() - recomputed()).abs().max().item()
        if not difference < 1e-3:
            raise SystemExit(f"sharing changes the actions by {difference}")
        found[f"sampling, {which}"] = in_turns(
            which, {"shared": shared, "recomputed": recomputed}, options.turns
        )
    return found


def rollouts(options: argparse.Namespace) -> dict[str, Times]:
    """The same rollouts with more and more chunks to choose from, by critics that nobody has trained."""
    config = get_config("acrlpd_quickstart")
    policy = PI0Policy.from_pretrained(config.policy_path)
    agent = create_acrlpd_pi0_agent_from_rl_config(config, policy)
    horizon = config.qchunking.horizon_length
    with Environments(config.task, policy.config) as environments:
        pools = environments.training_states(8, 0)
        chosen = choose_rollouts(environments, pools, options.rollouts, 0, 0)
        # An episode that is solved ends early: all sides shall take as many steps.
        chosen = [replace(each, horizon=100) for each in chosen]

        def run(samples: int) -> Callable[[], Any]:
            acting = BestOfPolicy(policy, agent.critic_networks, agent.features.network, samples)
            return lambda: practise(environments, acting, chosen, horizon, f"best of {samples}")

        return {"rollouts": in_turns("rollouts", {f"best of {n}": run(n) for n in COUNTS}, options.turns)}


def memory() -> list[dict[str, float]]:
    """GB of each card, by number of cards, from the numbers of weights alone."""
    config = Pi0Config.preset("pi0")
    with torch.device("meta"):
        policy = PI0Policy(config)
        features = PolicyFeatures(config, policy.network)
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    every = sum(p.numel() for p in policy.parameters())
    fixed = sum(p.numel() for p in features.parameters())
    lines = []
    for cards in (1, 2, 4, 8):
        line = {
            "weights": every / cards, "gradients": trained / cards, "moments": 2 * trained / cards,
            "average": every, "features": fixed,
        }  # fmt: skip
        in_gb = {name: 4 * count / 1e9 for name, count in line.items()}  # float32
        lines.append({"cards": cards, **in_gb, "all": sum(in_gb.values())})
    return lines


# Tables -------------------------------------------------------------------------------------------


def tables(result: Mapping[str, Any]) -> str:
    """Times and ratios as Markdown."""
    lines = ["| what | ms | ratio | goal |", "|---|---|---|---|"] if result["parts"] else []
    for part, times in result["parts"].items():
        slowest = list(times)[-1] if part != "rollouts" else next(iter(times))
        for side, seconds in times.items():
            goal, ratio = "", ""
            if len(times) > 1 and side != slowest:
                ratio = format_ratio([s / own for s, own in zip(times[slowest], seconds, strict=True)])
                wanted = GOALS.get(part, GOALS.get(f"{part}, {side}"))
                goal = f"{wanted:g}" if wanted else ""
            lines.append(f"| {part}, {side} | {spread(seconds)} | {ratio} | {goal} |")
    if "memory" in result:
        names = list(result["memory"][0])
        lines += ["", f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
        lines += [f"| {' | '.join(f'{v:.3g}' for v in line.values())} |" for line in result["memory"]]
        lines.append("")
        lines.append(
            "GB a card in float32: actor's weights, gradients and moments sharded, average and features whole"
        )
    machine_ = result["machine"]
    return "\n".join(
        [
            *lines,
            "",
            f"{machine_['cpu']}, torch {machine_['torch']}, {result['date']}, {result['turns']} turns",
        ]
    )


def format_ratio(values: Sequence[float]) -> str:
    """Geometric mean with Student's 95% interval of the logarithms."""
    mean, low, high = (math.exp(each) for each in mean_interval([math.log(value) for value in values]))
    return f"{mean:.2f} (one turn)" if len(values) == 1 else f"{mean:.2f} ({low:.2f} to {high:.2f})"


def spread(seconds: Sequence[float]) -> str:
    """Median milliseconds (lowest to highest)."""
    ms = [1e3 * each for each in seconds]
    return f"{statistics.median(ms):,.2f} ({min(ms):,.2f} to {max(ms):,.2f})"


if __name__ == "__main__":
    run_command(main)
