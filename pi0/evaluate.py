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
from typing import TYPE_CHECKING, Any

from pi0.base.arguments import ranged
from pi0.base.errors import run_command
from pi0.libero.settings import (
    ScoreConfig,
    TaskConfig,
    add_task_options,
    choices_of,
    range_of,
    task_of_command,
)
from pi0.policy.command_line import OF_A_FOLDER, add_policy_options, load_acting

if TYPE_CHECKING:
    from pi0.libero.environments import PolicySpec
    from pi0.libero.rollouts import Policy
    from pi0.libero.scoring import score

__all__ = ["main", "parse_arguments", "score"]
OPENPI_FRAME, OPENPI_REPLAN = 256, 5  # examples/libero/main.py: for servers that do not say what they want


def __getattr__(name: str) -> Any:
    # Its modules take seconds to load: not for `--help`.
    if name == "score":
        from pi0.libero.scoring import score

        return score
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


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
    add_policy_options(parser)
    add_task_options(parser)
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
        "--fixtures",
        default="libero_eval",
        choices=choices_of(TaskConfig, "fixtures"),
        help="placement of cabinet and stove",
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
    parser.add_argument("--output", default="outputs/evaluation", help="folder for results.json and videos")
    parser.add_argument("--videos", type=ranged(int, low=0), default=0, help="episodes of each task to film")
    options = parser.parse_args(arguments)
    if options.server is not None:
        given = [name for name in OF_A_FOLDER if getattr(options, name)]
        if given:
            parser.error(f"--{given[0]} is for --policy_path; start the server with it (python -m pi0.serve)")
    return options


def about_policy(options: argparse.Namespace) -> dict[str, Any]:
    """What the results say of the policy of a folder."""
    return {
        "policy_path": options.policy_path,
        "dtype": options.dtype,
        "compiled": options.compile,
        "protocol": {
            "guidance_weight": options.guidance_weight,
            "critic_path": options.critic_path,
            "samples": options.samples if options.critic_path else 1,
        },
    }


def main(arguments: list[str] | None = None) -> None:
    """Evaluate, print, write."""
    options = parse_arguments(arguments)
    started = time.monotonic()

    from pi0.base.files import writable_dir, write_json  # these take seconds: not for `--help`
    from pi0.base.stats import format_rate
    from pi0.libero.environments import Environments
    from pi0.libero.evaluation import describe_broken, evaluate, refuse_broken
    from pi0.libero.films import VIDEO_EVERY, write_films
    from pi0.libero.suites import left_out
    from pi0.training.machine import machine

    with ExitStack() as stack:
        acting: Policy
        spec: PolicySpec
        frames_known = True
        if options.server is None:
            acting, spec = load_acting(options)
            about = about_policy(options)
        else:
            from pi0.serving.client import ServedPolicy
            from pi0.serving.messages import plain

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
            sent = f"images of {spec.image_size} pixels, chunks of {spec.action_horizon} actions"
            print(f"server: {acting.metadata.get('policy', 'a policy without a name')}, {sent}")
            frames_known = "image_size" in acting.metadata
            if not frames_known:
                options.image_size = options.image_size or OPENPI_FRAME
        output = writable_dir(options.output)
        usual = min(10 if frames_known else OPENPI_REPLAN, spec.action_horizon)
        task = task_of_command(options, replan_steps=options.replan_steps or usual)
        environments = stack.enter_context(Environments(task, spec))
        gone = left_out(options.suite)
        for name in gone:
            print(f"left out, since its file of initial states is empty: {name}")
        record = VIDEO_EVERY if options.videos else 0
        result = evaluate(environments, acting, options.episodes, options.seed, record, filmed=options.videos)
        content = {
            "date": time.strftime("%Y-%m-%d"),
            "command": " ".join(sys.argv),
            **about,
            "protocol": {**result.protocol, "left_out": gone, **about.get("protocol", {})},
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
