"""Make a policy that half-works, from scratch: scripted demonstrations, then behaviour cloning.

    python -m pi0.warmstart --suite libero_spatial --tasks 3 8 --output checkpoints/pi0_tiny_libero_spatial

Experts with privileged state solve the tasks from training states. The tiny pi0 clones their actions with the
flow-matching loss. Reinforcement learning needs a policy that sometimes succeeds and can still improve, so cloning
stops when success on other training states reaches `--target-success`.

    python -m pi0.warmstart --tasks 3 8 --write-dataset demonstrations --output outputs/warmstart
    python -m pi0.warmstart --tasks 3 8 --dataset demonstrations --output outputs/warmstart

The first keeps the demonstrations as a LeRobot data set. The second records none: it uses demonstrations in files,
these or others (`docs/data.md`). With `--start-from` cloning continues from an existing policy, with its own chunk
length, cameras and image size.
"""

from __future__ import annotations

import argparse
import functools
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pi0 import PI0Policy, pick_device
from pi0.base.arguments import Collect, ranged
from pi0.base.errors import CheckpointError, run_command
from pi0.base.files import writable_dir, write_json
from pi0.base.progress import progress
from pi0.base.stats import format_rate
from pi0.data import DataError
from pi0.data.chunks import Chunks
from pi0.data.command_line import add_dataset_options, open_dataset
from pi0.data.recorded_chunks import demonstrations_of_tasks, load_chunks
from pi0.libero.demonstrations import record_demonstrations
from pi0.libero.environments import TRAINING, Environments
from pi0.libero.episodes import ROBOT, Episode
from pi0.libero.evaluation import EvaluationResult, describe_broken, refuse_broken
from pi0.libero.settings import ScoreConfig, TaskConfig, range_of, task_of_command
from pi0.libero.stepping import CONTROL_HZ
from pi0.model.config import Pi0Config
from pi0.norm_stats import norm_stats
from pi0.policy.acting import ActingPolicy
from pi0.policy.normalization import FLOOR
from pi0.training.ema import AveragedModule
from pi0.training.flow_loss import Augmentation, flow_loss
from pi0.training.machine import machine

MANIFEST = "warmstart.json"
WARMUP_UPDATES = 100
# Positions that hardly change in the demonstrations must not be scaled up to unit variance.
SMALLEST_STD = FLOOR
# A published policy's chunk lasts 2.5 s, too long without a new observation; `pi0.evaluate` has the same default.
LONGEST_REPLAN = 10


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m pi0.warmstart",
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--suite",
        default="libero_spatial",
        help="libero_spatial, _object, _goal, _10, _90, or a folder of BDDL files, as a path with a slash; "
        "a task whose goal no expert reaches is an error",
    )
    parser.add_argument(
        "--tasks", action=Collect, nargs="*", default=["3", "8"],
        help="tasks by index or name; --tasks alone: the whole suite",
    )  # fmt: skip
    parser.add_argument("--output", required=True, help="policy folder to write")
    parser.add_argument("--start-from", help="policy folder to continue from, instead of new weights")
    parser.add_argument("--norm-stats-path", help="statistics to use instead of that folder's own")
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=["float32", "bfloat16"],
        help="type of that policy's transformers; new weights are float32",
    )
    parser.add_argument(
        "--device", default="auto", help="device of the policy: cpu, cuda, cuda:1; auto: the GPU if any"
    )
    parser.add_argument(
        "--image-size",
        type=range_of(TaskConfig, "image_size"),
        help="pixels a side of the drawn frames; default: the policy's image size; openpi's: 256",
    )
    parser.add_argument("--assets", default="standins", help="folder of LIBERO's assets, or standins")
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--write-dataset", metavar="DIR", help="keep the demonstrations as a LeRobot data set"
    )
    source.add_argument(
        "--dataset",
        metavar="PATH",
        help="use these demonstrations (LeRobot, LIBERO's HDF5); record none",
    )
    add_dataset_options(parser, failures="learn", images=True)
    parser.add_argument(
        "--dataset-video", action="store_true", help="write images as H.264 video, not as PNG"
    )
    parser.add_argument(
        "--demonstrations",
        type=ranged(int, low=1),
        default=75,
        help="demonstrations to record of each task, or at most to read",
    )
    parser.add_argument(
        "--action-noise",
        type=ranged(float, low=0),
        default=0.15,
        help="noise of the demonstrations; 1 is 5 cm a step",
    )
    parser.add_argument(
        "--frame-every", type=ranged(int, low=1), default=3, help="control steps between kept observations"
    )
    parser.add_argument(
        "--max-minutes", type=ranged(float, low=0), default=20.0, help="cloning stops after this long"
    )
    parser.add_argument(
        "--max-updates",
        type=ranged(int, low=1),
        help="cloning stops after so many updates, the same on fast and slow machines; default: no limit",
    )
    parser.add_argument(
        "--target-success",
        type=ranged(float, low=0),
        default=0.55,
        help="success rate at which cloning stops",
    )
    parser.add_argument(
        "--score-every",
        type=ranged(int, low=1),
        default=400,
        help="updates between evaluations on training states",
    )
    parser.add_argument(
        "--score-episodes", type=ranged(int, low=1), default=40, help="episodes of such an evaluation"
    )
    parser.add_argument("--batch-size", type=ranged(int, low=1), default=64, help="observations in an update")
    parser.add_argument(
        "--noise-samples", type=ranged(int, low=1), default=2, help="noise draws for each observation"
    )
    parser.add_argument("--lr", type=ranged(float, above=0), default=1e-3, help="learning rate")
    parser.add_argument(
        "--ema-decay",
        type=ranged(float, low=0, high=0.99999),
        default=0.995,
        help="decay of the averaged weights",
    )
    parser.add_argument(
        "--workers",
        type=range_of(TaskConfig, "num_parallel_envs"),
        help="simulator processes; one on each core by default",
    )
    parser.add_argument("--seed", type=range_of(ScoreConfig, "seed"), default=0)
    options = parser.parse_args(arguments)
    if not options.start_from and (options.norm_stats_path or options.dtype != "float32"):
        parser.error("--norm-stats-path and --dtype are about the policy of --start-from, which is not given")
    return options


