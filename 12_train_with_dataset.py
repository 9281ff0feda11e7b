"""Stage 12: stage 11 with a PyTorch data set of initial states, groups of one state, statistics and evaluation.

A pi0 policy that half-works on LIBERO tasks practises them: each iteration runs rollouts from training
states, scores them by success, and learns from the collected chunks for a few epochs. Settings come from a
YAML file; `--help` lists every key with its unit, default and meaning.

A group is K rollouts of one initial state (algo.group_by). A group whose rollouts all agree teaches nothing and is
replaced by one of another state; a state that keeps being solved is skipped for a round; whole suites are
practised, all ranks taking states of all tasks. Every logging.log_freq steps the policy is evaluated on
evaluation.periodic_episodes episodes.

In the run's folder: train_rank0.log, metrics.jsonl (docs/metrics.md), report.html and plots/, wandb/, tensorboard/.
Besides: rollout_stats.json, metrics.json (evaluations), final_training_results.json.

    python 12_train_with_dataset.py --config_path configs/stage12_libero10.yaml
    torchrun --nproc_per_node=2 12_train_with_dataset.py --config_path configs/stage12_libero10.yaml

On two hosts, the first of which is called `first`, the same on each (docs/distributed.md):

    torchrun --nnodes=2 --nproc_per_node=2 --rdzv_backend=c10d --rdzv_endpoint=first:29500 \
        12_train_with_dataset.py --config_path configs/multi_task_distributed.yaml
"""

from __future__ import annotations

import argparse
import atexit
import os
import random
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import wandb
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler

from pi0 import PI0Policy, pick_device
from pi0.base.errors import InputError, attempt
from pi0.base.progress import progress
from pi0.base.stats import format_rate
from pi0.libero.init_states import InitStatePool
from pi0.libero.suites import find_tasks
from pi0.policy.acting import ActingPolicy
from pi0.ranks.collectives import gather, largest, on_rank_zero
from pi0.ranks.watch import exit_with, join_ranks, watched_ranks
from pi0.report.html_report import write_html_report
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
from pi0.ript.metrics import METRICS
from pi0.ript.results import film_before_after, new_run_dir, score, write_json, write_report
from pi0.ript.rollout_generator import Collection, RolloutGenerator, Start, merge_metrics
from pi0.ript.rollout_stats import RolloutStats, state_name
from pi0.training.descriptor_tap import DescriptorTap
from pi0.training.ema import AveragedPolicy
from pi0.training.flow_loss import Augmentation
from pi0.training.memory import memory_use
from pi0.training.metrics import TensorBoard, append_line, count_lines, finish_wandb
from pi0.training.optimizer import make_optimizer, make_schedule


class LiberoInitStateDataset(Dataset):
    """Training states of all tasks, one task after another: {"task_id", "init_state", "index"}."""

    def __init__(self, pools: list[InitStatePool]):
        self.pools = pools
        self.stats = RolloutStats(None, skip_threshold=2)  # the generator that practises them brings its own
        self.starts: list[Start] = [(pool, index) for pool in pools for index in range(len(pool))]

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> dict:
        pool, number = self.starts[index]
        return {"task_id": pool.task.index, "init_state": pool.states[number].state, "index": index}

    def start(self, index: int) -> Start:
        """Where item `index` starts an episode."""
        return self.starts[index]


def collate_fn_state(samples: list[dict]) -> dict:
    """A batch: "task_id" and "index" int64 [B], "init_state" B arrays, as long as their tasks' states are."""
    return {
        "task_id": torch.tensor([sample["task_id"] for sample in samples]),
        "init_state": [sample["init_state"] for sample in samples],
        "index": torch.tensor([sample["index"] for sample in samples]),
    }


