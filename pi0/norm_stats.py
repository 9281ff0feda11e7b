"""Compute norm_stats.json from demonstrations, of the scripted experts or in a data set.

    python -m pi0.norm_stats --suite libero_spatial --tasks 3 8 --output outputs/norm_stats.json
    python -m pi0.norm_stats --dataset demonstrations --output outputs/norm_stats.json

A policy needs the statistics of its training data. A data set is LeRobot's or LIBERO's HDF5; its images are not
read.
"""

from __future__ import annotations

import argparse
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from pi0.base.arguments import Collect, ranged
from pi0.base.errors import run_command
from pi0.base.files import writable_dir, write_json
from pi0.data import DemonstrationSet
from pi0.data.chunks import Chunks
from pi0.data.command_line import add_dataset_options, open_dataset
from pi0.data.recorded_chunks import demonstrations_of_tasks, leave_out_failures
from pi0.libero.demonstrations import record_demonstrations
from pi0.libero.environments import Environments
from pi0.libero.episodes import ROBOT
from pi0.libero.rendering import CAMERAS
from pi0.libero.settings import ScoreConfig, TaskConfig, range_of, task_of_command
from pi0.libero.suites import find_tasks
from pi0.model.config import Pi0Config
from pi0.policy.normalization import NormStats, subtract_state

IMAGE_SIZE = 16  # pixels; nothing uses the frames


def norm_stats(
    chunks: Chunks,
    delta_actions: bool = False,
    smallest_std: float = 0.0,
    divisors: Collection[str] = ("std", "quantiles"),
) -> NormStats:
    """Mean, deviation and quantiles of states and valid actions.

    As in openpi (scripts/compute_norm_stats.py), an action counts once for each chunk that holds it, relative to
    the chunk's state if the policy learns it so. openpi also counts the repetitions of an episode's last action
    that fill its last chunks; here they are left out, as in training.

    Args:
        chunks: demonstrations.
        delta_actions: subtract the state first, for a policy with `Pi0Config.delta_actions`.
        smallest_std, divisors: as for `NormStats.with_floors`, which raises those of constant features.
    """
    actions = subtract_state(chunks.actions, chunks.states) if delta_actions else chunks.actions
    stats = NormStats.of(chunks.states.numpy(), actions[chunks.valid].numpy())
    return stats.with_floors(*divisors, smallest_std=smallest_std)


def chunks_without_images(
    demonstrations: DemonstrationSet, indices: Sequence[int], chunk: int, frame_every: int
) -> Chunks:
    """States and actions of some demonstrations: the chunks of `load_chunks` without images."""
    parts = []
    for index in indices:
        demonstration = demonstrations.read(index, image_steps=())
        steps = np.arange(0, len(demonstration), frame_every)
        parts.append(Chunks.of_demonstration(replace(demonstration, image_steps=steps), chunk))
    return Chunks.cat([replace(part, images={}) for part in parts])


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m pi0.norm_stats",
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output", required=True, help="file to write")
    parser.add_argument("--dataset", help="read these demonstrations; default: record some of the experts")
    add_dataset_options(parser, failures="count", images=False)
    parser.add_argument(
        "--suite",
        default="libero_spatial",
        help="libero_spatial, _object, _goal, _10, _90, or a folder of BDDL files, as a path with a slash",
    )
    parser.add_argument(
        "--tasks",
        action=Collect,
        nargs="+",
        default=[],
        help="by index or name; default: all of the suite or the data set",
    )
    parser.add_argument("--assets", default="standins", help="folder of LIBERO's assets, or standins")
    parser.add_argument(
        "--demonstrations", type=ranged(int, low=1), default=10, help="demonstrations recorded of each task"
    )
    parser.add_argument(
        "--action-noise",
        type=ranged(float, low=0),
        default=0.15,
        help="noise of the demonstrations; 1 is 5 cm a step",
    )
    parser.add_argument(
        "--frame-every", type=ranged(int, low=1), default=1, help="control steps between kept observations"
    )
    parser.add_argument(
        "--horizon", type=ranged(int, low=1), default=50, help="actions in a chunk of the policy"
    )
    parser.add_argument(
        "--delta-actions", action="store_true", help="for a policy whose actions are relative to the state"
    )
    parser.add_argument(
        "--smallest-std",
        type=ranged(float, low=0),
        default=0.0,
        help="smaller deviations are raised to this; those of constant features always are",
    )
    parser.add_argument(
        "--workers",
        type=range_of(TaskConfig, "num_parallel_envs"),
        help="simulator processes; one on each core by default",
    )
    parser.add_argument("--seed", type=range_of(ScoreConfig, "seed"), default=0)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Read or record, compute, save."""
    options = parse_arguments(arguments)
    output = Path(options.output)
    writable_dir(output.parent)
    if options.dataset:
        recorded = open_dataset(options, ROBOT)
        failures = "failures" in options.dataset_accept
        indices: Sequence[int] = range(len(recorded))
        if options.tasks:
            tasks = find_tasks(options.suite, options.tasks)
            found = demonstrations_of_tasks(recorded, tasks, len(recorded), failures)
            indices = [index for of_task in found.values() for index in of_task]
        elif not failures:
            indices = leave_out_failures(recorded, indices)
        chunks = chunks_without_images(recorded, indices, options.horizon, options.frame_every)
        count = len(indices)
    else:
        chunks, count = record(options)
    stats = norm_stats(chunks, options.delta_actions, options.smallest_std)
    write_json(output, stats.to_dict())
    for line in stats.floors:
        print(line)
    print(f"{output}: from {len(chunks)} observations in {count} demonstrations")


def record(options: argparse.Namespace) -> tuple[Chunks, int]:
    """Record demonstrations of the scripted experts; returns chunks and the number of demonstrations."""
    task = task_of_command(options, image_size=IMAGE_SIZE, replan_steps=options.horizon)
    policy = Pi0Config.preset("pi0_tiny", cameras=tuple(CAMERAS), action_horizon=options.horizon)
    with Environments(task, policy) as environments:
        demonstrations, summary = record_demonstrations(
            environments, options.demonstrations, options.seed, options.action_noise, options.frame_every
        )
    return demonstrations, sum(task["successes"] for task in summary.values())


if __name__ == "__main__":
    run_command(main)
