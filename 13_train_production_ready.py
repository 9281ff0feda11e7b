"""Stage 13: stage 12 with checkpoints, exact resume, signals, recovery from bad updates, and a memory watch.

A pi0 policy that half-works on LIBERO tasks practises them: each iteration runs rollouts from training
states, scores them by success, and learns from the collected chunks for a few epochs. Settings come from a
YAML file; `--help` lists every key with its unit, default and meaning.

A group is K rollouts of one initial state (algo.group_by). A group whose rollouts all agree teaches nothing and is
replaced by one of another state; a state that keeps being solved is skipped for a round; whole suites are
practised, all ranks taking states of all tasks. Every logging.log_freq steps the policy is evaluated on
evaluation.periodic_episodes episodes.

In the run's folder: train_rank0.log, metrics.jsonl (docs/metrics.md), report.html and plots/, wandb/, tensorboard/.
Besides: rollout_stats.json, metrics.json (evaluations), final_training_results.json.

Ctrl+C stops after a checkpoint, `kill -USR1` of a rank makes one; --resume continues, to the bit, from the newest one that verifies.

    python 13_train_production_ready.py --config_path configs/quickstart.yaml
    python 13_train_production_ready.py --config_path configs/quickstart.yaml --resume
    torchrun --nproc_per_node=2 13_train_production_ready.py --config_path configs/stage12_libero10.yaml

On two hosts, the first of which is called `first`, the same on each (docs/distributed.md):

    torchrun --nnodes=2 --nproc_per_node=2 --rdzv_backend=c10d --rdzv_endpoint=first:29500 \
        13_train_production_ready.py --config_path configs/multi_task_distributed.yaml
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import wandb
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler

from pi0 import PI0Policy
from pi0.base.errors import InputError, Outputs, run_command
from pi0.base.files import write_json
from pi0.base.progress import progress
from pi0.libero.evaluation import BrokenSimulationsError, EvaluationResult, restore_result
from pi0.libero.films import film_before_after
from pi0.libero.init_states import InitStatePool
from pi0.libero.suites import find_tasks
from pi0.policy.acting import ActingPolicy
from pi0.ranks.collectives import average_gradients, broadcast_weights, gather, largest, on_rank_zero
from pi0.ranks.sharding import shard, weights_are_finite, whole
from pi0.ranks.watch import RankWatch, exit_with, join_ranks, under_torchrun, watched_ranks
from pi0.report.html_report import write_html_report
from pi0.ript.cfg_adapter import OutOfMemory, PI0_CFG_Adapter, WeightedChunks
from pi0.ript.config import Config, ConfigError, check_evaluation, help_text, load_config, to_dict, validate
from pi0.ript.cotraining import load_cotraining
from pi0.ript.env_runner import LIBEROEnvRunner
from pi0.ript.learner import Learner, acting_policies, load_policy
from pi0.ript.metrics import METRICS
from pi0.ript.replay import Replay
from pi0.ript.results import check_machine, summarize, write_page, write_report
from pi0.ript.resume import SETTINGS, compare_outside
from pi0.ript.rollout_generator import Collection, RolloutGenerator, Start, merge_metrics
from pi0.ript.rollout_stats import RolloutStats, SamplerState, state_name
from pi0.ript.turns import Ring, TaskTurns
from pi0.training.descriptor_tap import DescriptorTap
from pi0.training.ema import AveragedModule
from pi0.training.flow_loss import Augmentation
from pi0.training.interrupts import Interrupted, Interrupts
from pi0.training.log_file import LogFile
from pi0.training.memory import RELEASE_EVERY, growth, memory_use, release
from pi0.training.metrics import TensorBoard, append_line, finish_wandb, require_rows, start_wandb
from pi0.training.optimizer import make_optimizer, make_schedule
from pi0.training.random_state import GlobalStreams, OwnStream, set_seed
from pi0.training.run_folder import new_run_dir, run_to_resume, take_run
from pi0.training.safeguards import Safeguards
from pi0.training.saved_policy import SavedPolicy
from pi0.training.state import States, TrainingState, Weights


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


def setup_signal_handlers(watch: RankWatch | None) -> Interrupts:
    """From now on signals ask the run to stop or to make a checkpoint, and do nothing else."""
    interrupts = Interrupts(watch)
    interrupts.install()
    return interrupts


def save_checkpoint(safe: Safeguards) -> None:
    """Write what the run was after its last iteration; a disk that refuses is reported, and training continues."""
    step = safe.state.step
    if safe.recovery.bad_in_a_row:  # maybe the weights are spoilt
        print(f"no checkpoint of step {step}: the last gradient was not finite")
    elif problem := safe.write():
        print(f"step {step}: {problem}")


def load_checkpoint(safe: Safeguards, learner: Learner, newest: Path | None) -> None:
    """Continue from a checkpoint; without one begin."""
    safe.begin(newest)
    passes = safe.noted("passes", 1) if newest else 1  # by a rank whose memory ran out
    learner.adapter.passes = largest(max(passes, safe.state.facts.get("passes", 1)))


@contextlib.contextmanager
def cleanup_on_exit(safe: Safeguards) -> Iterator[None]:
    """Where the run is asked to stop, or its simulations break, leave a checkpoint of its last finished iteration."""
    try:
        yield
    except (Interrupted, BrokenSimulationsError) as reason:
        if safe.state.can_be_saved and not on_rank_zero(safe.store.has, safe.state.step):
            save_checkpoint(safe)
        print(f"stopped; --resume continues from {safe.store.resume_point(safe.state.step)}")
        if not isinstance(reason, Interrupted):
            raise


def monitor_memory(history: list[dict]) -> None:
    """Now and then release what is not used, and warn of memory that grows."""
    if len(history) % RELEASE_EVERY == 1:
        release()
    for line in growth(history):
        print(line)


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


def reduce_memory(config: Config, policy: PI0Policy) -> None:
    """As configured: activations that are worked out again, and only a part of the policy on each rank (FSDP2)."""
    if config.training.gradient_checkpointing:
        policy.network.checkpoint_gradients()
    if config.training.use_fsdp:
        shard(policy, policy.network.blocks())


def make_learner(config: Config, policy: PI0Policy, env_runner: LIBEROEnvRunner, rank: int) -> Learner:
    """The policy's loss, optimizer, schedule and averaged weights, as configured."""
    algo, training = config.algo, config.training
    average = AveragedModule(policy, policy.copy().eval(), algo.ema_decay)
    reduce_memory(config, policy)
    adapter = PI0_CFG_Adapter(
        policy,
        mode=algo.mode,
        noise_samples=algo.noise_samples,
        negative_weight=algo.negative_weight,
        condition_dropout=algo.condition_dropout,
        noise_level=algo.noise_level,
        ratio_clip=algo.ratio_clip,
        augmentation=Augmentation(),
        mixed_precision=training.use_mixed_precision,
    )
    optimizer = make_optimizer(policy, algo.lr, training.optimizer)
    schedule = make_schedule(optimizer, training.optimizer.final_lr_share, training.num_train_steps)
    nothing = WeightedChunks.empty(env_runner.cameras, env_runner.image_size, policy.config.action_horizon)
    generator = torch.Generator().manual_seed(training.seed + 1_000_003 * rank)
    cotraining = load_cotraining(config, policy, env_runner.tasks)
    return Learner(
        adapter, optimizer, schedule, average, Replay(algo.replay_iterations, nothing), generator, cotraining
    )


