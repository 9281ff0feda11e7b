"""Stage 09: stage 08 with YAML configuration, command-line overrides, validation and profiles.

A pi0 policy that half-works on LIBERO tasks practises them: each iteration runs rollouts from training
states, scores them by success, and learns from the collected chunks for a few epochs. Settings come from a
YAML file; `--help` lists every key with its unit, default and meaning.

    python 09_train_with_config.py --config_path configs/quickstart.yaml
    python 09_train_with_config.py --config_path configs/debug_train_pi0.yaml \
        --override training.num_train_steps=10 algo.lr=2e-5
    python 09_train_with_config.py --config_path configs/train_pi0_cfg_rl.yaml --override profile=dev algo.data_batch_size=16
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path

import numpy as np
import torch

from pi0 import PI0Policy, pick_device
from pi0.base.errors import InputError
from pi0.base.progress import progress
from pi0.libero.films import film_before_after
from pi0.libero.init_states import InitStatePool
from pi0.libero.suites import find_tasks
from pi0.policy.acting import ActingPolicy
from pi0.ript.cfg_adapter import PI0_CFG_Adapter, WeightedChunks
from pi0.ript.config import (
    Config,
    ConfigError,
    check_evaluation,
    help_text,
    load_config,
    to_dict,
    validate,
)
from pi0.ript.env_runner import LIBEROEnvRunner
from pi0.ript.results import new_run_dir, write_report
from pi0.ript.rollout_generator import Collection, RolloutGenerator, Start
from pi0.training.ema import AveragedPolicy
from pi0.training.flow_loss import Augmentation
from pi0.training.optimizer import make_optimizer, make_schedule


class InitialStateDataset:
    """Training states of all tasks. A group is K states of one task, in ring order.

    Smart sampling: tasks take turns in proportion to how often they fail, and a state solved on each of its
    last `skip_after` visits is passed over for a round. Nothing is ever left out for good: a policy can get worse.
    """

    def __init__(self, pools: list[InitStatePool], group_size: int, skip_after: int):
        self.pools = pools
        self.group_size = group_size
        self.skip_after = skip_after
        self.credit = [0.0] * len(pools)
        self.success_rate = [0.5] * len(pools)
        self.init_state_cursor = [0] * len(pools)
        self.solved_in_a_row = [[0] * len(pool) for pool in pools]
        self.skipped = 0

    def next_task(self) -> int:
        """Position in `pools` of the task whose turn it is."""
        shares = [max(0.1, 1.0 - rate) for rate in self.success_rate]
        self.credit = [
            credit + share / sum(shares) for credit, share in zip(self.credit, shares, strict=True)
        ]
        task = self.credit.index(max(self.credit))
        self.credit[task] -= 1.0
        return task

    def smart_sample_group(self) -> list[Start]:
        """The next K starts."""
        task = self.next_task()
        pool, solved = self.pools[task], self.solved_in_a_row[task]
        starts: list[Start] = []
        while len(starts) < self.group_size:
            index = self.init_state_cursor[task] % len(pool)
            self.init_state_cursor[task] += 1
            if solved[index] >= self.skip_after:
                solved[index] = 0
                self.skipped += 1
            else:
                starts.append((pool, index))
        return starts

    def record(self, collection: Collection) -> None:
        """Remember what the policy solved."""
        for number, pool in enumerate(self.pools):
            episodes = [episode for episode in collection.tried if episode.rollout.task == pool.task]
            for episode in episodes:
                index = episode.rollout.init_index
                self.solved_in_a_row[number][index] = (
                    self.solved_in_a_row[number][index] + 1 if episode.success else 0
                )
            if episodes:
                self.success_rate[number] = sum(episode.success for episode in episodes) / len(episodes)


def set_seed(seed: int) -> None:
    """Seed every source of randomness in this process."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.set_flush_denormal(True)  # denormal numbers make CPU updates several times slower


def load_policy(config: Config) -> PI0Policy:
    """The policy to improve, with an optimality condition if guidance needs one."""
    policy = PI0Policy.from_pretrained(
        config.policy_path,
        pick_device(config.device),
        getattr(torch, config.dtype),
        config.norm_stats_path,
        config.training.trainable,
    )
    policy.compiled = config.compile
    if config.algo.mode == "guidance":
        policy.enable_guidance()
    return policy


def update_policy(
    config: Config,
    adapter: PI0_CFG_Adapter,
    optimizer: torch.optim.Optimizer,
    average: AveragedPolicy,
    batch: WeightedChunks,
    generator: torch.Generator,
) -> dict[str, float]:
    """Several epochs over the collected chunks, `gradient_accumulation_steps` minibatches an optimizer step."""
    algo, policy = config.algo, adapter.policy
    policy.train()
    losses, norms, accumulated = [], [], 0
    parts = adapter.count_minibatches(batch, algo.minibatch_size)
    passes = algo.num_epochs * parts
    with progress(total=passes, label="update", unit="minibatch") as bar:
        for _ in range(algo.num_epochs):
            for minibatch in adapter.minibatches(batch, parts, generator):
                accumulated += 1
                complete = accumulated == algo.gradient_accumulation_steps or len(losses) + 1 == passes
                loss = adapter.minibatch_loss(minibatch, generator)
                if not torch.isfinite(loss):
                    raise FloatingPointError(f"loss is {loss.item()}; lower algo.lr or check the checkpoint")
                (loss / algo.gradient_accumulation_steps).backward()
                losses.append(loss.item())
                bar.update(1, f"loss {losses[-1]:.4f}")
                if complete:
                    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), algo.grad_norm_clip)
                    norms.append(norm.item())
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                    average.update()
                    accumulated = 0
    policy.eval()
    return {"loss": float(np.mean(losses)), "grad_norm": float(np.mean(norms)), "updates": len(norms)}