def main(arguments: list[str] | None = None) -> None:
    """Record, clone, save."""
    options = parse_arguments(arguments)
    torch.manual_seed(options.seed)
    torch.set_flush_denormal(True)
    device = pick_device(options.device)
    writable_dir(options.output)
    started = time.monotonic()
    policy = load_policy(options, device) if options.start_from else None
    config = policy.config if policy else Pi0Config.preset("pi0_tiny")
    task = task_of_command(options, replan_steps=min(LONGEST_REPLAN, config.action_horizon))
    with Environments(task, config) as environments:
        demonstrations, summary = get_demonstrations(environments, config, options)
        for name, of_task in summary.items():
            print(f"{name}: {describe(of_task)}")
        if policy is None:
            stats = norm_stats(demonstrations, smallest_std=SMALLEST_STD, divisors=["std"])
            policy = PI0Policy(config, stats).to(device)
            for line in stats.floors:
                print(f"statistics: {line}")
        average = AveragedModule(policy, policy.copy().eval(), options.ema_decay)
        scores = clone(policy, average, demonstrations, environments, options)
        manifest = {
            "date": time.strftime("%Y-%m-%d"),
            "options": vars(options),
            "parameters": sum(parameter.numel() for parameter in policy.parameters()),
            "demonstrations": summary,
            "chunks": len(demonstrations),
            "scores_on_training_states": scores,
            "protocol": environments.protocol(),
            "machine": machine(),
            "seconds": time.monotonic() - started,
        }
    write_json(Path(options.output) / MANIFEST, manifest)
    last = scores[-1]
    print(f"{options.output}: {format_rate(last['successes'], last['episodes'])} on training states")


def load_policy(options: argparse.Namespace, device: torch.device) -> PI0Policy:
    """Load the policy from which cloning continues.

    Raises:
        CheckpointError: it cannot be loaded, or has no normalisation statistics.
    """
    policy = PI0Policy.from_pretrained(
        options.start_from, device, getattr(torch, options.dtype), options.norm_stats_path
    )
    if policy.norm_stats is None:
        raise CheckpointError(
            f"{options.start_from} has no normalisation statistics; name some as --norm-stats-path; "
            "python -m pi0.norm_stats computes them"
        )
    return policy


def get_demonstrations(
    environments: Environments, config: Pi0Config, options: argparse.Namespace
) -> tuple[Chunks, dict]:
    """Read or record demonstrations, as the options say; returns the chunks and a summary by task name."""
    if options.dataset:
        return read_demonstrations(environments, config, options)
    record = functools.partial(
        record_demonstrations,
        environments,
        options.demonstrations,
        options.seed,
        options.action_noise,
        options.frame_every,
    )
    if not options.write_dataset:
        return record()
    from pi0.data.lerobot_writer import LeRobotWriter

    with LeRobotWriter(options.write_dataset, CONTROL_HZ, video=options.dataset_video) as writer:
        return record(writer)