def add_parts(state: TrainingState, learner: Learner, states: TaskAwareSampler, noise: OwnStream) -> None:
    """What a checkpoint holds."""
    state.shared = {
        "policy": SavedPolicy(learner.average.module, learner.policy),
        "training": Weights(learner.policy.network, "resume with the same training.trainable"),
        "optimizer": States(optimizer=learner.optimizer, schedule=learner.schedule),
    }
    sampler = SamplerState(states.turns, states.rings, states.stats)
    state.own = {"sampler": sampler, "generator": noise, "replay": learner.replay, "random": GlobalStreams()}


def note_facts(config: Config, safe: Safeguards, learner: Learner, seconds: float) -> None:
    """What a resumed run needs to know besides."""
    of_run = {"wandb_run_id": config.logging.wandb_run_id, "config": to_dict(config), "seconds": seconds}
    safe.state.facts |= {**of_run, "passes": learner.adapter.passes, **safe.recovery.facts()}


def update_policy(
    config: Config, learner: Learner, batch: WeightedChunks, safe: Safeguards
) -> dict[str, float]:
    """Several epochs over the collected chunks, `gradient_accumulation_steps` minibatches an optimizer step."""
    algo, adapter, policy = config.algo, learner.adapter, learner.policy
    sharded = isinstance(policy, FSDPModule)
    # A stop lets the update finish if there is time, unless the update is all that would be lost.
    patience_s = 0.0 if on_rank_zero(safe.store.has, safe.state.step) else 10.0
    safe.state.begin_update()
    policy.train()
    losses, norms, accumulated = [], [], 0
    parts = largest(adapter.count_minibatches(batch, algo.minibatch_size))
    passes = algo.num_epochs * parts
    bad = 0
    with progress(total=passes, label="update", unit="minibatch") as bar:
        for _ in range(algo.num_epochs):
            for minibatch in adapter.minibatches(batch, parts, learner.generator):
                accumulated += 1
                complete = accumulated == algo.gradient_accumulation_steps or len(losses) + 1 == passes
                if sharded:
                    policy.set_requires_gradient_sync(complete)
                steps, noise = algo.gradient_accumulation_steps, learner.generator
                losses.append(adapter.accumulate_gradient(minibatch, noise, steps, retry=not sharded))
                bar.update(1, f"loss {losses[-1]:.4f}")
                if complete:
                    if not sharded:
                        average_gradients(policy)
                    norm = whole(torch.nn.utils.clip_grad_norm_(policy.parameters(), algo.grad_norm_clip))
                    finite = bool(torch.isfinite(norm))  # the same on all ranks, as the gradient is
                    safe.recovery.count_gradient(finite)
                    if finite:
                        norms.append(norm.item())
                        learner.optimizer.step()
                        learner.average.update()
                    bad += not finite
                    learner.optimizer.zero_grad(set_to_none=True)
                    accumulated = 0
                    safe.recovery.check()
                    safe.interrupts.check_together(patience_s=patience_s)
    if largest(int(not weights_are_finite(policy))):
        raise FloatingPointError("the weights are not finite")
    policy.eval()
    counts = {"updates": len(norms), "bad_updates": bad, "passes": adapter.passes, **adapter.ratio_metrics()}
    if bad:
        print(f"{bad} gradients were not finite and were left out")
    if not norms:
        return counts
    loss = float(np.mean(gather(np.nanmean(losses))))
    return {"loss": loss, "grad_norm": float(np.mean(norms)), **counts}