class TaskAwareSampler(Sampler[list[int]]):
    """Which states practise next, a group's worth of one task at a time, without end.

    Tasks take turns in proportion to how often they fail; this rank's states of a task go round in a ring, on
    which the statistics pass over solved ones.
    """

    def __init__(self, dataset: LiberoInitStateDataset, ranks: DistributedSampler, group_size: int):
        self.dataset = dataset
        self.pools = pools = dataset.pools
        self.group_size = group_size
        self.credit = [0.0] * len(pools)
        self.success_rate = [0.5] * len(pools)
        self.init_state_cursor = [0] * len(pools)
        own = [i for i in ranks if i % ranks.num_replicas == ranks.rank]  # without what evens out the ranks
        self.rings = [[i for i in own if dataset.starts[i][0] is pool] for pool in pools]
        if not all(self.rings):
            raise ConfigError(
                f"algo.train_init_states gives {len(pools[0])} states a task, too few for all ranks"
            )
        self.names = [state_name(pool.task, pool.states[index]) for pool, index in dataset.starts]
        self.skipped: dict[str, list[int]] = {}

    def next_task(self) -> int:
        """Position in `pools` of the task whose turn it is."""
        shares = [max(0.1, 1.0 - rate) for rate in self.success_rate]
        self.credit = [
            credit + share / sum(shares) for credit, share in zip(self.credit, shares, strict=True)
        ]
        task = self.credit.index(max(self.credit))
        self.credit[task] -= 1.0
        return task

    def smart_sample_group(self) -> list[int]:
        """The next states of one task."""
        task = self.next_task()
        ring, name = self.rings[task], self.pools[task].task.name
        starts: list[int] = []
        while len(starts) < self.group_size:
            index = ring[self.init_state_cursor[task] % len(ring)]
            self.init_state_cursor[task] += 1
            if self.dataset.stats.pass_over(self.names[index]):
                self.skipped.setdefault(name, [0])[0] += 1
            else:
                starts.append(index)
        return starts

    def __iter__(self) -> Iterator[list[int]]:
        while True:
            yield self.smart_sample_group()

    def record(self, collection: Collection) -> None:
        """Remember which tasks the policy solved."""
        for number, pool in enumerate(self.pools):
            episodes = [episode for episode in collection.tried if episode.rollout.task == pool.task]
            if episodes:
                self.success_rate[number] = sum(episode.success for episode in episodes) / len(episodes)


def setup_distributed() -> tuple[int, int, int]:
    """Join the ranks that torchrun has started: (rank, rank on this host, world size); (0, 0, 1) without it."""
    if "RANK" not in os.environ:
        return 0, 0, 1
    local_rank = int(os.environ["LOCAL_RANK"])
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank % torch.cuda.device_count())
    join_ranks()
    if dist.get_rank() > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  rank 0 speaks for all
    return dist.get_rank(), local_rank, dist.get_world_size()


def cleanup_distributed() -> None:
    """Leave the ranks."""
    if dist.is_initialized():
        dist.destroy_process_group()


