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
import sys
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

from pi0 import PI0Policy
from pi0.base.errors import InputError, report_failure, run_command
from pi0.base.files import write_json
from pi0.base.progress import progress
from pi0.libero.evaluation import EvaluationResult
from pi0.libero.films import film_before_after
from pi0.libero.init_states import InitStatePool
from pi0.libero.suites import find_tasks
from pi0.policy.acting import ActingPolicy
from pi0.ranks.collectives import gather, largest, on_rank_zero
from pi0.ranks.watch import exit_with, join_ranks, under_torchrun, watched_ranks
from pi0.report.html_report import write_html_report
from pi0.ript.cfg_adapter import PI0_CFG_Adapter, WeightedChunks
from pi0.ript.config import Config, ConfigError, check_evaluation, help_text, load_config, to_dict, validate
from pi0.ript.env_runner import LIBEROEnvRunner
from pi0.ript.learner import Learner, acting_policies, load_policy
from pi0.ript.metrics import METRICS
from pi0.ript.replay import Replay
from pi0.ript.results import check_machine, summarize, write_report
from pi0.ript.rollout_generator import Collection, RolloutGenerator, Start, merge_metrics
from pi0.ript.rollout_stats import RolloutStats, state_name
from pi0.ript.turns import Ring, TaskTurns
from pi0.training.descriptor_tap import DescriptorTap
from pi0.training.ema import AveragedModule
from pi0.training.flow_loss import Augmentation
from pi0.training.log_file import LogFile
from pi0.training.memory import memory_use
from pi0.training.metrics import TensorBoard, append_line, count_lines, finish_wandb, start_wandb
from pi0.training.optimizer import make_optimizer, make_schedule
from pi0.training.random_state import set_seed
from pi0.training.run_folder import new_run_dir


class LiberoInitStateDataset(Dataset):
    """Training states of all tasks, one task after another: {"task_id", "init_state", "index"}."""

    def __init__(self, pools: list[InitStatePool]):
        self.pools = pools
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
    which the statistics skip solved ones.
    """

    def __init__(
        self, dataset: LiberoInitStateDataset, ranks: DistributedSampler, group_size: int, stats: RolloutStats
    ):
        pools = dataset.pools
        self.dataset = dataset
        self.stats = stats
        self.pools = pools
        self.group_size = group_size
        self.turns = TaskTurns([pool.task for pool in pools])
        own = [i for i in ranks if i % ranks.num_replicas == ranks.rank]  # without those that pad the shares
        self.rings = [Ring([i for i in own if dataset.starts[i][0] is pool]) for pool in pools]
        if not all(ring.states for ring in self.rings):
            raise ConfigError(
                f"algo.train_init_states gives {len(pools[0])} states a task, too few for all ranks"
            )
        self.names = [state_name(pool.task, pool.states[index]) for pool, index in dataset.starts]
        self.skipped: dict[str, list[int]] = {}

    def smart_sample_group(self) -> list[int]:
        """The next states of one task."""
        task = self.turns.next_task()
        indices, skipped = self.rings[task].sample_unsolved(self.group_size, self.is_skipped)
        if skipped:
            self.skipped.setdefault(self.pools[task].task.name, [0])[0] += skipped
        return indices

    def take_skipped(self) -> dict[str, list[int]]:
        """How many states were skipped since the last call."""
        skipped, self.skipped = self.skipped, {}
        return skipped

    def is_skipped(self, index: int) -> bool:
        """Whether the statistics skip a state, whose turn it is."""
        return self.stats.skip(self.names[index])

    def __iter__(self) -> Iterator[list[int]]:
        while True:
            yield self.smart_sample_group()

    def record(self, collection: Collection) -> None:
        """Remember what the policy solved."""
        self.turns.record(collection.tried)


def setup_distributed() -> tuple[int, int, int]:
    """Join the ranks that torchrun has started: (rank, rank on this host, world size); (0, 0, 1) without it."""
    if not under_torchrun():
        return 0, 0, 1
    local_rank = int(os.environ["LOCAL_RANK"])
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank % torch.cuda.device_count())
    join_ranks()
    if dist.get_rank() > 0:
        sys.stdout = open(os.devnull, "w", errors="replace")  # noqa: SIM115  rank 0 speaks for all
    return dist.get_rank(), local_rank, dist.get_world_size()


def cleanup_distributed() -> None:
    """Leave the ranks."""
    if dist.is_initialized():
        dist.destroy_process_group()


def get_model_from_ddp(model: nn.Module) -> PI0Policy:
    """The policy inside its distributed wrapper, or as it is."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def distributed_collect_batches(
    states: TaskAwareSampler, rollouts: RolloutGenerator, policy: ActingPolicy, step: int
) -> tuple[Collection, dict]:
    """This rank's rollouts, and the metrics of all ranks.

    Exactly `algo.data_batch_size` trajectories on each rank; fewer only when
    `algo.max_sampling_attempts` groups, or twice as many that were all dropped, are used up.
    """
    collection = rollouts.generate_rollouts(policy, step)
    parts = gather({**collection.metrics(), "skipped_by_task": states.take_skipped()})
    for rank, part in enumerate(parts):
        if dist.is_initialized():
            practised = f"{len(part['tasks'])} tasks, {part['trajectories']} trajectories"
            print(f"rank {rank}: {practised}, {part['solved']} solved")
    metrics = merge_metrics(parts)
    for line in rollouts.describe(metrics):
        print(line)
    return collection, metrics


