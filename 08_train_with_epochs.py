"""Stage 08: RIPT with smart sampling, several epochs over one collected batch and gradient accumulation.

A pi0 policy that half-works on LIBERO tasks practises them: each iteration runs rollouts from training
states, scores them by success, and learns from the collected chunks for a few epochs. Settings are in
`AdvancedTrainingConfig` below; edit them there.

    python 08_train_with_epochs.py
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from pi0 import PI0Policy
from pi0.base.errors import run_command
from pi0.base.progress import progress
from pi0.libero.evaluation import EvaluationResult
from pi0.libero.films import film_before_after
from pi0.libero.init_states import InitStatePool
from pi0.policy.acting import ActingPolicy
from pi0.ript.cfg_adapter import PI0_CFG_Adapter, WeightedChunks
from pi0.ript.config import AlgoConfig, Config, EvaluationConfig, TaskConfig, TrainingConfig, to_dict
from pi0.ript.env_runner import LIBEROEnvRunner
from pi0.ript.learner import Learner, acting_policies, load_policy
from pi0.ript.replay import Replay
from pi0.ript.results import check_machine, summarize, write_report
from pi0.ript.rollout_generator import Collection, RolloutGenerator, Start
from pi0.ript.turns import Ring, Streaks, TaskTurns
from pi0.training.ema import AveragedModule
from pi0.training.flow_loss import Augmentation
from pi0.training.optimizer import make_optimizer, make_schedule
from pi0.training.random_state import set_seed
from pi0.training.run_folder import new_run_dir


@dataclass(kw_only=True)
class AdvancedTrainingConfig(Config):
    """Settings of this run; `pi0/ript/config.py` says what each means."""

    policy_path: str = "checkpoints/pi0_tiny_libero_spatial"
    exp_name: str = "08_epochs"
    task: TaskConfig = field(default_factory=lambda: TaskConfig(task_names_to_use=[3, 8], assets="standins"))
    algo: AlgoConfig = field(default_factory=lambda: AlgoConfig(rloo_batch_size=8, data_batch_size=16))
    training: TrainingConfig = field(default_factory=lambda: TrainingConfig(num_train_steps=3))
    evaluation: EvaluationConfig = field(default_factory=lambda: EvaluationConfig(episodes=20))


class InitialStateDataset:
    """Training states of all tasks. A group is K states of one task, in ring order.

    Smart sampling: tasks take turns in proportion to how often they fail, and a state solved on each of its
    last two visits is skipped for a round. Nothing is ever left out for good: a policy can get worse.
    """

    def __init__(self, pools: list[InitStatePool], group_size: int):
        self.pools = pools
        self.group_size = group_size
        self.turns = TaskTurns([pool.task for pool in pools])
        self.rings = [Ring((pool.task, index) for index in range(len(pool))) for pool in pools]
        self.streaks = Streaks(threshold=2)
        self.skipped = 0

    def smart_sample_group(self) -> list[Start]:
        """The next K starts."""
        task = self.turns.next_task()
        states, skipped = self.rings[task].sample_unsolved(self.group_size, self.streaks.skip)
        self.skipped += skipped
        return [(self.pools[task], index) for _, index in states]

    def take_skipped(self) -> int:
        """How many states were skipped since the last call."""
        skipped, self.skipped = self.skipped, 0
        return skipped

    def record(self, collection: Collection) -> None:
        """Remember what the policy solved."""
        self.turns.record(collection.tried)
        self.streaks.record_episodes(collection.tried)


def make_states(config: Config, env_runner: LIBEROEnvRunner) -> InitialStateDataset:
    """The states that are practised."""
    algo = config.algo
    pools = env_runner.training_states(algo.train_init_states, config.training.seed)
    return InitialStateDataset(pools, algo.rloo_batch_size)


def make_rollout_generator(
    config: Config, env_runner: LIBEROEnvRunner, states: InitialStateDataset
) -> RolloutGenerator:
    """What collects the groups of an iteration, as configured."""
    algo = config.algo
    return RolloutGenerator(
        env_runner,
        init_state_dataloader=iter(states.smart_sample_group, None),
        rollouts_per_env=algo.rloo_batch_size,
        num_groups=algo.data_batch_size // algo.rloo_batch_size,
        max_groups=algo.max_sampling_attempts,
        seed=config.training.seed,
        shuffle_advantages=algo.shuffle_advantages,
    )


def make_learner(config: Config, policy: PI0Policy, env_runner: LIBEROEnvRunner) -> Learner:
    """The policy's loss, optimizer, schedule and averaged weights, as configured."""
    algo, training = config.algo, config.training
    average = AveragedModule(policy, policy.copy().eval(), algo.ema_decay)
    adapter = PI0_CFG_Adapter(
        policy,
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
    generator = torch.Generator().manual_seed(training.seed)
    return Learner(adapter, optimizer, schedule, average, Replay(algo.replay_iterations, nothing), generator)


def update_policy(config: Config, learner: Learner, batch: WeightedChunks) -> dict[str, float]:
    """Several epochs over the collected chunks, `gradient_accumulation_steps` minibatches an optimizer step."""
    algo, adapter, policy = config.algo, learner.adapter, learner.policy
    policy.train()
    losses, norms, accumulated = [], [], 0
    parts = adapter.count_minibatches(batch, algo.minibatch_size)
    passes = algo.num_epochs * parts
    with progress(total=passes, label="update", unit="minibatch") as bar:
        for _ in range(algo.num_epochs):
            for minibatch in adapter.minibatches(batch, parts, learner.generator):
                accumulated += 1
                complete = accumulated == algo.gradient_accumulation_steps or len(losses) + 1 == passes
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
    counts = {"updates": len(norms), **adapter.ratio_metrics()}
    return {"loss": float(np.mean(losses)), "grad_norm": float(np.mean(norms)), **counts}


def train_iteration(config: Config, learner: Learner, collection: Collection, metrics: dict) -> dict:
    """Learn from what was collected; returns the iteration's metrics, those of the rollouts included."""
    learner.take_in(collection)
    batch = learner.replay.batch()
    if len(batch):
        metrics |= update_policy(config, learner, batch)
        learner.schedule.step()
    return metrics


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
    write_report(run_dir, to_dict(config), *scores, history, seconds)
    if config.features.save_video:
        film_before_after(run_dir, env_runner, *policies, *scores)


def train(config: Config) -> Path:
    """Score, practise, score again; returns the folder with everything that was written."""
    set_seed(config.training.seed)
    policy = load_policy(config)
    run_dir = new_run_dir(config.output_dir, config.exp_name, to_dict(config))
    started = time.monotonic()
    with LIBEROEnvRunner(config.task, policy.config) as env_runner:
        print(f"training started: {len(env_runner.tasks)} tasks, writing to {run_dir}")
        states = make_states(config, env_runner)
        rollouts = make_rollout_generator(config, env_runner, states)
        start = ActingPolicy(policy.copy())
        learner = make_learner(config, policy, env_runner)
        acting, practising = acting_policies(config, learner)
        evaluation = config.evaluation
        before = env_runner.run(start, evaluation.episodes, evaluation.seed, label="score before")
        history = []
        for step in range(config.training.num_train_steps):
            collection = rollouts.generate_rollouts(practising(step), step)
            states.record(collection)
            collected = {**collection.metrics(), "skipped_states": states.take_skipped()}
            metrics = {"step": step, **collected, "seconds": time.monotonic() - started}
            metrics = train_iteration(config, learner, collection, metrics)
            history.append(metrics)
            learner.average.module.save_pretrained(run_dir / "policy")
            print(summarize(metrics))
        after = env_runner.run(acting, evaluation.episodes, evaluation.seed, label="score after")
        seconds = time.monotonic() - started
        write_results(config, run_dir, env_runner, (start, acting), (before, after), history, seconds)
        check_machine(before, after, history)
    return run_dir


def main() -> None:
    """Train with the settings above."""
    train(AdvancedTrainingConfig())


if __name__ == "__main__":
    run_command(main)