def get_model_from_ddp(model: nn.Module) -> PI0Policy:
    """The policy inside its distributed wrapper, or as it is."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def distributed_collect_batches(
    sampler: TaskAwareSampler, rollouts: RolloutGenerator, policy: ActingPolicy, step: int
) -> tuple[Collection, dict]:
    """This rank's rollouts, and the metrics of all ranks.

    Exactly `algo.data_batch_size` trajectories on each rank; fewer only when
    `algo.max_sampling_attempts` groups, or twice as many that were all dropped, are used up.
    """
    collection = rollouts.generate_rollouts(policy, step)
    skipped, sampler.skipped = sampler.skipped, {}
    parts = gather({**collection.metrics(), "skipped_by_task": skipped})
    for rank, part in enumerate(parts):
        if dist.is_initialized():
            print(f"rank {rank}: {part['trajectories']} trajectories, {part['solved']} solved")
    metrics = merge_metrics(parts)
    tried = metrics["groups"] + metrics["dropped_groups"]
    if tried:  # none where the run was asked to stop before
        print(f"batches sampled: {tried} groups tried, {metrics['groups']} kept")
    for name, (solved, failed) in metrics["dropped_by_task"].items():
        print(f"dropped groups of {name}: {solved} all solved, {failed} all failed")
    for name, (count,) in metrics["skipped_by_task"].items():
        print(f"skipped states of {name}: {count}, solved on each of their last visits")
    return collection, metrics


class _TeeIO(DescriptorTap):
    """Copies what reaches the console, by whatever code or process, to a log file.

    Of a progress bar only the last state is kept. A full disk ends the copy, never the run.
    """

    def __init__(self, descriptor: int, echo: bool):
        self._log: int | None = None
        # Lines that the file does not have yet; None when the copy has ended.
        self._kept: list[bytes] | None = []
        self._line = b""  # not ended yet
        self._lock = threading.Lock()
        super().__init__(descriptor, echo)

    def log_to(self, path: Path) -> None:
        """From now on, and for all that was written before, into the file at `path`."""
        self._log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self.leave_to(path)
        self.heard(b"")

    def heard(self, data: bytes) -> None:
        """Keep whole lines, as they stood when they ended."""
        with self._lock:
            *lines, self._line = (self._line + data).split(b"\n")
            self._line = self._line[self._line.rfind(b"\r", 0, -1) + 1 :]  # the last may be half of an end
            if self._kept is None:
                return
            shown = [line.rstrip(b"\r").rpartition(b"\r")[2] for line in lines]
            self._kept += [line + b"\n" for line in shown if line]
            if self._log is not None and self._kept:
                try:
                    os.write(self._log, b"".join(self._kept))
                    self._kept = []
                except OSError as error:
                    self._kept = None
                    self.say(f"the log file ends here: {error.strerror}\n".encode())

    def restore(self) -> None:
        """Put the descriptor back as it was, with all that was written until now in the file."""
        super().restore()
        self.heard(b"\n" if self._line else b"")


def setup_run_logging(rank: int) -> list[_TeeIO]:
    """Log all output of this rank; only rank 0's standard output reaches the console."""
    sys.stdout = sys.__stdout__
    sys.stdout.reconfigure(line_buffering=True)  # whole lines at once, in order with the errors
    tees = [_TeeIO(1, echo=rank == 0), _TeeIO(2, echo=True)]
    for tee in tees:
        atexit.register(tee.restore)  # after the interpreter has printed its last traceback
    return tees


def init_wandb(config: Config, run_dir: Path) -> wandb.Run | None:
    """Start or go on with a WandB run: offline where online fails, none where that fails too. Training goes on."""
    logging = config.logging
    for mode in dict.fromkeys([logging.wandb_mode, "offline"]) if logging.use_wandb else []:
        try:
            run = wandb.init(
                project=logging.wandb_project,
                entity=logging.wandb_entity,
                name=run_dir.name,
                id=logging.wandb_run_id,
                resume="allow",
                mode=mode,
                dir=run_dir,
                config=to_dict(config),
                # No question is waited for, and the console is in our own log.
                settings=wandb.Settings(console="off", init_timeout=20, login_timeout=1, silent=True),
            )
        except (wandb.Error, OSError) as error:
            print(f"WandB {mode} is not available: {error}")
        else:
            upload = f"; upload it with: wandb sync {Path(run.dir).parent}" if mode == "offline" else ""
            run.define_metric("*", step_metric="step")  # which goes back when a run does
            print(f"WandB initialised: {mode} run {run.id}{upload}")
            return run
    return None


def log_metrics(
    config: Config, run_dir: Path, metrics: dict, run: wandb.Run | None, board: TensorBoard
) -> None:
    """A step's metrics: a line of metrics.jsonl, its numbers to TensorBoard and WandB, now and then the report."""
    step, numbers = metrics["step"], METRICS.flatten(metrics)
    try:
        append_line(run_dir / "metrics.jsonl", metrics)
        board.add(numbers, step)
        if (step + 1) % config.logging.log_freq == 0 or step == 0:
            write_html_report(run_dir, METRICS)
        if run is not None:
            run.log(numbers)
    except (OSError, InputError, wandb.Error) as error:
        print(f"step {step}: metrics or report not written: {error}")


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