def read_demonstrations(
    environments: Environments, config: Pi0Config, options: argparse.Namespace
) -> tuple[Chunks, dict]:
    """Read a data set's demonstrations of the tasks into memory, as chunks."""
    recorded = open_dataset(options, ROBOT)
    unknown = [camera for camera in recorded.cameras if camera not in config.cameras]
    if unknown:
        raise DataError(
            f"{options.dataset}: the policy has no camera {', '.join(unknown)}; it has {', '.join(config.cameras)}"
        )
    by_task = demonstrations_of_tasks(
        recorded, environments.tasks, options.demonstrations, failures="failures" in options.dataset_accept
    )
    chunks = load_chunks(
        recorded,
        [index for indices in by_task.values() for index in indices],
        robot=ROBOT,
        chunk=config.action_horizon,
        frame_every=options.frame_every,
        image_size=environments.image_size,
    )
    lengths = {name: [recorded.lengths[index] for index in indices] for name, indices in by_task.items()}
    return chunks, {
        name: {"demonstrations": len(steps), "mean_steps": float(np.mean(steps))}
        for name, steps in lengths.items()
    }


def describe(of_task: Mapping[str, float]) -> str:
    """How many demonstrations of a task there are, and how long they are."""
    if "attempts" in of_task:
        count = f"{of_task['successes']} of {of_task['attempts']} demonstrations succeeded"
    else:
        count = f"{of_task['demonstrations']} demonstrations"
    return f"{count}, {of_task['mean_steps']:.0f} control steps on average"


def clone(
    policy: PI0Policy,
    average: AveragedModule[PI0Policy],
    demonstrations: Chunks,
    environments: Environments,
    options: argparse.Namespace,
) -> list[dict]:
    """Behaviour cloning until the averaged policy reaches the target; it is saved at each score. Returns the scores."""
    generator = torch.Generator().manual_seed(options.seed)
    optimizer = torch.optim.AdamW(
        policy.parameters(), lr=options.lr, betas=(0.9, 0.95), weight_decay=1e-4, fused=True
    )
    augmentation = Augmentation()
    scores: list[dict] = []
    trained_s, updates = 0.0, 0
    last = options.max_updates or math.inf
    while True:
        start = time.monotonic()
        policy.train()
        count = int(min(options.score_every, last - updates))
        with progress(total=count, label="cloning", unit="update") as bar:
            for _ in range(count):
                updates += 1
                optimizer.param_groups[0]["lr"] = options.lr * min(1.0, updates / WARMUP_UPDATES)
                index = torch.randint(len(demonstrations), (options.batch_size,), generator=generator)
                loss = flow_loss(
                    policy,
                    demonstrations[index],
                    samples=options.noise_samples,
                    generator=generator,
                    augmentation=augmentation,
                ).mean()
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
                optimizer.step()
                average.update()
                bar.update(1, f"loss {loss.item():.4f}")
        trained_s += time.monotonic() - start
        policy.eval()
        average.module.save_pretrained(options.output)
        score = score_on_training_states(environments, average.module, options.score_episodes, options.seed)
        successes, episodes = score["successes"], score["episodes"]
        scores.append({"updates": updates, "loss": loss.item(), **score})
        print(f"{updates} updates: {format_rate(successes, episodes)} on training states")
        reached = successes >= options.target_success * episodes
        if reached or updates == last or trained_s > 60 * options.max_minutes:
            return scores


def score_on_training_states(
    environments: Environments, policy: PI0Policy, episodes: int, seed: int
) -> dict[str, Any]:
    """Successes and episodes in all and by task, on training states from which no demonstration started.

    Raises:
        BrokenSimulationsError: more than a tenth of the episodes broke; the others are not counted.
    """
    pools = environments.training_states(math.ceil(episodes / len(environments.tasks)), seed + 1)
    rollouts = []
    for number in range(episodes):
        pool, index = pools[number % len(pools)], number // len(pools)
        rollouts.append(environments.rollout(pool, index, (TRAINING, seed, pool.task.index, index)))
    finished: dict[int, Episode] = {}
    with progress(total=len(rollouts), label="score on training states", unit="episode") as bar:
        for index, episode in environments.run_policy(ActingPolicy(policy), rollouts):
            finished[index] = episode
            bar.update(1, f"{sum(each.success for each in finished.values())} solved")
    result = EvaluationResult([finished[index] for index in range(episodes)], environments.protocol())
    if result.broken:
        print(f"score on training states: {describe_broken(result.broken, episodes)}")
    refuse_broken("score on training states", result.broken, episodes)
    score = result.score()
    return {key: score[key] for key in ("successes", "episodes", "tasks")}


if __name__ == "__main__":
    run_command(main)
