"""The configuration schema of all stages, its profiles, and the conditions between its keys.

A key is one field below: its type, its default and, in `key(...)`, its meaning, unit and range, the first
stage that reads it (`since`; without it, all stages do), and whether a resumed run must keep its value
(`fixed`). The fixed keys decide optimizer and schedule, what is practised, and which scores are compared.
Values come from the defaults here, the profile, the YAML file and the command line's overrides; later ones win.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, Literal

from pi0.base import typed_yaml
from pi0.base.typed_yaml import ConfigError, KeyDescription, key, section, show
from pi0.data import Contradiction
from pi0.libero.settings import MAX_SEED, RECORDED_STATES, ScoreConfig, TaskConfig, task_conflicts
from pi0.training.run_folder import name_problem
from pi0.training.settings import (
    FeaturesConfig,
    LoggingConfig,
    OptimizerConfig,
    check_config,
    read_config,
)

__all__ = [
    "Config",
    "ConfigError",
    "check_evaluation",
    "describe_keys",
    "help_text",
    "load_config",
    "to_dict",
    "validate",
]

STAGE = "stage {:02d}"  # name of a version of this program


@dataclass(kw_only=True)
class AlgoConfig:
    """RIPT, reinforcement interactive post-training: collecting, learning, co-training."""

    mode: Literal["weighted", "guidance", "ratio"] = key(
        "weighted",
        "advantage-weighted flow loss; classifier-free guidance by an optimality condition; policy gradient by clipped "
        "ratios, with noise in the flow's steps",
        fixed=True,
    )
    rloo_batch_size: int = key(8, "rollouts whose scores are compared (a group)", unit="rollouts", low=2)
    group_by: Literal["state", "batch"] = key(
        "state",
        "a group is rollouts of one initial state, or one rollout of each of several states of a task",
        since=12,
        before="batch",
    )
    data_batch_size: int = key(
        64, "rollouts collected in an iteration, on each rank that practises", unit="rollouts", low=2
    )
    enable_dynamic_sampling: bool = key(
        True,
        "replace groups that all succeed or all fail, which teach nothing, by others",
        since=12,
        before=False,
    )
    enable_rollout_stats_tracking: bool = key(
        True, "keep the success history of initial states in a file", since=12, before=False
    )
    rollout_skip_threshold: int = key(
        2,
        "a state that was solved on so many visits in a row is skipped for a round",
        unit="visits",
        low=1,
        since=12,
        before=2,
    )
    rollout_stats_path: str | None = key(
        None,
        "statistics file, which ranks and runs may share; null: rollout_stats.json in the run's folder",
        since=12,
        path=True,
    )
    use_val_init: bool = key(
        False,
        "periodic evaluation starts from drawn validation states, not from LIBERO's recorded ones",
        since=12,
    )
    shuffle_advantages: bool = key(
        False, "control: shuffle advantages inside each group, so that reward teaches nothing"
    )
    max_sampling_attempts: int = key(
        16, "most groups tried in an iteration; then it continues with those it has", unit="groups", low=1
    )
    train_init_states: int = key(
        100, "training initial states of each task", unit="states", low=1, fixed=True
    )
    replay_iterations: int = key(
        4, "iterations whose rollouts the policy learns from, with the current one", unit="iterations", low=1
    )
    num_epochs: int = key(2, "passes over the collected chunks in an iteration", unit="epochs", low=1)
    minibatch_size: int = key(64, "action chunks in a forward pass", unit="chunks", low=1)
    gradient_accumulation_steps: int = key(1, "minibatches in an optimizer step", unit="minibatches", low=1)
    noise_samples: int = key(
        4,
        "draws of noise and time for a chunk's flow loss; in mode: ratio, so many of its steps",
        unit="draws",
        low=1,
    )
    lr: float = key(1e-4, "learning rate", above=0, fixed=True)
    grad_norm_clip: float = key(1.0, "largest gradient norm; longer gradients are shortened to it", above=0)
    negative_weight: float = key(
        0.0,
        "factor of negative advantages; 0: learn only from success; above 0 for mode: guidance; mode: ratio takes all "
        "advantages as they are",
        low=0,
        high=1,
    )
    ema_decay: float = key(
        0.99,
        "decay in an optimizer step of the averaged weights, which are evaluated and saved; 0: no average",
        low=0,
        high=1,
    )
    cotraining_path: str | None = key(
        None,
        "data set of demonstrations (LeRobot or LIBERO's HDF5) for co-training; null: none",
        since=13,
        path=True,
    )
    cotraining_gripper: Literal["close-is-1", "open-is-1"] | None = key(
        None,
        "what 1 means for the gripper in it; null: close, and the data set must have actions that open it",
        since=13,
    )
    cotraining_features: list[str] = key(
        [],
        "names of state, actions and each camera in a LeRobot data set, NAME=FEATURE each; none: its own names tell",
        since=13,
    )
    cotraining_accept: list[Contradiction] = key(
        [],
        "what may contradict LIBERO's robot in it: frames a second (fps), robot, names of features; failures: learn "
        "episodes without reward or success, too",
        since=13,
    )
    cotraining_chunks: int = key(
        256, "co-training chunks drawn in an iteration, on each rank", unit="chunks", low=1, since=13
    )
    cotraining_weight: float = key(
        0.5, "weight of each such chunk in the loss, as an advantage", above=0, since=13
    )
    condition_dropout: float = key(
        0.1, "share of chunks that train the unconditional flow (mode: guidance)", low=0, high=1
    )
    guidance_weight: float = key(
        1.0, "w in v_null + w (v_positive - v_null) when the policy acts (mode: guidance)", low=0
    )
    noise_level: float = key(
        0.5,
        "noise of the flow's steps in practice (mode: ratio); scores are without",
        above=0,
        high=1,
        fixed=True,
    )
    ratio_clip: float = key(
        0.2, "a ratio counts from 1 less this to 1 and this (mode: ratio)", above=0, high=1
    )
    critic_path: str | None = key(
        None,
        "critic folder of pi0.acrlpd, which chooses among the chunks in practice; scores are without it; null: none",
        fixed=True,
        path=True,
    )
    num_action_samples: int = key(8, "chunks among which it chooses", unit="chunks", low=1)
    critic_iterations: int | None = key(
        4, "first iterations in which it chooses; null: all", unit="iterations", low=1
    )


@dataclass(kw_only=True)
class TrainingConfig:
    """Length and reproducibility of a run."""

    num_train_steps: int = key(6, "iterations: collect, then update", unit="iterations", low=0, fixed=True)
    seed: int = key(0, "seed of all random numbers", low=0, high=MAX_SEED - 1, fixed=True)
    save_freq: int = key(1, "iterations from one checkpoint to the next", unit="iterations", low=1, since=13)
    save_best: bool = key(
        True, "keep the checkpoint with the best periodic evaluation, however old", since=13, before=False
    )
    keep_checkpoints: int = key(2, "how many of the newest to keep", unit="checkpoints", low=1, since=13)
    max_bad_updates: int = key(
        5,
        "after so many gradients in a row that are not finite, the last checkpoint is loaded",
        unit="updates",
        low=1,
        since=13,
    )
    max_rollbacks: int = key(
        3, "most such loads for the same iteration; then the run ends", unit="loads", low=0, since=13
    )
    trainable: Literal["as_saved", "all", "without_vision", "expert", "lora"] = key(
        "as_saved",
        "which weights are trained: all, all but the vision tower, the action expert's, low-rank additions; "
        "as_saved: as the policy folder's configuration says; a part is trained in float32, whatever dtype is",
        fixed=True,
    )
    use_mixed_precision: bool = key(
        False, "compute losses in bfloat16 where that is safe (autocast)", since=13
    )
    gradient_checkpointing: bool = key(
        False,
        "keep only the inputs of transformer blocks for the backward pass: less memory, more time",
        since=13,
    )
    use_fsdp: bool = key(
        False, "shard weights and optimizer state over the ranks (FSDP2, needs torchrun)", since=13
    )
    optimizer: OptimizerConfig = section(OptimizerConfig)


@dataclass(kw_only=True)
class EvaluationConfig(ScoreConfig):
    """The scores before, during and after training, on initial states that are never trained on."""

    periodic_episodes: int = key(
        0,
        "episodes over all tasks every logging.log_freq iterations; 0: none",
        unit="episodes",
        low=0,
        since=12,
    )


@dataclass(kw_only=True)
class Config:
    """A run of a stage script."""

    policy_path: str = key(MISSING, "policy folder to start from", fixed=True, path=True)
    device: str = key("auto", "where the policy runs: cpu, cuda, cuda:1; auto: the GPU if there is one")
    dtype: Literal["float32", "bfloat16"] = key(
        "float32",
        "type of the weights; norms, position embeddings, flow head and a part that is trained stay float32",
        fixed=True,
    )
    compile: bool = key(
        False, "compile the network with torch.compile: it takes minutes, then the network is faster"
    )
    norm_stats_path: str | None = key(
        None, "normalisation statistics; null: the policy folder's own", fixed=True, path=True
    )
    output_dir: str = key("outputs", "folder of all runs", path=True)
    exp_name: str = key("ript", "name of this run and of its folder in output_dir")
    profile: Literal["dev", "prod"] | None = key(
        None, "set of defaults; dev: every part once, in a minute; prod: many states and iterations"
    )
    task: TaskConfig = section(TaskConfig)
    algo: AlgoConfig = section(AlgoConfig)
    training: TrainingConfig = section(TrainingConfig)
    evaluation: EvaluationConfig = section(EvaluationConfig)
    logging: LoggingConfig = section(LoggingConfig, since=11)
    features: FeaturesConfig = section(FeaturesConfig)


PROFILES: dict[str, dict[str, Any]] = {
    # It runs every part once, within a minute.
    "dev": {
        "task.max_episode_length": 50,
        "algo.rloo_batch_size": 2,
        "algo.data_batch_size": 4,
        "algo.max_sampling_attempts": 2,
        "algo.train_init_states": 4,
        "algo.num_epochs": 1,
        "training.num_train_steps": 2,
        "evaluation.episodes": 2,
        "features.save_video": True,
    },
    # For real results: many states and iterations, narrow intervals.
    "prod": {
        "algo.train_init_states": 500,
        "algo.max_sampling_attempts": 64,
        "training.num_train_steps": 200,
        "evaluation.episodes": 500,
        "features.save_video": False,
    },
}


def load_config(path: str | Path, overrides: Sequence[str] = (), stage: int | None = None) -> Config:
    """Read a YAML file, apply `overrides` ("training.seed=3") and check the result.

    Args:
        path: the YAML file.
        overrides: those of the command line; they win over the file.
        stage: the running stage, 9 to 13. A key in the file or the overrides that only later stages read is
            refused, unless its value is the default or stands for what this stage does. None: no key is refused.
    Raises:
        ConfigError: as `pi0.training.settings.read_config`.
    """
    return read_config(Config, path, overrides, PROFILES, _conflicts, running=stage, version=STAGE)


def validate(config: Config) -> None:
    """Check a configuration that code has made; raises `ConfigError` like `load_config`."""
    check_config(config, _conflicts)


def check_evaluation(config: Config, tasks: Sequence[object]) -> None:
    """Raise `ConfigError` if there are more evaluation episodes than recorded states of the tasks."""
    each = config.task.held_out_states or RECORDED_STATES
    most = each * len(tasks)
    for name in ("episodes", "periodic_episodes"):
        if (count := getattr(config.evaluation, name)) > most:
            raise ConfigError(
                f"evaluation.{name} = {count} is more than the {each} "
                f"{'held-out states' if config.task.held_out_states else 'states that LIBERO recorded'} for "
                f"each of {len(tasks)} tasks; {most} are the most"
            )


def to_dict(config: Config) -> dict[str, Any]:
    """The configuration as nested plain values, which `load_config` reads back from YAML."""
    return dataclasses.asdict(config)


def describe_keys() -> list[KeyDescription]:
    """Every key, in the schema's order."""
    return typed_yaml.describe_keys(Config)