def make_env_runner(config: Config, policy: PI0Policy) -> LIBEROEnvRunner:
    """Environments as configured, for what the policy sees and does."""
    task = config.task
    return LIBEROEnvRunner(
        task.benchmark_name,
        task.chosen,
        cameras=policy.config.cameras,
        image_size=task.image_size or policy.config.image_size,
        chunk=policy.config.action_horizon,
        replan_steps=task.replan_steps,
        num_parallel_envs=task.num_parallel_envs,
        rollouts_per_env=task.rollouts_per_env,
        max_open_tasks=task.max_open_tasks,
        max_episode_length=task.max_episode_length,
        settle_steps=task.settle_steps,
        fixtures=task.fixtures,
        render=task.render,
        assets=task.assets,
        demonstrations=task.demonstrations,
        held_out_states=task.held_out_states,
    )


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
    parts = largest(adapter.count_minibatches(batch, algo.minibatch_size))
    passes = algo.num_epochs * parts
    with progress(total=passes, label="update", unit="minibatch") as bar:
        for _ in range(algo.num_epochs):
            for minibatch in adapter.minibatches(batch, parts, generator):
                accumulated += 1
                complete = accumulated == algo.gradient_accumulation_steps or len(losses) + 1 == passes
                # Gradients meet once in an optimizer step.
                adapter.model.require_backward_grad_sync = complete
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
    loss = float(np.mean(gather(np.mean(losses))))
    return {"loss": loss, "grad_norm": float(np.mean(norms)), "updates": len(norms)}


def evaluate_periodically(
    config: Config,
    env_runner: LIBEROEnvRunner,
    acting: ActingPolicy,
    step: int,
    validation: list[InitStatePool] | None,
    evaluations: list[dict],
    run_dir: Path,
) -> None:
    """After every `logging.log_freq` steps, once each: the policy's score, into `evaluations` and metrics.json."""
    evaluation, due = config.evaluation, step and step % config.logging.log_freq == 0
    if not evaluation.periodic_episodes or not due or step in [entry["step"] for entry in evaluations]:
        return
    scored = env_runner.run(
        acting,
        evaluation.periodic_episodes,
        evaluation.seed,
        label=f"evaluation {step}",
        initial_states=validation,
    )
    evaluations.append({"step": step, **score(scored), "protocol": scored.protocol})
    if problem := on_rank_zero(attempt, write_json, run_dir / "metrics.json", evaluations):
        print(f"metrics.json not written: {problem}")
    print(f"evaluation after {step} steps: {format_rate(sum(scored.outcomes), len(scored.outcomes))}")


