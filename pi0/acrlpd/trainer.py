"""The trainer: record, learn critics, improve the policy from what is recorded, then practise and learn in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import wandb
from torch.distributed.device_mesh import DeviceMesh

from pi0 import PI0Policy, pick_device
from pi0.acrlpd.acrlpd_data_loader import create_acrlpd_data_loader
from pi0.acrlpd.acrlpd_pi0_agent import (
    ACRLPDPi0Agent,
    Batch,
    Info,
    create_acrlpd_pi0_agent_from_rl_config,
)
from pi0.acrlpd.checkpointing import (
    METADATA,
    check_agent,
    create_checkpoint_metadata,
    name_parts,
    require_loadable,
    save_openpi_pi0_checkpoint,
)
from pi0.acrlpd.config import RLTrainConfig, to_dict
from pi0.acrlpd.critic_networks import ObservationFeatures
from pi0.acrlpd.episodes import RecordedEpisode, ended_at_horizon, shuffled_outcomes
from pi0.acrlpd.films import film_values
from pi0.acrlpd.fsdp_support import (
    create_fsdp_mesh,
    create_fsdp_train_step_fn,
    create_global_optimizers,
    init_fsdp_train_state,
    optimize_fsdp_memory,
)
from pi0.acrlpd.memory_monitor import GPUMemoryMonitor, enable_memory_monitoring, log_memory_usage
from pi0.acrlpd.metrics import METRICS
from pi0.acrlpd.practice import Practice, choose_rollouts, practise
from pi0.acrlpd.pytree_checker import require_sound
from pi0.base.errors import InputError, Outputs
from pi0.base.progress import progress
from pi0.libero.environments import Environments
from pi0.libero.evaluation import EvaluationResult, evaluate, restore_result
from pi0.libero.films import film_before_after
from pi0.libero.outside import compare_outside
from pi0.policy.acting import ActingPolicy
from pi0.policy.critics import BestOfPolicy, save_critic
from pi0.ranks.collectives import broadcast_weights, gather, largest, on_rank_zero, rank_and_world_size
from pi0.report.html_report import write_html_report
from pi0.training.interrupts import Interrupted, Interrupts
from pi0.training.memory import memory_use, release
from pi0.training.metrics import TensorBoard, append_line, finish_wandb, start_wandb
from pi0.training.optimizer import make_schedule
from pi0.training.random_state import OwnStream
from pi0.training.safeguards import Safeguards

RECORDED = -1  # in place of an iteration's number: rollouts before the first one
PORTION = 200  # recorded rollouts after which there is a checkpoint


class ACRLPDTrainer:
    """A run of ACRLPD in its folder; under torchrun, one rank of it.

    Each rank runs its share of the rollouts and keeps their episodes; gradients are averaged over the ranks.

    Attributes:
        policy: the policy in training.
        agent: actor, critics, averages and optimizers.
        loader: the episodes.
        environments: tasks and workers.

    Args:
        config: all settings.
        run_dir: the run's folder.
        interrupts: requests to stop.
    """

    def __init__(self, config: RLTrainConfig, run_dir: Path, interrupts: Interrupts):
        self.config = config
        self.run_dir = run_dir
        self.interrupts = interrupts
        self.outputs = Outputs()
        policy = self.policy = PI0Policy.from_pretrained(
            config.policy_path,
            pick_device(config.device),
            getattr(torch, config.dtype),
            config.norm_stats_path,
        )
        broadcast_weights(policy)  # another host may have another file of that name
        self._rank, _ = rank_and_world_size()
        self.start = ActingPolicy(policy.copy())
        self.agent = create_acrlpd_pi0_agent_from_rl_config(config, policy)
        self._seen: ObservationFeatures = self.agent.features  # type: ignore[assignment]
        self.mesh: DeviceMesh | None = None
        if config.training.gradient_checkpointing:
            optimize_fsdp_memory(policy)
        if config.training.fsdp_size > 1:
            self.setup_fsdp()
        create_global_optimizers(self.agent, config)
        self._train_step = self.create_fsdp_train_step() if self.mesh else self.agent.train_step
        self.loader = create_acrlpd_data_loader(
            config, policy, self._seen.network if self._seen.fixed else None
        )
        assert self.agent.pi0_opt_state is not None
        optimizer = config.training.optimizer
        self._schedule = make_schedule(
            self.agent.pi0_opt_state, optimizer.final_lr_share, config.training.num_train_steps
        )
        self.environments = Environments(config.task, policy.config, interrupts)
        states = (config.data.init_states, config.training.seed)
        self._pools = on_rank_zero(self.environments.training_states, *states)
        self.safe = Safeguards.of(run_dir, config.training, interrupts)
        self.state = self.safe.state
        self._noise = OwnStream(self.agent.generator, config.training.seed)
        self._noise.start(self._rank)
        self._name_parts()
        self._board = TensorBoard(run_dir / "tensorboard")
        self.memory = GPUMemoryMonitor(policy.device)
        self.wandb: wandb.Run | None = None
        self._started = time.monotonic()
        self._scoring = 0.0  # seconds of scores since then

    def setup_fsdp(self) -> None:
        """Shard the actor over the ranks; its optimizer is made afterwards.

        Raises:
            InputError: the ranks cannot be divided so.
        """
        self.mesh = create_fsdp_mesh(self.config.training.fsdp_size, self.policy.device)
        init_fsdp_train_state(self.agent, self.mesh)

    def create_fsdp_train_step(self) -> Callable[[Batch], tuple[ACRLPDPi0Agent, Info]]:
        """The step of all ranks together; `setup_fsdp` and the optimizers come first."""
        assert self.mesh is not None, "setup_fsdp() first"
        return create_fsdp_train_step_fn(self.agent, self.mesh)

    def _name_parts(self) -> None:
        """What a checkpoint holds, checked once as it begins."""
        name_parts(self.state, self.agent, self.loader, self._noise, self._schedule)
        require_sound(check_agent(self.agent), "the agent", "begin with another policy folder")

    # The run -------------------------------------------------------------------------------------

    def train(self, resume: bool = False) -> None:
        """Score, record, learn, score again.

        Raises:
            InputError: something outside the program is wrong; what was learned is in a checkpoint.
        """
        config, state = self.config, self.state
        with self._ends_with_checkpoint():
            self.load_checkpoint(resume)
            self._started = time.monotonic() - state.facts.get("seconds", 0.0)
            self.memory = enable_memory_monitoring(self.agent, self.loader, self.policy.device)
            before = self._score_before()
            if state.step == 0:
                self._record()
            self._score_part(state.step)  # if the run was stopped meanwhile
            while state.step < config.training.num_train_steps:
                try:
                    metrics = self.train_epoch(state.step)
                except FloatingPointError as error:
                    self.safe.roll_back(error, self._noise)
                    continue
                self._finish(metrics)
            self.log_memory_usage("end of training")
            self.save_openpi_checkpoint()
            after = {**self._scores_of_parts(), **self.evaluate("after")}
            on_rank_zero(self._write_results, before, after)
            outcomes = {name.replace(" ", "_"): score.outcomes for name, score in after.items()}
            finish_wandb(self.wandb, {"before": before.outcomes, **outcomes})
        on_rank_zero(self.outputs.check)

    def train_epoch(self, step: int) -> dict[str, Any]:
        """An iteration: rollouts, features and candidates, updates; returns its metrics.

        Raises:
            FloatingPointError: a gradient was not finite, several times in a row.
        """
        training, clock = self.config.training, _Clock()
        release()  # what recording and scores needed; and updates of the critics keep what they free
        metrics: dict[str, Any] = {"step": step}
        if step >= training.offline_iterations:
            practice = self._practise(step, training.rollouts, self.best_policy(), f"practice {step}")
            self._add(practice.episodes, step)
            metrics |= practice.metrics()
        clock.lap("rollouts")
        if step:  # the first episodes of the files are there
            self.loader.refresh_memory_pool()
        self._refresh_candidates()
        clock.lap("caches")
        self.state.begin_update()
        alone = training.critic_updates if step == 0 else 0
        together = 0 if alone else training.updates
        infos: list[Info] = []
        for _ in self._updates("critics", alone, infos):
            infos.append(self.train_step_wrapper(actor=False))
        clock.lap("critic")
        both: list[Info] = []
        for _ in self._updates("update", together, both):
            infos += [self.train_step_wrapper(actor=False) for _ in range(training.critic_updates_each)]
            both.append(self.train_step_wrapper(actor=True))
        clock.lap("update")
        metrics |= means([*infos, *both])
        metrics["lr"] = self._schedule.get_last_lr()[0]
        if both:
            self._schedule.step()
        actor = sum(map(bool, both))  # what is left out says nothing
        metrics |= {"critic_updates": sum(map(bool, infos)) + actor, "actor_updates": actor}
        statistics = self.loader.get_dataset_statistics()
        metrics |= {name: statistics[name] for name in ("episodes", "solved", "windows")}
        metrics |= {
            "phases": clock.phases(),
            "seconds": self._seconds(),
            "rollbacks": self.safe.recovery.rollbacks,
            "memory": memory_use(self.environments.pool.processes),
        }
        return METRICS.merge(gather(metrics))

    @staticmethod
    def _updates(label: str, count: int, infos: list[Info]) -> Iterator[int]:
        """Count updates, with a bar that shows the critics' last loss."""
        if not count:
            return
        with progress(total=count, label=label, unit="update") as bar:
            for number in range(count):
                yield number
                bar.update(1, f"critic loss {infos[-1].get('critic_loss', float('nan')):.4f}")

    def train_step_wrapper(self, actor: bool) -> Info:
        """One step of the agent on a new batch; a gradient that is not finite is left out, and counted.

        Raises:
            FloatingPointError: it was the last of too many in a row, or the critics diverge.
            Interrupted: the run was asked to stop.
        """
        data = self.config.data
        batch = self.loader.sample_batch(data.actor_batch_size if actor else data.batch_size, images=actor)
        try:
            info = self._train_step(batch)[1] if actor else self.agent.critic_step(batch)
        except FloatingPointError:
            self.safe.recovery.count_gradient(False)
            self.safe.recovery.check()
            return {}
        self.safe.recovery.count_gradient(True)
        require_possible(info["value"], self.agent.settings.value_range)
        self.interrupts.check_together()
        return info

    def best_policy(self, samples: int | None = None) -> BestOfPolicy:
        """The averaged actor with the averaged critics; `samples` None means `num_action_samples`."""
        agent = self.agent
        count = agent.num_action_samples if samples is None else samples
        return BestOfPolicy(agent.pi0_ema.policy, agent.critic_ema, self._seen.network, count)

    def evaluate(self, label: str, episodes: int | None = None) -> dict[str, EvaluationResult]:
        """Scores on states that are never trained on: with one sample, and with the best of N.

        Until the actor has learned, one sample's score is that from before.
        """
        scored, evaluation, began = {}, self.config.evaluation, time.monotonic()
        same_actor = self.state.step <= 1 and episodes is None  # the first iteration learns critics alone
        for samples in dict.fromkeys((1, self.agent.num_action_samples)):
            name = f"best of {samples}" if samples > 1 else "one sample"
            if samples == 1 and same_actor and "before" in self.state.facts:
                scored[name] = restore_result(self.environments, self.state.facts["before"])
                continue
            scored[name] = evaluate(
                self.environments,
                self.best_policy(samples),
                episodes or evaluation.episodes,
                evaluation.seed,
                label=f"score {label}, {name}",
            )
            print(f"score {label}, {name}: {scored[name]}")
        self._scoring += time.monotonic() - began
        return scored

    # Parts of it ---------------------------------------------------------------------------------

    def _score_before(self) -> EvaluationResult:
        evaluation, facts = self.config.evaluation, self.state.facts
        if "before" in facts:  # of a run that is resumed
            return restore_result(self.environments, facts["before"])
        began = time.monotonic()
        before = evaluate(
            self.environments, self.start, evaluation.episodes, evaluation.seed, label="score before"
        )
        self._scoring += time.monotonic() - began
        print(f"score before: {before}")
        facts["before"] = before.to_dict()
        return before

    def _seconds(self) -> float:
        """Wall time of the run until now, without scores."""
        return time.monotonic() - self._started - self._scoring

    def _score_part(self, step: int) -> None:
        """Score at the end of a part of the run, if it is configured."""
        training = self.config.training
        part = {training.offline_iterations: "offline", 1: "critics"}.get(step)
        parts = self.state.facts.setdefault("parts", {})
        done = any(name.startswith(f"{part},") for name in parts)
        if not training.score_parts or part is None or step == training.num_train_steps or done:
            return
        seconds = self._seconds()
        for way, scored in self.evaluate(f"of {part}").items():
            parts[f"{part}, {way}"] = {**scored.to_dict(), "seconds": seconds}
        self._note_score(step, scored)

    def _note_score(self, step: int, scored: EvaluationResult) -> None:
        """Keep a score with the best of N for the learning curve, the first one of a step."""
        if all(entry["step"] != step for entry in self.state.evaluations):
            entry = {"step": step, **scored.score(), "protocol": scored.protocol}
            self.state.evaluations.append(entry)

    def _scores_of_parts(self) -> dict[str, EvaluationResult]:
        parts = self.state.facts.get("parts", {})
        return {name: restore_result(self.environments, content) for name, content in parts.items()}

    def _record(self) -> None:
        """The first episodes of the files, then rollouts of the policy as it is; a stopped run goes on after a portion."""
        count, facts = self.config.data.rollouts, self.state.facts
        if "recorded" not in facts:
            self.loader.refresh_memory_pool()
            facts["recorded"] = 0
            self.state.begin()  # a stop before the first portion keeps the pool, too
        while (done := facts["recorded"]) < count:
            upto = min(done + PORTION, count)
            label = f"recording {upto} of {count}"
            self._add(
                self._practise(RECORDED, count, self.start, label, slice(done, upto)).episodes, RECORDED
            )
            facts["recorded"] = upto
            if upto < count:
                self.state.begin()
                self.save_checkpoint()
        self.state.begin()  # the episodes belong to the state before the first iteration
        self.save_checkpoint()
        parts = gather(self.loader.get_dataset_statistics())
        total = {name: sum(part[name] for part in parts) for name in parts[0]}
        print(
            f"in memory: {total['episodes']} episodes, {total['solved']} solved, {total['windows']} windows"
        )
        if count and total["solved"] in (0, total["episodes"]):
            which = "all" if total["solved"] else "none"
            print(f"warning: {which} of the episodes succeeded, so critics have nothing to contrast")

    def _add(self, episodes: list[RecordedEpisode], step: int) -> None:
        """Keep episodes; controls and ablations change how they ended."""
        data = self.config.data
        if data.shuffle_outcomes:
            key = (self.config.training.seed, step + 1, self._rank)
            episodes = shuffled_outcomes(episodes, np.random.default_rng(key))
        if data.horizon_is_failure:
            episodes = [ended_at_horizon(each) for each in episodes]
        self.loader.add(episodes)

    def _refresh_candidates(self) -> None:
        """Draw candidate chunks of the averaged actor for all observations in memory, unless they are of this actor."""
        history = self.state.history
        moved = bool(history) and history[-1]["actor_updates"] > 0
        total, done = self.loader.count_to_refresh(moved), 0
        if not largest(total):
            return
        with progress(total=total, label="candidates", unit="observation") as bar:

            def sample(observations: dict[str, Any]) -> torch.Tensor:
                nonlocal done
                self.interrupts.check()
                drawn = self.agent.sample(observations)
                done += len(observations["state"])
                bar.update(len(observations["state"]))
                return drawn

            with suppress(Interrupted):
                self.loader.refresh_candidates(sample, moved)
        self.interrupts.check_together(abandoned=done < total)

    def _practise(
        self, step: int, count: int, policy: Any, label: str, portion: slice = slice(None)
    ) -> Practice:
        """A portion of the rollouts of a step."""
        config = self.config
        rollouts = choose_rollouts(self.environments, self._pools, count, config.training.seed, step + 1)
        return practise(self.environments, policy, rollouts[portion], config.qchunking.horizon_length, label)

    def _finish(self, metrics: dict[str, Any]) -> None:
        state, config = self.state, self.config
        of_run = {"wandb_run_id": config.logging.wandb_run_id, "config": to_dict(config)}
        state.facts |= {"seconds": metrics["seconds"], **of_run, **self.safe.recovery.facts()}
        state.finish_iteration(metrics)
        if self._rank == 0:
            self.log_training_metrics(metrics)
        step = state.step
        self._score_part(step)
        every = config.training.save_openpi_freq
        if every and step % every == 0 and step < config.training.num_train_steps:
            self.save_openpi_checkpoint()
        if config.training.periodic_episodes and step % config.logging.log_freq == 0:
            scored = self.evaluate(f"after {step} iterations", config.training.periodic_episodes)
            self._note_score(step, list(scored.values())[-1])
        if largest(self.safe.store.is_due(step, state.score, self.interrupts.take_checkpoint_request())):
            self.save_checkpoint()
        self.interrupts.check_together()

    def log_training_metrics(self, metrics: dict[str, Any]) -> None:
        """A line of metrics.jsonl, numbers to TensorBoard and WandB, now and then the report, a line to the console."""
        step, numbers = metrics["step"], METRICS.flatten(metrics)
        try:
            append_line(self.run_dir / "metrics.jsonl", metrics)
            self._board.add(numbers, step)
            if (step + 1) % self.config.logging.log_freq == 0 or step == 0:
                write_html_report(self.run_dir, METRICS)
            if self.wandb is not None:
                self.wandb.log(numbers)
        except (OSError, InputError, wandb.Error) as error:
            print(f"iteration {step}: metrics or report not written: {error}")
        rollouts = metrics.get("rollouts", 0)
        solved = f"{metrics['successes']} of {rollouts} rollouts solved, " if rollouts else ""
        print(
            f"iteration {step}: {solved}{metrics['windows']} windows, critic loss {metrics.get('critic_loss', 0):.4f}, "
            f"value {metrics.get('value', 0):.3f}, {metrics['seconds'] / 60:.1f} minutes"
        )

    def save_checkpoint(self) -> None:
        """Write what the run was after its last iteration; a disk that refuses is reported."""
        step = self.state.step
        self.state.facts[METADATA] = create_checkpoint_metadata(self.agent, self.loader, step, step)
        if problem := self.safe.write():
            print(f"iteration {self.state.step}: {problem}")

    def save_openpi_checkpoint(self) -> None:
        """Write the averaged actor alone as `pi0_openpi_step_N`, for openpi."""
        policy, step = self.agent.pi0_ema.policy, self.state.step
        if policy.config.guidance:
            print("no pi0_openpi_step_N: openpi has no place for the optimality condition of this policy")
            return
        name = f"pi0_openpi_step_{step}"
        self.outputs.write(name, save_openpi_pi0_checkpoint, policy, self.run_dir, step)

    def log_memory_usage(self, label: str) -> None:
        """Print the memory of this rank now."""
        log_memory_usage(label, self.memory)

    def load_checkpoint(self, resume: bool) -> None:
        """Continue from the newest checkpoint; without one, or if it is a new run, begin.

        Raises:
            CheckpointError: the checkpoint is of another agent.
            OutputError: assets, BDDL files or the simulator are not those with which the run began.
        """
        newest, logging = self.safe.find() if resume else None, self.config.logging
        if newest is not None:
            require_loadable(newest, self.agent)
        if newest is not None and logging.wandb_run_id is None:
            logging.wandb_run_id = self.safe.store.facts(newest).get("wandb_run_id")
        self.wandb = start_wandb(logging, self.run_dir, to_dict(self.config)) if self._rank == 0 else None
        logging.wandb_run_id = self.wandb.id if self.wandb else logging.wandb_run_id
        self.safe.begin(newest)
        config, facts = self.config, self.state.facts
        paths = {"policy_path": config.policy_path, "norm_stats_path": config.norm_stats_path}
        paths |= {f"data.datasets {path}": path for path in config.data.datasets}
        facts |= on_rank_zero(compare_outside, self.environments, facts, paths)

    def _write_results(self, before: EvaluationResult, after: dict[str, EvaluationResult]) -> None:
        from pi0.acrlpd.results import write_results

        run_dir, outputs = self.run_dir, self.outputs
        outputs.write("critic", save_critic, run_dir / "critic", self.agent.critic_ema, self._seen.network)
        outputs.write("policy", self.agent.pi0_ema.policy.save_pretrained, run_dir / "policy")
        seconds = self._seconds()
        outputs.write(
            "results.json",
            write_results,
            run_dir,
            to_dict(self.config),
            before,
            after,
            self.state.history,
            seconds,
            {name: part["seconds"] for name, part in self.state.facts["parts"].items()},
        )
        if self.config.features.save_video:
            best, scored = self.best_policy(), list(after.values())[-1]
            films = (run_dir, self.environments)
            outputs.write("values.mp4", film_values, *films, best, scored)
            outputs.write("before_after.mp4", film_before_after, *films, self.start, best, before, scored)
        outputs.write("report.html", write_html_report, run_dir, METRICS)

    @contextmanager
    def _ends_with_checkpoint(self) -> Iterator[None]:
        try:
            yield
        except Interrupted:
            if self.state.can_be_saved and not on_rank_zero(self.safe.store.has, self.state.step):
                self.save_checkpoint()
            print(f"stopped; --resume continues from {self.safe.store.resume_point(self.state.step)}")
        finally:
            self.environments.close()