class _TeeIO(DescriptorTap):
    """Copies what reaches the console, by whatever code or process, to a log file."""

    def __init__(self, descriptor: int, echo: bool):
        self.log = LogFile()
        super().__init__(descriptor, echo)

    def log_to(self, path: Path) -> None:
        """From now on, and for all that was written before, into the file at `path`."""
        self.say(self.log.open(path))
        self.leave_to(path)

    def heard(self, data: bytes) -> None:
        """Copy what was written; a full disk ends the copy, never the run."""
        self.say(self.log.write(data))

    def restore(self) -> None:
        """Put the descriptor back as it was, with all that was written until now in the file."""
        super().restore()
        self.log.end_line()


def setup_run_logging(rank: int) -> list[_TeeIO]:
    """Log all output of this rank; only rank 0's standard output reaches the console."""
    sys.stdout = sys.__stdout__
    tees = [_TeeIO(1, echo=rank == 0), _TeeIO(2, echo=True)]
    for tee in tees:
        atexit.register(tee.restore)  # after the interpreter has printed its last traceback
    return tees


def log_to_files(tees: list[_TeeIO], path: Path) -> None:
    """From now on, and for all that was written before, log into the file at `path`, on whatever host."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for tee in tees:
        tee.log_to(path)
    print(f"log file {path} created")


def init_wandb(config: Config, run_dir: Path) -> wandb.Run | None:
    """Start or continue a WandB run as configured; where that fails, training continues without."""
    return start_wandb(config.logging, run_dir, to_dict(config))


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


def make_states(
    config: Config, env_runner: LIBEROEnvRunner, stats: RolloutStats, rank: int, world_size: int
) -> TaskAwareSampler:
    """The states that are practised."""
    algo = config.algo
    pools = on_rank_zero(env_runner.training_states, algo.train_init_states, config.training.seed)
    dataset = LiberoInitStateDataset(pools)
    print(f"LiberoInitStateDataset created with {len(dataset)} initial states")
    ranks = DistributedSampler(dataset, world_size, rank, shuffle=False)
    return TaskAwareSampler(dataset, ranks, 1 if algo.group_by == "state" else algo.rloo_batch_size, stats)


def make_rollout_generator(
    config: Config, env_runner: LIBEROEnvRunner, states: TaskAwareSampler
) -> RolloutGenerator:
    """What collects the groups of an iteration, as configured."""
    algo = config.algo
    loader = DataLoader(states.dataset, batch_sampler=states, collate_fn=collate_fn_state)
    print(f"DataLoader created: groups by {algo.group_by}, {algo.rloo_batch_size} rollouts each")
    return RolloutGenerator(
        env_runner,
        init_state_dataloader=loader,
        init_state_dataset=states.dataset,
        rollouts_per_env=algo.rloo_batch_size,
        num_groups=algo.data_batch_size // algo.rloo_batch_size,
        max_groups=algo.max_sampling_attempts,
        seed=config.training.seed,
        shuffle_advantages=algo.shuffle_advantages,
        enable_dynamic_sampling=algo.enable_dynamic_sampling,
        stats=states.stats,
        use_val_init=algo.use_val_init,
    )


def make_learner(config: Config, model: nn.Module, env_runner: LIBEROEnvRunner, rank: int) -> Learner:
    """The policy's loss, optimizer, schedule and averaged weights, as configured."""
    algo, training = config.algo, config.training
    policy = get_model_from_ddp(model)
    average = AveragedModule(policy, policy.copy().eval(), algo.ema_decay)
    adapter = PI0_CFG_Adapter(
        policy,
        model=model,
        mode=algo.mode,
        noise_samples=algo.noise_samples,
        negative_weight=algo.negative_weight,
        condition_dropout=algo.condition_dropout,
        noise_level=algo.noise_level,
        ratio_clip=algo.ratio_clip,
        augmentation=Augmentation(),
    )
    optimizer = make_optimizer(policy, algo.lr, training.optimizer)
    schedule = make_schedule(optimizer, training.optimizer.final_lr_share, training.num_train_steps)
    nothing = WeightedChunks.empty(env_runner.cameras, env_runner.image_size, policy.config.action_horizon)
    generator = torch.Generator().manual_seed(training.seed + 1_000_003 * rank)
    return Learner(adapter, optimizer, schedule, average, Replay(algo.replay_iterations, nothing), generator)


