"""Evaluate a policy on LIBERO tasks.

    python -m pi0.evaluate --policy_path checkpoints/pi0_tiny_libero_spatial --suite libero_spatial --tasks 3 8 --episodes 50

It prints success per task with 95% intervals and writes them with the protocol as JSON; `--videos` adds videos.
Episodes whose simulation broke are not counted; if more than a tenth broke, the exit status is 3.
"""

from __future__ import annotations

import argparse
import sys
import time

import torch

from pi0 import PI0Policy, pick_device
from pi0.base.arguments import Collect, ranged
from pi0.base.errors import run_command
from pi0.base.files import writable_dir, write_json
from pi0.base.stats import format_rate
from pi0.libero.environments import Environments
from pi0.libero.evaluation import describe_broken, evaluate, refuse_broken
from pi0.libero.films import film_episodes
from pi0.libero.init_states import FIXTURE_MODES
from pi0.libero.rendering import MODES
from pi0.libero.rollouts import Policy
from pi0.libero.settings import ScoreConfig, TaskConfig, range_of, task_of_command
from pi0.policy.acting import ActingPolicy
from pi0.policy.critics import BestOfPolicy, load_critic
from pi0.training.machine import machine


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m pi0.evaluate",
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--policy_path", required=True, help="policy folder")
    parser.add_argument(
        "--norm_stats_path", help="normalisation statistics to use instead of the folder's own"
    )
    parser.add_argument(
        "--suite", default="libero_spatial", help="libero_spatial, _object, _goal, _10 or _90"
    )
    parser.add_argument(
        "--tasks", action=Collect, nargs="*", default=[], help="tasks by index or name; none: the whole suite"
    )
    parser.add_argument(
        "--episodes",
        type=range_of(ScoreConfig, "episodes"),
        default=50,
        help="number in all, spread evenly over the tasks; at most 50 a task",
    )
    parser.add_argument(
        "--seed", type=range_of(ScoreConfig, "seed"), default=0, help="seed of the policy's noise"
    )
    parser.add_argument(
        "--guidance_weight",
        type=ranged(float, low=0),
        help="act by classifier-free guidance with this weight",
    )
    parser.add_argument(
        "--critic_path", help="folder of a critic (pi0.acrlpd), which chooses among --samples chunks"
    )
    parser.add_argument(
        "--samples", type=ranged(int, low=1), default=8, help="chunks among which the critic chooses"
    )
    parser.add_argument("--assets", help="folder of LIBERO's assets, or standins; searched for by default")
    parser.add_argument(
        "--fixtures", default="libero_eval", choices=FIXTURE_MODES, help="placement of cabinet and stove"
    )
    parser.add_argument("--render", default="fast", choices=MODES, help="fast frames, or exactly LIBERO's")
    parser.add_argument(
        "--image_size",
        type=range_of(TaskConfig, "image_size"),
        help="pixels a side of the frames, which are resized to the policy's; default: the policy's; openpi's: 256",
    )
    parser.add_argument(
        "--replan_steps",
        type=range_of(TaskConfig, "replan_steps"),
        help="actions executed of each chunk; default: all, at most 10; openpi's: 5",
    )
    parser.add_argument(
        "--max_episode_length",
        type=range_of(TaskConfig, "max_episode_length"),
        help="control steps; default: the suite's usual horizon",
    )
    parser.add_argument(
        "--settle_steps",
        type=range_of(TaskConfig, "settle_steps"),
        default=10,
        help="control steps of standing still before the policy acts",
    )
    parser.add_argument(
        "--workers",
        type=range_of(TaskConfig, "num_parallel_envs"),
        help="simulator processes; one on each core by default",
    )
    parser.add_argument(
        "--device", default="auto", help="device of the policy: cpu, cuda, cuda:1; auto: the GPU if any"
    )
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=["float32", "bfloat16"],
        help="type of the transformers' weights",
    )
    parser.add_argument(
        "--compile", action="store_true", help="compile the network with torch.compile, which takes minutes"
    )
    parser.add_argument("--output", default="outputs/evaluation", help="folder for results.json and videos")
    parser.add_argument("--videos", type=ranged(int, low=0), default=0, help="episodes of each task to film")
    options = parser.parse_args(arguments)
    return options


def main(arguments: list[str] | None = None) -> None:
    """Evaluate, print, write."""
    options = parse_arguments(arguments)
    started = time.monotonic()
    policy = PI0Policy.from_pretrained(
        options.policy_path,
        pick_device(options.device),
        getattr(torch, options.dtype),
        options.norm_stats_path,
        trainable="none",
    )
    policy.compiled = options.compile
    horizon = policy.config.action_horizon
    output = writable_dir(options.output)
    task = task_of_command(options, replan_steps=options.replan_steps or min(10, horizon))
    with Environments(task, policy.config) as environments:
        acting: Policy = ActingPolicy(policy, options.guidance_weight)
        if options.critic_path:
            critic = load_critic(options.critic_path, policy.device)
            acting = BestOfPolicy(policy, *critic, options.samples, options.guidance_weight)
        result = evaluate(environments, acting, options.episodes, options.seed)
        write_json(
            output / "results.json",
            {
                "date": time.strftime("%Y-%m-%d"),
                "command": " ".join(sys.argv),
                "policy_path": options.policy_path,
                "protocol": {
                    **result.protocol,
                    "guidance_weight": options.guidance_weight,
                    "critic_path": options.critic_path,
                    "samples": options.samples if options.critic_path else 1,
                },
                "dtype": options.dtype,
                "compiled": options.compile,
                "machine": machine(),
                "seconds": time.monotonic() - started,
                **result.score(),
            },
        )
        if options.videos:
            film_episodes(environments, acting, result, options.videos, output)
    for name, outcomes in [*result.by_task().items(), ("all tasks", result.outcomes)]:
        print(f"{name.replace('_', ' '):<90} {format_rate(sum(outcomes), len(outcomes))}")
    if result.broken:
        print(describe_broken(result.broken, len(result.episodes)))
    print(f"written to {output}")
    refuse_broken("evaluation", result.broken, len(result.episodes))


if __name__ == "__main__":
    run_command(main)