class _Clock:
    """Seconds of the phases of an iteration."""

    def __init__(self) -> None:
        self._began = self._last = time.monotonic()
        self._phases: dict[str, float] = {}

    def lap(self, phase: str) -> None:
        """What went by since the last call was this phase."""
        now = time.monotonic()
        self._phases[phase] = now - self._last
        self._last = now

    def phases(self) -> dict[str, float]:
        """All of them, with what is left as "other"."""
        total = time.monotonic() - self._began
        return {**self._phases, "other": max(0.0, total - sum(self._phases.values()))}


def require_possible(value: float, value_range: tuple[float, float] | None) -> None:
    """Raise FloatingPointError if a mean value is further beyond what rewards allow than that range is wide."""
    if value_range is None:
        return
    low, high = value_range
    if not low - (high - low) <= value <= high + (high - low):
        raise FloatingPointError(
            f"the critics diverge: their mean value is {value:.3g}, and rewards allow {low:g} to {high:g} "
            "(acrlpd.critic_lr, acrlpd.target_update_rate)"
        )


def means(infos: list[Info]) -> Info:
    """Means of what the steps say of themselves, each over the steps that say it."""
    names = dict.fromkeys(name for info in infos for name in info)
    return {name: float(np.mean([info[name] for info in infos if name in info])) for name in names}