def update_policy(config: Config, learner: Learner, batch: WeightedChunks) -> dict[str, float]:
    """Several epochs over the collected chunks, `gradient_accumulation_steps` minibatches an optimizer step."""
    algo, adapter, policy = config.algo, learner.adapter, learner.policy
    policy.train()
    losses, norms, accumulated = [], [], 0
    parts = largest(adapter.count_minibatches(batch, algo.minibatch_size))
    passes = algo.num_epochs * parts
    with progress(total=passes, label="update", unit="minibatch") as bar:
        for _ in range(algo.num_epochs):
            for minibatch in adapter.minibatches(batch, parts, learner.generator):
                accumulated += 1
                complete = accumulated == algo.gradient_accumulation_steps or len(losses) + 1 == passes
                # Gradients meet once in an optimizer step.
                adapter.model.require_backward_grad_sync = complete
                loss = adapter.minibatch_loss(minibatch, learner.generator)
                if not torch.isfinite(loss):
                    raise FloatingPointError(f"loss is {loss.item()}; lower algo.lr or check the checkpoint")
                (loss / algo.gradient_accumulation_steps).backward()
                losses.append(loss.item())
                bar.update(1, f"loss {losses[-1]:.4f}")
                if complete:
                    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), algo.grad_norm_clip)
                    norms.append(norm.item())
                    learner.optimizer.step()
                    learner.optimizer.zero_grad(set_to_none=True)
                    learner.average.update()
                    accumulated = 0
    policy.eval()
    loss = float(np.mean(gather(np.mean(losses))))
    counts = {"updates": len(norms), **adapter.ratio_metrics()}
    return {"loss": loss, "grad_norm": float(np.mean(norms)), **counts}


def train_iteration(
    config: Config, learner: Learner, collection: Collection, metrics: dict, started: float
) -> dict:
    """Learn from what was collected; returns the metrics of the iteration that `started` with its rollouts."""
    lr, update_started = learner.lr, time.monotonic()
    learner.take_in(collection)
    batch = learner.replay.batch()
    if largest(len(batch)):
        metrics |= update_policy(config, learner, batch)
        learner.schedule.step()
    phases = {**metrics["phases"], "update": time.monotonic() - update_started}
    phases["other"] = time.monotonic() - started - sum(phases.values())
    return metrics | {"lr": lr, "phases": phases}