def help_text() -> str:
    """The keys as `--help` prints them: name, type, unit, default, first stage, whether fixed, meaning."""
    return typed_yaml.help_text(Config, STAGE)


def _conflicts(config: Config) -> list[str]:
    """Conflicts between keys whose values are each valid."""
    algo = config.algo
    conflicts = task_conflicts(config.task)
    if problem := name_problem(config.exp_name):
        conflicts.append(f"exp_name = {show(config.exp_name)} {problem}")
    if config.training.use_fsdp and config.dtype != "float32":
        conflicts.append(
            f"training.use_fsdp = true shards weights of one type only, but dtype = {show(config.dtype)} mixes two; "
            "use dtype = float32 with training.use_mixed_precision = true"
        )
    if algo.mode == "ratio":
        unfit = {
            "critic_path": "the critic's choice has no probability",
            "cotraining_path": "demonstrations have no probability",
        }
        conflicts += [
            f"algo.{name} = {show(getattr(algo, name))} and algo.mode = ratio exclude each other: {why}; use mode: weighted"
            for name, why in unfit.items()
            if getattr(algo, name) is not None
        ]
    if algo.data_batch_size % algo.rloo_batch_size:
        conflicts.append(
            f"algo.data_batch_size = {algo.data_batch_size} is not a whole number of groups of "
            f"algo.rloo_batch_size = {algo.rloo_batch_size}; "
            f"use {(algo.data_batch_size // algo.rloo_batch_size + 1) * algo.rloo_batch_size}"
        )
    elif algo.max_sampling_attempts * algo.rloo_batch_size < algo.data_batch_size:
        conflicts.append(
            f"algo.max_sampling_attempts = {algo.max_sampling_attempts} groups of "
            f"algo.rloo_batch_size = {algo.rloo_batch_size} never make "
            f"algo.data_batch_size = {algo.data_batch_size}; "
            f"use at least {algo.data_batch_size // algo.rloo_batch_size} attempts"
        )
    return conflicts