def train(config: Config, rank: int, world_size: int, tees: list[_TeeIO]) -> Path:
    """Score, practise, score again; returns the folder with everything that was written."""
    set_seed(config.training.seed)
    algo, seed = config.algo, config.training.seed
    policy = load_policy(config)
    device_ids = [policy.device] if policy.device.type == "cuda" else None
    model = DistributedDataParallel(policy, device_ids) if dist.is_initialized() else policy
    run_dir = on_rank_zero(new_run_dir, config.output_dir, config.exp_name, to_dict(config))
    run_dir.mkdir(parents=True, exist_ok=True)  # on another host
    for tee in tees:
        tee.log_to(run_dir / f"train_rank{rank}.log")
    print(f"log file {run_dir / f'train_rank{rank}.log'} created")
    run = init_wandb(config, run_dir) if rank == 0 else None
    board = TensorBoard(run_dir / "tensorboard")
    weight = algo.guidance_weight if algo.mode == "guidance" else None
    started = time.monotonic()
    with make_env_runner(config, policy) as env_runner:
        print(f"training started: {len(env_runner.tasks)} tasks, writing to {run_dir}")
        dataset = LiberoInitStateDataset(
            on_rank_zero(env_runner.training_states, algo.train_init_states, seed)
        )
        print(f"LiberoInitStateDataset created with {len(dataset)} initial states")
        sampler = TaskAwareSampler(
            dataset,
            DistributedSampler(dataset, world_size, rank, shuffle=False),
            1 if algo.group_by == "state" else algo.rloo_batch_size,
        )
        loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=collate_fn_state)
        print(f"DataLoader created: groups by {algo.group_by}, {algo.rloo_batch_size} rollouts each")
        rollouts = RolloutGenerator(
            env_runner,
            init_state_dataloader=loader,
            init_state_dataset=dataset,
            rollouts_per_env=algo.rloo_batch_size,
            enable_dynamic_sampling=algo.enable_dynamic_sampling,
            rollout_skip_threshold=algo.rollout_skip_threshold,
            enable_rollout_stats_tracking=algo.enable_rollout_stats_tracking,
            rollout_stats_path=algo.rollout_stats_path or run_dir / "rollout_stats.json",
            use_val_init=algo.use_val_init,
            num_groups=algo.data_batch_size // algo.rloo_batch_size,
            max_groups=algo.max_sampling_attempts,
            seed=seed,
            shuffle_advantages=algo.shuffle_advantages,
        )
        adapter = PI0_CFG_Adapter(
            get_model_from_ddp(model),
            model=model,
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
        generator = torch.Generator().manual_seed(seed + 1_000_003 * rank)
        evaluation = config.evaluation
        start = ActingPolicy(policy.copy())
        before = env_runner.run(start, evaluation.episodes, evaluation.seed, label="score before")
        on_rank_zero(write_json, run_dir / "protocol.json", before.protocol)
        history, replay = [], []
        evaluations = []
        validation = on_rank_zero(rollouts.validation_states, evaluation.periodic_episodes)
        nothing = WeightedChunks.empty(
            env_runner.cameras, env_runner.image_size, policy.config.action_horizon
        )
        for step in range(config.training.num_train_steps):
            step_started, lr = time.monotonic(), schedule.get_last_lr()[0]
            collection, collected = distributed_collect_batches(sampler, rollouts, acting, step)
            sampler.record(collection)
            rollouts.record(collection)
            chunks = adapter.weigh(collection.episodes, collection.advantages)
            replay = (replay + [chunks])[-algo.replay_iterations :]
            usable = [part for part in replay if part is not None]
            metrics = {"step": step, **collected, "seconds": time.monotonic() - started}
            batch = WeightedChunks.cat([nothing, *usable])
            update_started = time.monotonic()
            if largest(len(batch)):
                metrics |= update_policy(config, adapter, optimizer, average, batch, generator)
                schedule.step()
            phases = {**metrics["phases"], "update": time.monotonic() - update_started}
            phases["other"] = time.monotonic() - step_started - sum(phases.values())
            memory = memory_use(env_runner.pool.processes)
            metrics |= {"lr": lr, "phases": phases, "memory": memory}
            history.append(metrics)
            if rank == 0:
                log_metrics(config, run_dir, metrics, run, board)
            on_rank_zero(average.policy.save_pretrained, run_dir / "policy")
            learned = "nothing to learn from"
            if "loss" in metrics:
                learned = f"{metrics['updates']} updates, loss {metrics['loss']:.4f}"
            print(f"iteration {step}: {metrics['successes']} of {metrics['rollouts']} solved, {learned}")
            evaluate_periodically(config, env_runner, acting, step + 1, validation, evaluations, run_dir)
        after = env_runner.run(acting, evaluation.episodes, evaluation.seed, label="score after")
        seconds = time.monotonic() - started
        final = {"total_steps": sum("loss" in row for row in history), "iterations": len(history)}
        final |= {"before": score(before), "after": score(after)}
        on_rank_zero(write_json, run_dir / "final_training_results.json", final)
        recorded = count_lines(run_dir / "metrics.jsonl")
        print(f"metrics recorded: {recorded} of {len(history)} steps in {run_dir / 'metrics.jsonl'}")
        if rank == 0:
            write_report(run_dir, to_dict(config), before, after, history, seconds)
        if config.features.save_video and rank == 0:
            film_before_after(run_dir, env_runner, start, acting, before, after)
        if rank == 0:
            print(f"  {write_html_report(run_dir)}")
        if run is not None:
            finish_wandb(run, {"before": before.outcomes, "after": after.outcomes})
        rollouts.cleanup()
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
    rank, _, world_size = setup_distributed()
    tees = setup_run_logging(rank)
    try:
        config = load_config_from_yaml(arguments.config_path, arguments.override)
        validate_config(config)
        with watched_ranks():
            train(config, rank, world_size, tees)
    except InputError as error:
        exit_with(error)
    finally:
        cleanup_distributed()


if __name__ == "__main__":
    main()