def train_iteration(
    config: Config, learner: Learner, collection: Collection, metrics: dict, started: float, safe: Safeguards
) -> dict:
    """Learn from what was collected; returns the metrics of the iteration that `started` with its rollouts."""
    lr, update_started = learner.lr, time.monotonic()
    learner.take_in(collection)
    batch = learner.replay.batch()
    if largest(len(batch)):
        if learner.cotraining is not None:
            batch = WeightedChunks.cat([batch, learner.cotraining.draw(learner.generator)])
        try:
            metrics |= update_policy(config, learner, batch, safe)
        except OutOfMemory as error:
            safe.note("passes", error.passes)
            where = f"step {safe.state.step}: memory ran out on rank {dist.get_rank()}"
            more = f"--resume continues with minibatches in {error.passes} passes"
            raise InputError(f"{where}; {more}") from error
        learner.schedule.step()
    phases = {**metrics["phases"], "update": time.monotonic() - update_started}
    phases["other"] = time.monotonic() - started - sum(phases.values())
    return metrics | {"lr": lr, "phases": phases, "rollbacks": safe.recovery.rollbacks}


def write_results(
    config: Config,
    run_dir: Path,
    env_runner: LIBEROEnvRunner,
    policies: tuple[ActingPolicy, ActingPolicy],
    scores: tuple[EvaluationResult, EvaluationResult],
    history: list[dict],
    seconds: float,
    outputs: Outputs,
) -> None:
    """Table, learning curve and film of the policies before and after, with their scores."""
    final = {"total_steps": sum("loss" in row for row in history), "iterations": len(history)}
    final |= {"before": scores[0].score(), "after": scores[1].score()}
    outputs.write("final_training_results.json", write_json, run_dir / "final_training_results.json", final)
    outputs.write("metrics.jsonl", require_rows, run_dir, len(history))
    results = (run_dir, to_dict(config), *scores, history, seconds, outputs.missing)
    outputs.write("results.json", write_report, *results)
    if config.features.save_video:
        outputs.write("before_after.mp4", film_before_after, run_dir, env_runner, *policies, *scores)
    outputs.write("report.html", write_page, run_dir)


