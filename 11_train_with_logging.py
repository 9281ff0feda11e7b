"""Stage 11: stage 10 with log files, metrics, WandB, TensorBoard and a report page.

A pi0 policy that half-works on LIBERO tasks practises them: each iteration runs rollouts from training
states, scores them by success, and learns from the collected chunks for a few epochs. Settings come from a
YAML file; `--help` lists every key with its unit, default and meaning.

Tasks are dealt to the ranks; in an iteration each rank practises one of its tasks, and all learn from what all
collected. Without torchrun it trains as stage 09 does.

In the run's folder: train_rank0.log, metrics.jsonl (docs/metrics.md), report.html and plots/, wandb/, tensorboard/.

    python 11_train_with_logging.py --config_path configs/stage11_ript_vla.yaml
    torchrun --nproc_per_node=2 11_train_with_logging.py --config_path configs/multi_task_distributed.yaml

On two hosts, the first of which is called `first`, the same on each (docs/distributed.md):

    torchrun --nnodes=2 --nproc_per_node=2 --rdzv_backend=c10d --rdzv_endpoint=first:29500 \
        11_train_with_logging.py --config_path configs/multi_task_distributed.yaml
"""

from __future__ import annotations

import argparse
import atexit
import os
import random
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import wandb
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pi0 import PI0Policy, pick_device
from pi0.base.errors import InputError
from pi0.base.progress import progress
from pi0.libero.init_states import InitStatePool, state_hash
from pi0.libero.suites import Task, find_tasks
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
from pi0.ript.results import film_before_after, new_run_dir, write_json, write_report
from pi0.ript.rollout_generator import Collection, RolloutGenerator, Start, merge_metrics
from pi0.training.descriptor_tap import DescriptorTap
from pi0.training.ema import AveragedPolicy
from pi0.training.flow_loss import Augmentation
from pi0.training.memory import memory_use
from pi0.training.metrics import TensorBoard, append_line, count_lines, finish_wandb
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


class DistributedInitialStateDataset(InitialStateDataset):
    """Training states of this rank's tasks. An iteration handles one of them, the one under the task cursor."""

    def __init__(
        self, pools: list[InitStatePool], group_size: int, skip_after: int, env_runner: LIBEROEnvRunner
    ):
        super().__init__(pools, group_size, skip_after)
        self.env_runner = env_runner

    def next_task(self) -> int:
        """Position in `pools` of the rank's current task."""
        return [pool.task for pool in self.pools].index(self.env_runner.current_task)

    def sample_batch_circular(self, batch_size: int) -> list[Start]:
        """The next states of the current task, in ring order."""
        task = self.next_task()
        pool, first = self.pools[task], self.init_state_cursor[task]
        self.init_state_cursor[task] += batch_size
        return [(pool, (first + number) % len(pool)) for number in range(batch_size)]

    def get_states_for_envs(self, num_parallel_envs: int, rloo_batch_size: int) -> list[Start]:
        """States for all rollouts of all environments, so that no two start alike."""
        return self.sample_batch_circular(num_parallel_envs * rloo_batch_size)

    def smart_sample_init_state(self) -> list[tuple[Start, str]]:
        """The states of the next group, each with the hash that names it; solved ones are passed over for a round."""
        solved = self.solved_in_a_row[self.next_task()]
        chosen: list[Start] = []
        while len(chosen) < self.group_size:
            for pool, index in self.get_states_for_envs(1, self.group_size - len(chosen)):
                if solved[index] >= self.skip_after:
                    solved[index] = 0
                    self.skipped += 1
                else:
                    chosen.append((pool, index))
        return [((pool, index), state_hash(pool.states[index].state)) for pool, index in chosen]

    def smart_sample_group(self) -> list[Start]:
        """The next K starts."""
        return [start for start, _ in self.smart_sample_init_state()]


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


def get_distributed_tasks(tasks: list[Task], rank: int, world_size: int) -> list[Task]:
    """The tasks dealt to a rank, in turns; none where there are fewer tasks than ranks."""
    rank_to_tasks: list[list[Task]] = [[] for _ in range(world_size)]
    for number, task in enumerate(tasks):
        rank_to_tasks[number % world_size].append(task)
    return rank_to_tasks[rank]


def distributed_collect_batches(
    dataset: InitialStateDataset, rollouts: RolloutGenerator, policy: ActingPolicy, step: int
) -> tuple[Collection, dict]:
    """This rank's rollouts of its current task, and the metrics of all ranks.

    Exactly `algo.data_batch_size` trajectories on a rank that has a task, none on one that has not; fewer only
    when `algo.max_sampling_attempts` are used up.
    """
    task = rollouts.env_runner.set_current_task_by_cursor()
    collection = rollouts.generate_rollouts(policy, step) if task else Collection()
    rollouts.env_runner.advance_task_cursor()
    parts = gather((task and task.index, {**collection.metrics(), "skipped_states": dataset.skipped}))
    for rank, (index, part) in enumerate(parts):
        if dist.is_initialized():
            print(f"rank {rank}: task {index}, {part['trajectories']} trajectories, {part['solved']} solved")
    return collection, merge_metrics([part for _, part in parts])


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
        env_runner.assigned_tasks = get_distributed_tasks(env_runner.tasks, rank, world_size)
        pools = env_runner.training_states(algo.train_init_states, seed)
        dataset = InitialStateDataset(pools, algo.rloo_batch_size, skip_after=2)
        if dist.is_initialized():
            dataset = DistributedInitialStateDataset(
                pools, algo.rloo_batch_size, skip_after=2, env_runner=env_runner
            )
        rollouts = RolloutGenerator(
            env_runner,
            dataset.smart_sample_group,
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
        nothing = WeightedChunks.empty(
            env_runner.cameras, env_runner.image_size, policy.config.action_horizon
        )
        for step in range(config.training.num_train_steps):
            step_started, lr = time.monotonic(), schedule.get_last_lr()[0]
            dataset.skipped = 0
            collection, collected = distributed_collect_batches(dataset, rollouts, acting, step)
            dataset.record(collection)
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
        after = env_runner.run(acting, evaluation.episodes, evaluation.seed, label="score after")
        seconds = time.monotonic() - started
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