def train(config: Config) -> Path:
    """Score, practise, score again; returns the folder with everything that was written."""
    set_seed(config.training.seed)
    algo, seed = config.algo, config.training.seed
    policy = load_policy(config)
    run_dir = new_run_dir(config.output_dir, config.exp_name, to_dict(config))
    weight = algo.guidance_weight if algo.mode == "guidance" else None
    started = time.monotonic()
    with LIBEROEnvRunner(config.task, policy.config) as env_runner:
        print(f"training started: {len(env_runner.tasks)} tasks, writing to {run_dir}")
        pools = env_runner.training_states(algo.train_init_states, seed)
        dataset = InitialStateDataset(pools, algo.rloo_batch_size, skip_after=2)
        rollouts = RolloutGenerator(
            env_runner,
            dataset.smart_sample_group,
            num_groups=algo.data_batch_size // algo.rloo_batch_size,
            max_groups=algo.max_sampling_attempts,
            seed=seed,
            shuffle_advantages=algo.shuffle_advantages,
        )
        adapter = PI0_CFG_Adapter(
            policy,
            mode=algo.mode,
            noise_samples=algo.noise_samples,
            negative_weight=algo.negative_weight,
            condition_dropout=algo.condition_dropout,
            augmentation=Augmentation(),
        )
        optimizer = make_optimizer(policy, algo.lr, config.training.optimizer)
        schedule = make_schedule(
            optimizer, config.training.optimizer.final_lr_share, config.training.num_train_steps
        )
        average = AveragedPolicy(policy, algo.ema_decay)
        acting = ActingPolicy(average.policy, weight)
        generator = torch.Generator().manual_seed(seed)
        evaluation = config.evaluation
        start = ActingPolicy(policy.copy())
        before = env_runner.run(start, evaluation.episodes, evaluation.seed, label="score before")
        history, replay = [], []
        for step in range(config.training.num_train_steps):
            dataset.skipped = 0
            collection = rollouts.generate_rollouts(acting, step)
            dataset.record(collection)
            chunks = adapter.weigh(collection.episodes, collection.advantages)
            replay = (replay + [chunks])[-algo.replay_iterations :]
            usable = [part for part in replay if part is not None]
            collected = {**collection.metrics(), "skipped_states": dataset.skipped}
            metrics = {"step": step, **collected, "seconds": time.monotonic() - started}
            if usable:
                batch = WeightedChunks.cat(usable)
                metrics |= update_policy(config, adapter, optimizer, average, batch, generator)
                schedule.step()
            history.append(metrics)
            average.policy.save_pretrained(run_dir / "policy")
            learned = "nothing to learn from"
            if "loss" in metrics:
                learned = f"{metrics['updates']} updates, loss {metrics['loss']:.4f}"
            print(f"iteration {step}: {metrics['successes']} of {metrics['rollouts']} solved, {learned}")
        after = env_runner.run(acting, evaluation.episodes, evaluation.seed, label="score after")
        seconds = time.monotonic() - started
        write_report(run_dir, to_dict(config), before, after, history, seconds)
        if config.features.save_video:
            film_before_after(run_dir, env_runner, start, acting, before, after)
    return run_dir


def load_config_from_yaml(path: str, overrides: list[str]) -> Config:
    """Defaults, then the profile, then the file, then the overrides."""
    config = load_config(path, overrides)
    print(f"configuration loaded: {path}, {len(overrides)} overrides, profile {config.profile or 'none'}")
    return config


def validate_config(config: Config) -> None:
    """Refuse values that contradict each other, or a policy and tasks that are not there."""
    validate(config)
    if not Path(config.policy_path).is_dir():
        raise ConfigError(f"policy_path = {config.policy_path!r}: there is no such folder")
    check_evaluation(config, find_tasks(config.task.benchmark_name, config.task.chosen))
    print("configuration validated")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"keys of the configuration:\n\n{help_text()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config_path", required=True, help="YAML file, see configs/")
    parser.add_argument("--override", nargs="*", default=[], metavar="KEY=VALUE", help="e.g. algo.lr=2e-5")
    return parser.parse_args()


def main() -> None:
    """Read the configuration, check it, train."""
    arguments = parse_arguments()
    try:
        config = load_config_from_yaml(arguments.config_path, arguments.override)
        validate_config(config)
        train(config)
    except InputError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
