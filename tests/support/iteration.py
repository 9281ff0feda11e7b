"""Stage 13's iteration on collections made up for it: no simulator; in this process, or in each rank of torchrun."""

from __future__ import annotations

import dataclasses
import importlib.util
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

from torch.utils.data import DistributedSampler

from pi0.base.paths import REPO_ROOT
from pi0.libero.suites import Task
from pi0.ranks.collectives import gather, rank_and_world_size
from pi0.ranks.sharding import whole
from pi0.ript.advantages import leave_one_out_advantages
from pi0.ript.config import AlgoConfig, Config, TrainingConfig
from pi0.ript.rollout_generator import Collection, Group, merge_metrics
from pi0.ript.rollout_stats import RolloutStats
from pi0.training.interrupts import Interrupts
from pi0.training.random_state import OwnStream, set_seed
from pi0.training.safeguards import Safeguards
from tests.support.episodes import CAMERAS, TASK, make_episode, states_of

CHECKPOINT = REPO_ROOT / "checkpoints" / "pi0_tiny_libero_spatial"
TASKS = [TASK, Task("libero_spatial", 8, "another", "do another thing", "", "")]
SMALL = AlgoConfig(
    rloo_batch_size=4,
    data_batch_size=4,
    num_epochs=2,
    minibatch_size=4,
    noise_samples=1,
    replay_iterations=2,
    ema_decay=0.9,
)


def load_stage(script: str = "13_train_production_ready.py") -> ModuleType:
    """A stage script as a module."""
    spec = importlib.util.spec_from_file_location(f"stage_{script[:2]}", REPO_ROOT / script)
    stage = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(stage)
    return stage


def collected(number: int) -> Collection:
    """Four rollouts of one task, every other one solved; another collection for each number."""
    episodes = [make_episode(k % 2 == 0, [10, 10, 3 + k], 100 * number + k, index=k) for k in range(4)]
    advantages = leave_one_out_advantages([float(episode.success) for episode in episodes])
    return Collection(groups=[Group(episodes, advantages)], tried=episodes)


class Practice:
    """A run of stage 13 whose rollouts are made up; a second one in the same folder resumes it.

    Args:
        folder: of the run.
        resume: whether it continues from the newest checkpoint there.
        algo: keys of the section `algo`.
        training: keys of the section `training`.
    """

    def __init__(self, folder: Path, resume: bool = False, algo: dict | None = None, **training):
        self.stage = stage = load_stage()
        self.rank, ranks = rank_and_world_size()
        settings = {"num_train_steps": 4, "max_bad_updates": 2, "max_rollbacks": 2, **training}
        self.config = Config(
            policy_path=str(CHECKPOINT),
            device="cpu",
            algo=dataclasses.replace(SMALL, **(algo or {})),
            training=TrainingConfig(**settings),
        )
        set_seed(self.config.training.seed)
        policy = stage.load_policy(self.config)
        looks = SimpleNamespace(cameras=CAMERAS, image_size=64, tasks=TASKS)
        self.learner = stage.make_learner(self.config, policy, looks, self.rank)
        dataset = stage.LiberoInitStateDataset([states_of(task, 4) for task in TASKS])
        shares = DistributedSampler(dataset, ranks, self.rank, shuffle=False)
        self.states = stage.TaskAwareSampler(dataset, shares, 4, RolloutStats(None, 2))
        self.interrupts = Interrupts()
        self.safe = Safeguards.of(folder, self.config.training, self.interrupts)
        self.noise = OwnStream(self.learner.generator, self.config.training.seed)
        stage.add_parts(self.safe.state, self.learner, self.states, self.noise)
        stage.load_checkpoint(self.safe, self.learner, self.safe.find() if resume else None)
        if not resume:
            stage.save_checkpoint(self.safe)

    @property
    def state(self):
        """The run's state."""
        return self.safe.state

    def learn(self) -> dict:
        """What the iteration at hand makes of its collection; raises what `train_iteration` raises."""
        step = self.state.step
        drawn = self.states.smart_sample_group()
        collection = collected(step + 10 * self.rank)
        self.states.record(collection)
        for number, index in enumerate(drawn):  # the last one is solved each time
            self.states.stats.record(self.states.names[index], int(number == len(drawn) - 1), 1)
        part = {**collection.metrics(), "skipped_by_task": self.states.take_skipped()}
        metrics = {"step": step, **merge_metrics(gather(part)), "seconds": 0.0}
        stage, now = self.stage, time.monotonic()
        return stage.train_iteration(self.config, self.learner, collection, metrics, now, self.safe)

    def iterate(self, until: int) -> None:
        """Iterations until so many are done, each with its checkpoint, as `train` makes them."""
        while self.state.step < until:
            try:
                metrics = self.learn()
            except FloatingPointError as error:
                self.safe.roll_back(error, self.noise)
                continue
            self.stage.note_facts(self.config, self.safe, self.learner, 0.0)
            self.state.finish_iteration(metrics)
            if self.safe.store.is_due(self.state.step, self.state.score):
                self.stage.save_checkpoint(self.safe)

    def outcome(self) -> dict:
        """What the run has learned and measured, times left out, and what decides how it continues."""
        timed = ("seconds", "phases", "rollout_seconds")
        rows = [{key: value for key, value in row.items() if key not in timed} for row in self.state.history]
        trained = whole(self.learner.policy.state_dict())
        weights = {name: t.numpy().tobytes() for name, t in trained.items()}
        averaged = {name: t.numpy().tobytes() for name, t in self.learner.average.module.state_dict().items()}
        sampler = self.state.own["sampler"].state_dict()
        del sampler["stats"]["writer"]  # which no two runs share
        noise = self.noise.state_dict().tolist()
        return {"rows": rows, "weights": weights, "averaged": averaged, "sampler": sampler, "noise": noise}
