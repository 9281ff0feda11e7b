"""Evaluate a policy on LIBERO tasks.

    python -m pi0.evaluate --policy_path checkpoints/pi0_tiny_libero_spatial --suite libero_spatial --tasks 3 8 --episodes 50

    python -m pi0.evaluate --server ws://127.0.0.1:8000 --suite libero_spatial --tasks 3 8 --episodes 50

    python -m pi0.evaluate --policy_path checkpoints/pi0_tiny_libero_spatial --suite libero_plus/spatial --sample 500

The policy is a folder, or runs elsewhere behind openpi's protocol (`python -m pi0.serve`, or openpi's own server). It
prints success per task with 95% intervals and writes them with the protocol as JSON; `--videos` adds videos. A suite
of LIBERO-plus has thousands of variants, each of which is run once; the same command goes on where it was stopped.
Episodes whose simulation broke are not counted; if more than a tenth broke, the exit status is 3.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from pi0.base.arguments import ranged
from pi0.base.errors import run_command
from pi0.libero.settings import (
    PLUS,
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
    from pi0.libero.evaluation import EvaluationResult
    from pi0.libero.rollouts import Policy
    from pi0.libero.scoring import score
    from pi0.libero.variants import Chosen

__all__ = ["main", "parse_arguments", "score"]
EPISODES = 50
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
        help="number in all, spread evenly over the tasks; at most 50 a task; default: 50, or each variant of LIBERO-plus once",
    )
    parser.add_argument(
        "--sample",
        type=ranged(int, low=1),
        help="how many of LIBERO-plus's variants, of each kind in proportion, drawn with --seed; default: all",
    )
    parser.add_argument(
        "--seed",
        type=range_of(ScoreConfig, "seed"),
        default=0,
        help="seed of the policy's noise, and of --sample",
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
    parser.add_argument(
        "--videos",
        type=ranged(int, low=0),
        default=0,
        help="episodes of each task to film; of variants: of each kind",
    )
    options = parser.parse_args(arguments)
    if options.suite.startswith(PLUS):
        if options.episodes is not None:
            parser.error("--episodes: each variant of LIBERO-plus is run once; choose by --sample or --tasks")
    elif options.sample is not None:
        parser.error(f"--sample is for suites of variants: {PLUS}spatial, ...")
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


def table(result: EvaluationResult, chosen: Chosen | None) -> Iterator[str]:
    """Lines of success by task and condition; for variants by kind of change, with what is left out of the suite."""
    from pi0.base.stats import format_rate
    from pi0.libero.changes import KINDS

    if chosen is None:
        conditions = result.by_condition()
        for name, outcomes in [*result.by_task().items(), ("all tasks", result.outcomes)]:
            yield f"{name.replace('_', ' '):<90} {format_rate(sum(outcomes), len(outcomes))}"
            for words, held in conditions.get(name, {}).items():
                yield f"  {words:<88} {format_rate(sum(held), len(held))}"
        return
    of_kinds = result.by_kind()
    for kind in KINDS:
        outcomes = of_kinds.get(kind, [])
        gone = "; ".join(f"{count} left out: {why}" for why, count in chosen.reasons(kind).items())
        yield f"{kind:<12} {format_rate(sum(outcomes), len(outcomes)):<50} {gone}".rstrip()
    yield f"{'all':<12} {format_rate(sum(result.outcomes), len(result.outcomes))}"


def main(arguments: list[str] | None = None) -> None:
    """Evaluate, print, write."""
    options = parse_arguments(arguments)
    started = time.monotonic()

    from pi0.base.files import writable_dir, write_json  # these take seconds: not for `--help`
    from pi0.libero.environments import Environments
    from pi0.libero.evaluation import describe_broken, evaluate, refuse_broken
    from pi0.libero.films import VIDEO_EVERY, write_films
    from pi0.libero.kept import KeptEpisodes
    from pi0.libero.suites import left_out
    from pi0.libero.variants import choose
    from pi0.training.fingerprints import fingerprint
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
        chosen: Chosen | None = None
        if options.suite.startswith(PLUS):
            reads = getattr(acting, "reads", lambda prompt: True)  # a server does not say
            chosen = choose(options.suite, options.tasks, reads, options.sample, options.seed)
            options.tasks = [task.index for task in chosen.tasks]
        usual = min(10 if frames_known else OPENPI_REPLAN, spec.action_horizon)
        task = task_of_command(options, replan_steps=options.replan_steps or usual)
        environments = stack.enter_context(Environments(task, spec))
        record = VIDEO_EVERY if options.videos else 0
        kept: KeptEpisodes | None = None
        if chosen is not None:
            policy = {**about, "fingerprint": fingerprint(options.policy_path)}
            terms = {"policy": policy, **environments.protocol(seed=options.seed)}
            # Which of the variants are run may change from run to run.
            kept = stack.enter_context(KeptEpisodes(output, {**terms, "tasks": None}))
            protocol = chosen.describe()
        else:
            gone = left_out(options.suite)
            for name, why in gone.items():
                print(f"left out, since {why}: {name}")
            protocol = {"left_out": list(gone)}
        episodes = len(chosen.tasks) if chosen else options.episodes or EPISODES
        result = evaluate(
            environments, acting, episodes, options.seed, record, filmed=options.videos, kept=kept
        )
        content = {
            "date": time.strftime("%Y-%m-%d"),
            "command": " ".join(sys.argv),
            **about,
            "protocol": {**result.protocol, **protocol, **about.get("protocol", {})},
            "machine": machine(),
            "seconds": time.monotonic() - started,
            **result.score(),
        }
        write_json(output / "results.json", content)
        if kept is None:
            write_films(result, output)
    for line in table(result, chosen):
        print(line)
    if result.broken:
        print(describe_broken(result.broken, len(result.episodes)))
    print(f"written to {output}")
    refuse_broken("evaluation", result.broken, len(result.episodes))


if __name__ == "__main__":
    run_command(main)
