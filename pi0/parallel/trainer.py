"""The trainer: workers collect slices, the agent learns from them, checkpoints hold both, to the bit."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import wandb
import yaml

from pi0.base.errors import InputError, Outputs
from pi0.base.progress import Bar, progress
from pi0.parallel import config as configuration
from pi0.parallel import worker
from pi0.parallel.actor import NEWEST, Filled
from pi0.parallel.batches import explained_variance, make_batch
from pi0.parallel.collected import Progress
from pi0.parallel.collector import Collector, SerialCollector, SliceError
from pi0.parallel.config import Config, make_config, to_dict
from pi0.parallel.games import GameSpec, parse_options
from pi0.parallel.machine_load import WARN_MEMORY, CpuMeter, choose_workers, memory_percent, require_memory
from pi0.parallel.metrics import METRICS
from pi0.parallel.network import ActorCritic, default_precision
from pi0.parallel.ppo import PPOAgent, PPOSettings
from pi0.parallel.records import of_progress, of_slices, speeds
from pi0.parallel.results import write_results
from pi0.parallel.scorer import Scorer
from pi0.parallel.shares import priorities
from pi0.parallel.slices import Layout
from pi0.report.html_report import write_html_report
from pi0.training.fingerprints import compare
from pi0.training.interrupts import Interrupted, Interrupts
from pi0.training.memory import RELEASE_EVERY, memory_use, release
from pi0.training.metrics import TensorBoard, append_line, finish_wandb, start_wandb
from pi0.training.random_state import OwnStream, set_seed
from pi0.training.run_folder import new_run_dir, run_to_resume, take_run
from pi0.training.safeguards import Safeguards
from pi0.training.state import States, Weights
from pi0.workers.pool import usable_cores
from pi0.workers.process import WorkerError

BUFFERS = {"sync": 1, "overlap": 2, "async": 3}  # slices of a worker that there is room for
NICE = 15  # a trainer beside eight workers on two cores then has most of a core
PATIENCE_S = 10.0  # how long an update may go on after a request to stop


@dataclass
class _Safety:
    """The settings of checkpoints as `Safeguards` calls them."""

    num_train_steps: int
    save_freq: int
    keep_checkpoints: int
    max_bad_updates: int
    max_rollbacks: int
    save_best: bool = True


class ParallelTrainer:
    """Trains a policy for a game with N worker processes.

    Attributes:
        config: all settings.
        run_dir: folder of the run; None before `train`.
        agent: network and optimizer; None before `train`.

    Args:
        game: name of a game (`pi0.parallel.config.Config.game`).
        n_workers: number of workers.
        render: write videos.
        save_interval: updates from one checkpoint to the next.
        max_checkpoints: newest checkpoints that stay, beside the best.
        resume: folder of a run to continue, or "newest"; empty: a new run.
        settings: other keys of `Config`.
    """

    worker_process = staticmethod(worker.worker_process)

    def __init__(
        self,
        game: str = configuration.DEFAULT_GAME,
        n_workers: int = 8,
        render: bool = False,
        save_interval: int = 10,
        max_checkpoints: int = 100,
        *,
        resume: str = "",
        **settings: Any,
    ):
        self.config = make_config(
            game=game,
            n_workers=n_workers,
            render=render,
            save_interval=save_interval,
            max_checkpoints=max_checkpoints,
            **settings,
        )
        self.run_dir: Path | None = None
        self.agent: PPOAgent | None = None
        self._resume = resume
        self._run: _Run | None = None

    @classmethod
    def of(cls, config: Config, resume: str = "") -> ParallelTrainer:
        """A trainer with a whole configuration."""
        trainer = cls(resume=resume)
        trainer.config = config
        return trainer

    @property
    def processes(self) -> list[int]:
        """Process ids of the workers; none while it does not train."""
        return self._run.collector.processes if self._run else []

    def train(
        self,
        max_episodes: int | None = None,
        max_steps: int | None = None,
        update_interval: int | None = None,
    ) -> Path:
        """Train until so many episodes, or `max_updates` updates, are done; returns the run's folder.

        Args:
            max_episodes: episodes of all workers; None for the configuration's, 1000.
            max_steps: steps after which an episode is truncated; None: the configuration's, 10000.
            update_interval: transitions of an update; None: the configuration's, 2048.

        Raises:
            InputError: something outside the program is wrong; what was learned is in a checkpoint.
        """
        given = {"max_episodes": max_episodes, "max_steps": max_steps, "update_interval": update_interval}
        changes = {name: value for name, value in given.items() if value is not None}
        config = self.config = make_config(**{**vars(self.config), **changes})
        interrupts = Interrupts()
        interrupts.install()
        chosen_before = bool(self._resume) and config.workers == "auto"  # the run that is resumed has chosen
        config = self.config = config if chosen_before else _resolve_workers(config)
        spec = GameSpec(
            config.game, config.state, config.skip, parse_options(config.game_options), config.image
        )
        parts = worker.action_parts(spec)
        set_seed(config.seed)
        place = (config.output_dir, config.exp_name, to_dict(config))
        if self._resume:
            ours = dict if not chosen_before else lambda settings: {**settings, "n_workers": None}
            fixed = configuration.fixed()
            self.run_dir = run_to_resume(self._resume, *place, fixed, ours, "start a new run")
            if chosen_before:
                earlier = yaml.safe_load((self.run_dir / "config.yaml").read_text())
                config = self.config = _resolve_workers(
                    replace(config, n_workers=earlier["n_workers"], workers="each")
                )
        else:
            self.run_dir = new_run_dir(*place)
        lock = take_run(self.run_dir, to_dict(config))
        print(f"training started: {config.n_workers} workers play {config.game}, writing to {self.run_dir}")
        try:
            with _Run(config, self.run_dir, spec, parts, interrupts) as run:
                self.agent, self._run = run.agent, run
                run.train(resume=bool(self._resume))
        finally:
            self._run = None
            os.close(lock)
        return self.run_dir


class _Run:
    """One call of `ParallelTrainer.train`."""

    def __init__(
        self, config: Config, run_dir: Path, game: GameSpec, parts: tuple[int, ...], interrupts: Interrupts
    ):
        self.config = config
        self.run_dir = run_dir
        self.interrupts = interrupts
        self.outputs = Outputs()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        auto = config.precision == "auto"
        precision = default_precision(self.device) if auto else getattr(torch, config.precision)
        actions = math.prod(parts)
        network = ActorCritic(parts if config.factored else (actions,), precision).to(self.device)
        generator = torch.Generator().manual_seed(config.seed)
        coefficients = {name: getattr(config, name) for name in PPOSettings.__dataclass_fields__}
        self.agent = PPOAgent(network, PPOSettings(**coefficients), config.lr, generator)
        layout = Layout(config.n_workers, BUFFERS[config.mode], _longest_slice(config), actions)
        self.spec = worker.PlayerSpec(game, layout, config.max_steps, config.noop_max, _niceness(config))
        make = SerialCollector if config.workers == "0" else Collector
        self.collector = make(
            self.spec, deadline_s=config.deadline_s, memory_mb=config.worker_memory_mb, check=interrupts.check
        )
        safety = _Safety(
            config.max_updates or 0,
            config.save_interval,
            config.max_checkpoints,
            config.max_bad_updates,
            config.max_rollbacks,
        )
        self.safe = Safeguards.of(run_dir, safety, interrupts)
        self.state = self.safe.state
        self.state.scored_by = "mean_score"
        self.progress = Progress(config.n_workers)
        self.noise = OwnStream(generator, config.seed)
        self.state.shared = {
            "policy": Weights(network, "resume with the same game"),
            "optimizer": States(optimizer=self.agent.optimizer),
        }
        self.scorer = Scorer(self.spec, config, interrupts.check)
        self.state.own = {"progress": self.progress, "generator": self.noise, "scores": self.scorer}
        self.board = TensorBoard(run_dir / "tensorboard")
        self.wandb: wandb.Run | None = None
        self.cpu = CpuMeter()
        self.started = time.monotonic()
        self.pending: list[Filled] = []
        self._respawns_told = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.collector.close()
        self.scorer.close()

    def train(self, resume: bool) -> None:
        """Score, train, score again."""
        config = self.config
        newest = self.safe.find() if resume else None
        if newest is not None and config.logging.wandb_run_id is None:
            config.logging.wandb_run_id = self.safe.store.facts(newest).get("wandb_run_id")
        self.wandb = start_wandb(config.logging, self.run_dir, to_dict(config))
        config.logging.wandb_run_id = self.wandb.id if self.wandb else config.logging.wandb_run_id
        self.collector.begin(config.seed, self.progress.generations)
        self.progress.states = list(self.collector.states)
        self.safe.begin(newest)
        packages, facts = self.spec.game.packages(), self.state.facts
        compare(facts.get("outside", {}), packages, packages)
        facts["outside"] = packages
        if newest is not None:
            self.collector.resume(self.progress.states, self.progress.numbers)
        self._publish_both()
        with self._ends_with_checkpoint():
            if "before" not in self.state.facts:
                self._score("before")
            if self.state.step == 0:
                self._save()
            if not config.evaluation_interval:
                self.scorer.close()  # not needed before the end
            self.cpu = CpuMeter()
            self.started = time.monotonic() - self.state.facts.get("seconds", 0.0)
            torch.set_num_threads(config.threads or _threads(config))
            if not self._finished():
                with self._bar() as bar:
                    (self._train_async if config.mode == "async" else self._train_in_turns)(bar)
            self._score("after")
            facts, run_dir = self.state.facts, self.run_dir
            self.outputs.write(
                "results.json", write_results, run_dir, config, facts, self.scorer.during, self.state.history
            )
            if config.render:
                self.outputs.write("videos", self.scorer.film, run_dir, self.progress.best, facts)
            self.outputs.write("report.html", write_html_report, self.run_dir, METRICS)
        finish_wandb(self.wandb, {})
        self.outputs.check()

    def _score(self, when: str) -> None:
        """Score the policy `before` or `after` training."""
        scores = self.state.facts[when] = self.scorer.score(self.agent.network.flat(), when)
        numbers = {f"scores/{when}/{how}": float(np.mean(of_way["scores"])) for how, of_way in scores.items()}
        try:
            self.board.add(numbers, self.state.step)
            if self.wandb is not None:
                self.wandb.summary.update(numbers)
        except (OSError, InputError, wandb.Error) as error:
            print(f"scores {when} training are not logged: {error}")

    def _train_in_turns(self, bar: Bar) -> None:
        """`sync` and `overlap`: every update learns from one slice of each worker."""
        overlap = self.config.mode == "overlap"
        self._ask_all(self.state.step)
        while True:
            began, step = time.monotonic(), self.state.step
            share_left = self._share_left()
            filled = self._collect_all()
            waited = time.monotonic() - began
            last = self._finished(step + 1)
            behaviour = self.agent.network.flat() if overlap else None
            if overlap and not last:
                self._ask_all(step + 1)
            metrics = self._learn(filled, share_left, waited, began)
            if metrics is None:  # the run has returned to a checkpoint
                self._ask_all(self.state.step)
                continue
            self.progress.behaviour = behaviour
            self.collector.publish(self.agent.network.flat(), step + 1)
            self._finish_update(metrics, bar)
            if last:
                return
            if not overlap:
                self._ask_all(step + 1)

    def _train_async(self, bar: Bar) -> None:
        """`async`: an update whenever enough transitions are there; workers go on meanwhile."""
        config = self.config
        free = {number: list(range(BUFFERS["async"])) for number in range(config.n_workers)}

        def ask(number: int) -> None:
            if free[number]:
                self.collector.ask(
                    number, free[number].pop(0), self.spec.layout.steps, NEWEST, self._exploration(number)
                )

        def take(filled: Filled) -> None:
            self.progress.take(filled)
            self.progress.states[filled.worker] = filled.state
            self.progress.numbers[filled.worker] += 1
            self.pending.append(filled)
            ask(filled.worker)

        def refill(slices: list[Filled]) -> None:
            for filled in slices:
                free[filled.worker].append(filled.buffer)
            for number in sorted({filled.worker for filled in slices} - self.collector.workers_asked):
                ask(number)

        def drop_old() -> None:
            oldest = self.state.step - config.max_policy_lag
            old = [filled for filled in self.pending if filled.version < oldest]
            self.pending = [filled for filled in self.pending if filled.version >= oldest]
            self.progress.dropped += len(old)
            refill(old)

        def take_what_is_there() -> None:
            while (filled := self.collector.next_filled(0.0)) is not None:
                take(filled)

        for number in free:
            ask(number)
        while not self._finished():
            began, share_left = time.monotonic(), self._share_left()
            drop_old()
            while sum(filled.steps for filled in self.pending) < config.min_batch_size:
                arrived = self.collector.next_filled()
                assert arrived is not None, "a worker that fills no slice has filled the batch"
                take(arrived)
                drop_old()
            waited = time.monotonic() - began
            learned, self.pending = self.pending, []
            metrics = self._learn(learned, share_left, waited, began, take_what_is_there)
            if metrics is None:  # the run has returned to a checkpoint, and nothing is collected
                free.update((number, list(range(BUFFERS["async"]))) for number in free)
                for number in free:
                    ask(number)
                continue
            refill(learned)
            self.collector.publish(self.agent.network.flat(), self.state.step + 1)
            self._finish_update(metrics, bar)

    def _ask_all(self, update: int) -> None:
        """Ask for the slices of an update, with the newest weights that workers may use then."""
        config = self.config
        version = update if config.mode == "sync" else max(0, update - 1)
        buffer = update % BUFFERS[config.mode]
        for number, steps in self._lengths(update).items():
            self.collector.ask(number, buffer, steps, version, self._exploration(number))

    def _lengths(self, update: int) -> dict[int, int]:
        """Steps of each worker that collects for an update; they depend only on what is counted in `Progress`."""
        config = self.config
        schedule = config.workers_schedule or [config.n_workers]
        part = int(self._done(update) * len(schedule) + 1e-9)  # k / n times n may be a little less than k
        workers = schedule[min(len(schedule) - 1, part)]
        shares = np.ones(workers)
        if config.priority:
            shares = priorities(self.progress.scores, workers)
        ends = np.round(np.cumsum(shares) * config.update_interval / workers).astype(int)
        return {number: int(steps) for number, steps in enumerate(np.diff(ends, prepend=0))}

    def _exploration(self, number: int) -> float:
        shares = self.config.exploration
        if not shares:
            return 0.0
        return shares[0] if number < self.config.n_workers / 2 else shares[-1]

    def _collect_all(self) -> list[Filled]:
        found = {}
        while (filled := self.collector.next_filled()) is not None:
            found[filled.worker] = filled
        in_order = [found[number] for number in sorted(found)]  # not in that of arrival
        for filled in in_order:
            self.progress.take(filled)
        self.progress.states = list(self.collector.states)
        self.progress.numbers = list(self.collector.numbers)
        return in_order

    def _publish_both(self) -> None:
        """The weights of the next update, and those with which its slices are collected."""
        step = self.state.step
        # After a return to a checkpoint there are newer ones, which are of no use.
        self.collector.arrays["versions"][:] = -1
        if self.progress.behaviour is not None:
            self.collector.publish(self.progress.behaviour, step - 1)
        self.collector.publish(self.agent.network.flat(), step)

    def _learn(
        self,
        slices: Sequence[Filled],
        share_left: float,
        waited: float,
        began: float,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> dict[str, Any] | None:
        """An update; returns its metrics, or None if it failed and the run has returned to a checkpoint."""
        config, step, progress_ = self.config, self.state.step, self.progress
        noticed: list[float] = []

        def between(finite: bool) -> None:
            self.safe.recovery.count_gradient(finite)
            self.safe.recovery.check()
            if not self.interrupts.stop_asked:
                meanwhile()
                return
            noticed.append(time.monotonic())
            if noticed[-1] - noticed[0] > PATIENCE_S:
                raise Interrupted

        before = time.monotonic()
        batch = make_batch(slices, self.spec.layout, self.collector.arrays, self.agent, config)
        prepared = time.monotonic()
        self.state.begin_update()
        try:
            learned = self.agent.update(batch, share_left, between)
            if not all(bool(torch.isfinite(weight).all()) for weight in self.agent.network.parameters()):
                raise FloatingPointError("the weights are not finite")
        except FloatingPointError as error:
            self.collector.drop()
            self.pending = []
            self.safe.roll_back(error, self.noise)
            self.collector.resume(progress_.states, progress_.numbers)
            self._publish_both()
            return None
        updated = time.monotonic()
        phases = {"wait": waited, "batch": prepared - before, "update": updated - prepared}
        phases["other"] = max(0.0, updated - began - sum(phases.values()))
        return {
            "step": step,
            "seconds": updated - self.started,
            **of_slices(slices, config.n_workers, step),
            **of_progress(progress_),
            **learned,
            "explained_variance": explained_variance(batch),
            "lr": config.lr * share_left,
            "phases": phases,
        }

    def _finish_update(self, metrics: dict[str, Any], bar: Bar) -> None:
        config, history = self.config, self.state.history
        if self.state.step % RELEASE_EVERY == 0:
            release()
        metrics |= speeds(metrics, history[-1] if history else None, config.skip)
        metrics["cpu_percent"] = self.cpu.percent()
        metrics["memory_percent"] = memory_percent()
        metrics["memory"] = memory_use(self.collector.processes)
        metrics["respawns"] = self.collector.respawns[self._respawns_told :]
        self._respawns_told = len(self.collector.respawns)
        metrics["rollbacks"] = self.safe.recovery.rollbacks
        metrics["evaluation"] = self._evaluation()
        of_run = {"wandb_run_id": config.logging.wandb_run_id, "config": to_dict(config)}
        self.state.facts |= {**of_run, "seconds": metrics["seconds"], **self.safe.recovery.facts()}
        step = self.state.step + 1
        score = self.progress.score
        if score is not None and (step % config.save_interval == 0 or self._finished(step)):
            self.state.evaluations.append({"step": step, "mean_score": score, "n": len(self.progress.scores)})
        self.state.finish_iteration(metrics)
        self._log(metrics, bar)
        asked = self.interrupts.take_checkpoint_request()
        if self.safe.store.is_due(step, self.state.score, asked) or self._finished(step):
            self._save()
        if self.interrupts.stop_asked:
            raise Interrupted

    def _evaluation(self) -> dict[str, float] | None:
        """Begin what is due after this update; return what has come since the last one, each score once."""
        every, step = self.config.evaluation_interval, self.state.step + 1
        if not every or not self.config.evaluation_episodes:
            return None
        due = step % every == 0 and not self._finished(step)
        found = self.scorer.finish(math.inf if due else 0.0)  # the next one must not pass it
        if due:
            self.scorer.begin(step, self.agent.network.flat())
        return found and {name: float(np.mean(value)) for name, value in found.items()}

    def _log(self, metrics: dict[str, Any], bar: Bar) -> None:
        config, step, numbers = self.config, metrics["step"], METRICS.flatten(metrics)
        try:
            append_line(self.run_dir / "metrics.jsonl", metrics)
            self.board.add(numbers, step)
            if (step + 1) % (10 * config.logging.log_freq) == 0 or step == 0:
                write_html_report(self.run_dir, METRICS)
            if self.wandb is not None:
                self.wandb.log(numbers)
        except (OSError, InputError, wandb.Error) as error:
            print(f"update {step}: metrics or report not written: {error}")
        score = "none ended yet" if metrics["recent_score"] is None else f"{metrics['recent_score']:.1f}"
        state = (
            f"score {score}, {metrics['steps_per_s']:.0f} steps/s, {metrics['episodes_per_hour']:.0f} episodes/h, "
            f"CPU {metrics['cpu_percent']:.0f}%, lag {metrics['lag']}"
        )
        done = 1 if config.max_updates else metrics["finished"]
        bar.update(done, state)
        if (step + 1) % config.logging.log_freq == 0 or metrics["respawns"]:
            print(f"update {step}: {state}")
        for line in metrics["respawns"]:
            print(f"replaced: {line}")
        if metrics["memory_percent"] > WARN_MEMORY and (step + 1) % config.logging.log_freq == 0:
            print(f"memory is {metrics['memory_percent']:.0f}% full; fewer workers need less (--n_workers)")

    def _save(self) -> None:
        if self.safe.recovery.bad_in_a_row:
            print(f"no checkpoint of update {self.state.step}: the last gradient was not finite")
        elif problem := self.safe.write():
            print(f"update {self.state.step}: {problem}")

    @contextmanager
    def _ends_with_checkpoint(self) -> Iterator[None]:
        try:
            yield
        except (Interrupted, SliceError, WorkerError) as reason:
            if self.state.can_be_saved and not self.safe.store.has(self.state.step):
                self._save()
            print(f"stopped; --resume continues from {self.safe.store.resume_point(self.state.step)}")
            if not isinstance(reason, Interrupted):
                raise

    def _done(self, update: int | None = None) -> float:
        """Share of training that is done before an update (the next one); above 1 if more than planned is done."""
        config = self.config
        done = self.progress.episodes / config.max_episodes
        if config.max_updates:
            done = max(done, (self.state.step if update is None else update) / config.max_updates)
        return done

    def _share_left(self) -> float:
        """Share of training that is left before the next update."""
        return max(0.0, 1 - self._done())

    def _finished(self, step: int | None = None) -> bool:
        return self._done(step) >= 1

    @contextmanager
    def _bar(self) -> Iterator[Bar]:
        config = self.config
        if config.max_updates:
            total, done, unit = config.max_updates, self.state.step, "update"
        else:
            total, done, unit = config.max_episodes, self.progress.episodes, "episode"
        with progress(total, "training", unit, initial=done) as bar:
            yield bar


def _longest_slice(config: Config) -> int:
    if config.mode == "async":
        return max(1, config.min_batch_size // config.n_workers)
    fewest = min([config.n_workers, *config.workers_schedule])
    longest = -(-config.update_interval // fewest)
    return 2 * longest + 1 if config.priority else longest


def _threads(config: Config) -> int:
    """Torch threads of an update: where workers work at the same time, the cores that they leave."""
    cores = usable_cores()
    return cores if config.mode == "sync" else max(1, cores - config.n_workers)


def _niceness(config: Config) -> int:
    """By how much the workers' priority is lowered."""
    if config.nice is not None or config.workers == "0":
        return config.nice or 0
    return NICE if config.mode != "sync" and usable_cores() <= config.n_workers else 0


def _resolve_workers(config: Config) -> Config:
    """The configuration with the number of workers that `workers` stands for; checks that there is memory for them."""
    if config.workers == "auto":
        config = replace(config, n_workers=choose_workers(), workers="each")
    elif config.workers not in ("each", "0"):
        config = replace(config, n_workers=int(config.workers), workers="each")
    require_memory(0 if config.workers == "0" else config.n_workers)
    return make_config(**vars(config))