def evaluate_periodically(
    config: Config,
    env_runner: LIBEROEnvRunner,
    acting: ActingPolicy,
    step: int,
    validation: list[InitStatePool] | None,
    evaluations: list[dict],
    run_dir: Path,
    write: Callable[..., None],
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
    on_rank_zero(write, "metrics.json", write_json, run_dir / "metrics.json", evaluations)
    print(f"evaluation after {step} steps: {scored}")


def train(
    config: Config, rank: int, world_size: int, tees: list[_TeeIO], watch: RankWatch | None, resume: str
) -> Path:
    """Score, practise, score again; returns the folder with everything that was written."""
    interrupts = setup_signal_handlers(watch)
    set_seed(config.training.seed)
    policy = load_policy(config)
    broadcast_weights(policy)  # another host may have another file of that name
    place = (config.output_dir, config.exp_name, to_dict(config))
    open_run = (run_to_resume, resume, *place, *SETTINGS) if resume else (new_run_dir, *place)
    run_dir = on_rank_zero(*open_run)
    log_to_files(tees, run_dir / f"train_rank{rank}.log")
    on_rank_zero(take_run, run_dir, to_dict(config))
    safe = Safeguards.of(run_dir, config.training, interrupts)
    newest, state = safe.find() if resume else None, safe.state
    if newest is not None and config.logging.wandb_run_id is None:
        config.logging.wandb_run_id = safe.store.facts(newest).get("wandb_run_id")
    run = init_wandb(config, run_dir) if rank == 0 else None
    config.logging.wandb_run_id = run.id if run else config.logging.wandb_run_id
    board = TensorBoard(run_dir / "tensorboard")
    started, outputs = time.monotonic(), Outputs()
    with LIBEROEnvRunner(config.task, policy.config, interrupts) as env_runner, cleanup_on_exit(safe):
        print(f"training started: {len(env_runner.tasks)} tasks, writing to {run_dir}")
        stats_path = config.algo.rollout_stats_path or run_dir / "rollout_stats.json"
        tracked = config.algo.enable_rollout_stats_tracking
        stats = RolloutStats(stats_path if tracked else None, config.algo.rollout_skip_threshold)
        states = make_states(config, env_runner, stats, rank, world_size)
        rollouts = make_rollout_generator(config, env_runner, states)
        start = ActingPolicy(policy.copy())
        learner = make_learner(config, policy, env_runner, rank)
        noise = OwnStream(learner.generator, config.training.seed)
        add_parts(state, learner, states, noise)
        load_checkpoint(safe, learner, newest)
        state.facts |= on_rank_zero(compare_outside, config, env_runner, state.facts)
        saved = ("policy", learner.average.module.save_pretrained, run_dir / "policy")
        on_rank_zero(outputs.write, *saved)
        started -= state.facts.get("seconds", 0.0)
        note_facts(config, safe, learner, time.monotonic() - started)
        acting, practising = acting_policies(config, learner)
        evaluation = config.evaluation
        if "before" in state.facts:  # of a run that is resumed
            before = restore_result(env_runner, state.facts["before"])
        else:
            before = env_runner.run(start, evaluation.episodes, evaluation.seed, label="score before")
            state.facts["before"] = before.to_dict()
        on_rank_zero(outputs.write, "protocol.json", write_json, run_dir / "protocol.json", before.protocol)
        validation = on_rank_zero(rollouts.validation_states, evaluation.periodic_episodes)
        scored, evaluations = state.score, state.evaluations  # None also if a stop came before the score
        evaluated = (validation, evaluations, run_dir, outputs.write)
        evaluate_periodically(config, env_runner, acting, state.step, *evaluated)
        if state.step == 0 or state.score != scored:
            save_checkpoint(safe)
        while (step := state.step) < config.training.num_train_steps:
            step_started = time.monotonic()
            collection, collected = distributed_collect_batches(states, rollouts, practising(step), step)
            interrupts.check_together(collection.abandoned)
            states.record(collection)
            rollouts.record(collection)
            metrics = {"step": step, **collected, "seconds": time.monotonic() - started}
            try:
                metrics = train_iteration(config, learner, collection, metrics, step_started, safe)
            except FloatingPointError as error:
                safe.roll_back(error, noise)
                continue
            metrics |= {"memory": memory_use(env_runner.pool.processes)}
            note_facts(config, safe, learner, time.monotonic() - started)
            state.finish_iteration(metrics)
            if rank == 0:
                log_metrics(config, run_dir, metrics, run, board)
            on_rank_zero(outputs.write, *saved)
            print(summarize(metrics))
            monitor_memory(state.history)
            evaluate_periodically(config, env_runner, acting, step + 1, *evaluated)
            asked = interrupts.take_checkpoint_request()
            if largest(safe.store.is_due(state.step, state.score, asked)):
                save_checkpoint(safe)
            interrupts.check_together()
        after = env_runner.run(acting, evaluation.episodes, evaluation.seed, label="score after")
        seconds = time.monotonic() - started
        results = (config, run_dir, env_runner, (start, acting), (before, after), state.history, seconds)
        on_rank_zero(write_results, *results, outputs)
        finish_wandb(run, {"before": before.outcomes, "after": after.outcomes})
        rollouts.cleanup()
        on_rank_zero(check_machine, before, after, state.history)
        on_rank_zero(outputs.check)
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
    if config.training.use_fsdp and not dist.is_initialized():
        raise ConfigError("training.use_fsdp = true shards the policy over ranks: start it with torchrun")
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
    parser.add_argument("--resume", nargs="?", const="newest", default="", help="the newest run, or a folder")
    return parser.parse_args()


def main() -> None:
    """Read the configuration, check it, train."""
    arguments = parse_arguments()
    rank, _, world_size = setup_distributed()
    tees = setup_run_logging(rank)
    try:
        config = load_config_from_yaml(arguments.config_path, arguments.override)
        validate_config(config)
        with watched_ranks() as watch:
            train(config, rank, world_size, tees, watch, arguments.resume)
    except InputError as error:
        exit_with(error)
    finally:
        cleanup_distributed()


if __name__ == "__main__":
    run_command(main)
