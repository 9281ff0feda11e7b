"""Evaluate a policy on LIBERO tasks.

    python -m pi0.evaluate --policy_path checkpoints/pi0_tiny_libero_spatial --suite libero_spatial --tasks 3 8 --episodes 50

    python -m pi0.evaluate --server ws://127.0.0.1:8000 --suite libero_spatial --tasks 3 8 --episodes 50

The policy is a folder, or runs elsewhere behind openpi's protocol (`python -m pi0.serve`, or openpi's own server). It
prints success per task with 95% intervals and writes them with the protocol as JSON; `--videos` adds videos.
Episodes whose simulation broke are not counted; if more than a tenth broke, the exit status is 3.
"""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import ExitStack
from typing import Any

import torch

from pi0 import PI0Policy, pick_device
from pi0.base.arguments import Collect, ranged
from pi0.base.errors import run_command
from pi0.base.files import writable_dir, write_json
from pi0.base.stats import format_rate
from pi0.libero.environments import Environments, PolicySpec
from pi0.libero.evaluation import describe_broken, evaluate, refuse_broken
from pi0.libero.films import VIDEO_EVERY, write_films
from pi0.libero.init_states import FIXTURE_MODES
from pi0.libero.rendering import MODES
from pi0.libero.rollouts import Policy
from pi0.libero.scoring import score
from pi0.libero.settings import ScoreConfig, TaskConfig, range_of, task_of_command
from pi0.model.config import Pi0Config
from pi0.policy.acting import ActingPolicy
from pi0.policy.critics import BestOfPolicy, load_critic
from pi0.serving.client import ServedPolicy
from pi0.serving.messages import plain
from pi0.training.machine import machine

OPENPI_FRAME, OPENPI_REPLAN = 256, 5  # examples/libero/main.py: for servers that do not say what they want

__all__ = ["main", "parse_arguments", "score"]


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m pi0.evaluate",
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    policy = parser.add_mutually_exclusive_group(required=True)
    policy.add_argument("--policy_path", help="policy folder")
    policy.add_argument(
        "--server", metavar="URL", help="address of a policy server, such as ws://127.0.0.1:8000"
    )
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
        help="pixels a side of the frames, which are resized to the policy's; default: the policy's; openpi's, and that of "
        "servers whose metadata name no size: 256",
    )
    parser.add_argument(
        "--server_image_size",
        type=range_of(TaskConfig, "image_size"),
        help="pixels a side of the images sent to a server; default: what its metadata say, else openpi's 224",
    )
    parser.add_argument(
        "--chunk_length",
        type=ranged(int, low=1),
        help="actions of a server's chunk that are used; default: all",
    )
    parser.add_argument(
        "--server_connections",
        type=ranged(int, low=1),
        default=4,
        help="connections to a server, each with one request at a time",
    )
    parser.add_argument(
        "--server_patience",
        type=ranged(float, above=0),
        default=300.0,
        help="seconds for which a server that does not answer is waited for",
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
    if options.server is not None:
        of_a_folder = ("norm_stats_path", "guidance_weight", "critic_path", "compile")
        given = [name for name in of_a_folder if getattr(options, name)]
        if given:
            parser.error(f"--{given[0]} is for --policy_path; start the server with it (python -m pi0.serve)")
    return options


def local_policy(options: argparse.Namespace) -> tuple[Policy, Pi0Config, dict[str, Any]]:
    """The policy of a folder, its sizes, and what the results say of it."""
    policy = PI0Policy.from_pretrained(
        options.policy_path,
        pick_device(options.device),
        getattr(torch, options.dtype),
        options.norm_stats_path,
        trainable="none",
    )
    policy.compiled = options.compile
    acting = ActingPolicy(policy, options.guidance_weight)
    if options.critic_path:
        critic = load_critic(options.critic_path, policy.device)
        acting = BestOfPolicy(policy, *critic, options.samples, options.guidance_weight)
    about = {
        "policy_path": options.policy_path,
        "dtype": options.dtype,
        "compiled": options.compile,
        "protocol": {
            "guidance_weight": options.guidance_weight,
            "critic_path": options.critic_path,
            "samples": options.samples if options.critic_path else 1,
        },
    }
    return acting, policy.config, about


def main(arguments: list[str] | None = None) -> None:
    """Evaluate, print, write."""
    options = parse_arguments(arguments)
    started = time.monotonic()
    with ExitStack() as stack:
        acting: Policy
        spec: PolicySpec
        frames_known = True
        if options.server is None:
            acting, spec, about = local_policy(options)
        else:
            acting = stack.enter_context(
                ServedPolicy(
                    options.server,
                    connections=options.server_connections,
                    image_size=options.server_image_size,
                    chunk_length=options.chunk_length,
                    patience_s=options.server_patience,
                )
            )
            spec, about = acting.config, {"server": options.server, "metadata": plain(acting.metadata)}
            frames_known = "image_size" in acting.metadata
            if not frames_known:
                options.image_size = options.image_size or OPENPI_FRAME
        output = writable_dir(options.output)
        usual = min(10 if frames_known else OPENPI_REPLAN, spec.action_horizon)
        task = task_of_command(options, replan_steps=options.replan_steps or usual)
        environments = stack.enter_context(Environments(task, spec))
        record = VIDEO_EVERY if options.videos else 0
        result = evaluate(environments, acting, options.episodes, options.seed, record, filmed=options.videos)
        content = {
            "date": time.strftime("%Y-%m-%d"),
            "command": " ".join(sys.argv),
            **about,
            "protocol": {**result.protocol, **about.get("protocol", {})},
            "machine": machine(),
            "seconds": time.monotonic() - started,
            **result.score(),
        }
        write_json(output / "results.json", content)
        write_films(result, output)
    for name, outcomes in [*result.by_task().items(), ("all tasks", result.outcomes)]:
        print(f"{name.replace('_', ' '):<90} {format_rate(sum(outcomes), len(outcomes))}")
    if result.broken:
        print(describe_broken(result.broken, len(result.episodes)))
    print(f"written to {output}")
    refuse_broken("evaluation", result.broken, len(result.episodes))


if __name__ == "__main__":
    run_command(main)
