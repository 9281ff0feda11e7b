"""Make a policy that half-works, from nothing: scripted demonstrations, then behaviour cloning.

    python -m pi0.warmstart --suite libero_spatial --tasks 3 8 --output checkpoints/pi0_tiny_libero_spatial

Experts with privileged state solve the tasks from training states; the tiny pi0 is cloned from what they did
with the flow-matching loss. Reinforcement learning needs a policy that sometimes succeeds and has something
left to learn, so cloning stops as soon as success on further training states reaches `--target-success`.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path

import torch

from pi0 import PI0Policy
from pi0.errors import InputError
from pi0.model.config import Pi0Config
from pi0.norm_stats import norm_stats
from pi0.progress import progress
from pi0.ript.acting import ActingPolicy
from pi0.ript.chunks import Augmentation, Chunks, flow_loss
from pi0.ript.demonstrations import record_demonstrations
from pi0.ript.ema import AveragedPolicy
from pi0.ript.env.runner import TRAINING, LIBEROEnvRunner
from pi0.ript.report import machine, writable_dir, write_json
from pi0.stats import format_rate

MANIFEST = "warmstart.json"
WARMUP_UPDATES = 100
# Positions that hardly move in the demonstrations must not be blown up to unit variance.
SMALLEST_STD = 0.02


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m pi0.warmstart",
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--suite", default="libero_spatial", help="libero_spatial or libero_object have experts"
    )
    parser.add_argument("--tasks", nargs="+", default=["3", "8"], help="tasks by index or name")
    parser.add_argument("--output", required=True, help="folder to write the checkpoint to")
    parser.add_argument("--start-from", help="checkpoint to go on from, instead of new weights")
    parser.add_argument("--assets", default="standins", help="folder of LIBERO's assets, or standins")
    parser.add_argument("--demonstrations", type=int, default=75, help="demonstrations recorded of each task")
    parser.add_argument(
        "--action-noise", type=float, default=0.15, help="noise while demonstrating; 1 is 5 cm a step"
    )
    parser.add_argument("--frame-every", type=int, default=3, help="control steps between kept observations")
    parser.add_argument("--max-minutes", type=float, default=20.0, help="cloning stops after this long")
    parser.add_argument(
        "--target-success", type=float, default=0.55, help="success rate at which cloning stops"
    )
    parser.add_argument(
        "--score-every", type=int, default=400, help="updates between scores on training states"
    )
    parser.add_argument("--score-episodes", type=int, default=40, help="episodes of such a score")
    parser.add_argument("--batch-size", type=int, default=64, help="observations in an update")
    parser.add_argument("--noise-samples", type=int, default=2, help="noise draws of the flow loss on each")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate")
    parser.add_argument("--ema-decay", type=float, default=0.995, help="decay of the averaged weights")
    parser.add_argument("--workers", type=int, help="simulator processes; one on each core by default")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Record, clone, save."""
    options = parse_arguments(arguments)
    torch.manual_seed(options.seed)
    torch.set_flush_denormal(True)
    config = Pi0Config.preset("pi0_tiny")
    writable_dir(options.output)
    started = time.monotonic()
    with LIBEROEnvRunner(
        options.suite,
        options.tasks,
        cameras=config.cameras,
        image_size=config.image_size,
        chunk=config.action_horizon,
        replan_steps=config.action_horizon,
        num_parallel_envs=options.workers,
        assets=options.assets,
    ) as runner:
        demonstrations, summary = record_demonstrations(
            runner, options.demonstrations, options.seed, options.action_noise, options.frame_every
        )
        if options.start_from:
            policy = PI0Policy.from_pretrained(options.start_from)
        else:
            policy = PI0Policy(config, norm_stats(demonstrations, smallest_std=SMALLEST_STD))
        average = AveragedPolicy(policy, options.ema_decay)
        scores = clone(policy, average, demonstrations, runner, options)
        average.policy.save_pretrained(options.output)
        manifest = {
            "date": time.strftime("%Y-%m-%d"),
            "options": vars(options),
            "parameters": sum(parameter.numel() for parameter in policy.parameters()),
            "demonstrations": summary,
            "chunks": len(demonstrations),
            "scores_on_training_states": scores,
            "protocol": runner.protocol(),
            "machine": machine(),
            "seconds": time.monotonic() - started,
        }
    write_json(Path(options.output) / MANIFEST, manifest)
    last = scores[-1]
    print(f"{options.output}: {format_rate(last['successes'], last['episodes'])} on training states")


def clone(
    policy: PI0Policy,
    average: AveragedPolicy,
    demonstrations: Chunks,
    runner: LIBEROEnvRunner,
    options: argparse.Namespace,
) -> list[dict]:
    """Behaviour cloning until the averaged policy reaches the target; returns its scores on the way."""
    generator = torch.Generator().manual_seed(options.seed)
    optimizer = torch.optim.AdamW(
        policy.parameters(), lr=options.lr, betas=(0.9, 0.95), weight_decay=1e-4, fused=True
    )
    augmentation = Augmentation()
    scores: list[dict] = []
    trained_s, updates = 0.0, 0
    while True:
        start = time.monotonic()
        policy.train()
        with progress(total=options.score_every, label="cloning", unit="update") as bar:
            for _ in range(options.score_every):
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
        successes = score_on_training_states(runner, average.policy, options.score_episodes, options.seed)
        scores.append(
            {
                "updates": updates,
                "successes": successes,
                "episodes": options.score_episodes,
                "loss": loss.item(),
            }
        )
        print(f"{updates} updates: {format_rate(successes, options.score_episodes)} on training states")
        reached = successes >= options.target_success * options.score_episodes
        if reached or trained_s > 60 * options.max_minutes:
            return scores


def score_on_training_states(runner: LIBEROEnvRunner, policy: PI0Policy, episodes: int, seed: int) -> int:
    """Successes on training states that no demonstration started from."""
    pools = runner.training_states(math.ceil(episodes / len(runner.assigned_tasks)), seed + 1)
    rollouts = []
    for number in range(episodes):
        pool, index = pools[number % len(pools)], number // len(pools)
        rollouts.append(runner.rollout(pool, index, (TRAINING, seed, pool.task.index, index)))
    return sum(episode.success for _, episode in runner.run_policy_in_env(ActingPolicy(policy), rollouts))


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