def write_results(
    config: Config,
    run_dir: Path,
    env_runner: LIBEROEnvRunner,
    policies: tuple[ActingPolicy, ActingPolicy],
    scores: tuple[EvaluationResult, EvaluationResult],
    history: list[dict],
    seconds: float,
) -> None:
    """Table, learning curve and film of the policies before and after, with their scores."""
    final = {"total_steps": sum("loss" in row for row in history), "iterations": len(history)}
    final |= {"before": scores[0].score(), "after": scores[1].score()}
    write_json(run_dir / "final_training_results.json", final)
    recorded = count_lines(run_dir / "metrics.jsonl")
    print(f"metrics recorded: {recorded} of {len(history)} steps in {run_dir / 'metrics.jsonl'}")
    write_report(run_dir, to_dict(config), *scores, history, seconds)
    if config.features.save_video:
        film_before_after(run_dir, env_runner, *policies, *scores)
    print(f"  {write_html_report(run_dir)}")


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
    evaluations.append({"step": step, **scored.score(), "protocol": scored.protocol})
    scores = (write_json, run_dir / "metrics.json", evaluations)
    on_rank_zero(report_failure, "metrics.json not written", *scores)
    print(f"evaluation after {step} steps: {scored}")


def train(config: Config, rank: int, world_size: int, tees: list[_TeeIO]) -> Path:
    """Score, practise, score again; returns the folder with everything that was written."""
    set_seed(config.training.seed)
    policy = load_policy(config)
    device_ids = [policy.device] if policy.device.type == "cuda" else None
    model = DistributedDataParallel(policy, device_ids) if dist.is_initialized() else policy
    run_dir = on_rank_zero(new_run_dir, config.output_dir, config.exp_name, to_dict(config))
    log_to_files(tees, run_dir / f"train_rank{rank}.log")
    run = init_wandb(config, run_dir) if rank == 0 else None
    board = TensorBoard(run_dir / "tensorboard")
    started = time.monotonic()
    with LIBEROEnvRunner(config.task, policy.config) as env_runner:
        print(f"training started: {len(env_runner.tasks)} tasks, writing to {run_dir}")
        stats_path = config.algo.rollout_stats_path or run_dir / "rollout_stats.json"
        tracked = config.algo.enable_rollout_stats_tracking
        stats = RolloutStats(stats_path if tracked else None, config.algo.rollout_skip_threshold)
        states = make_states(config, env_runner, stats, rank, world_size)
        rollouts = make_rollout_generator(config, env_runner, states)
        start = ActingPolicy(policy.copy())
        learner = make_learner(config, model, env_runner, rank)
        acting, practising = acting_policies(config, learner)
        evaluation = config.evaluation
        before = env_runner.run(start, evaluation.episodes, evaluation.seed, label="score before")
        protocol = (write_json, run_dir / "protocol.json", before.protocol)
        on_rank_zero(report_failure, "protocol.json not written", *protocol)
        history = []
        evaluations = []
        validation = on_rank_zero(rollouts.validation_states, evaluation.periodic_episodes)
        for step in range(config.training.num_train_steps):
            step_started = time.monotonic()
            collection, collected = distributed_collect_batches(states, rollouts, practising(step), step)
            states.record(collection)
            rollouts.record(collection)
            metrics = {"step": step, **collected, "seconds": time.monotonic() - started}
            metrics = train_iteration(config, learner, collection, metrics, step_started)
            metrics |= {"memory": memory_use(env_runner.pool.processes)}
            history.append(metrics)
            if rank == 0:
                log_metrics(config, run_dir, metrics, run, board)
            on_rank_zero(learner.average.module.save_pretrained, run_dir / "policy")
            print(summarize(metrics))
            evaluate_periodically(config, env_runner, acting, step + 1, validation, evaluations, run_dir)
        after = env_runner.run(acting, evaluation.episodes, evaluation.seed, label="score after")
        seconds = time.monotonic() - started
        if rank == 0:
            write_results(config, run_dir, env_runner, (start, acting), (before, after), history, seconds)
        finish_wandb(run, {"before": before.outcomes, "after": after.outcomes})
        rollouts.cleanup()
        on_rank_zero(check_machine, before, after, history)
    return run_dir


def load_config_from_yaml(path: str, overrides: list[str]) -> Config:
    """Defaults, then the profile, then the file, then the overrides."""
    config = load_config(path, overrides, stage=int(Path(__file__).name[:2]))
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
    parser.add_argument("--override", nargs="*", action="extend", default=[], help="KEY=VALUE: algo.lr=2e-5")
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
    run_command(main)
