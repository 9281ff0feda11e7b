"""The configuration of ACRLPD: its sections, its presets, and how they are found by name.

A key is a line of a YAML file in configs/ and an override (`acrlpd.num_action_samples=16`).
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, Literal

from pi0.base import typed_yaml
from pi0.base.paths import DATA_ROOT
from pi0.base.typed_yaml import ConfigError, key, section, show
from pi0.libero.settings import MAX_SEED, ScoreConfig, TaskConfig, task_conflicts
from pi0.training.run_folder import name_problem
from pi0.training.settings import FeaturesConfig, LoggingConfig, OptimizerConfig, check_config, read_config

CONFIGS = DATA_ROOT / "configs"
# Keys of earlier sketches, and the one key that means the same here.
RENAMED = {
    "chunk_length": "qchunking.horizon_length",
    "action_horizon": "qchunking.horizon_length",
    "gamma": "acrlpd.discount",
    "tau": "acrlpd.target_update_rate",
    "ema_decay": "acrlpd.pi0_ema_decay",
    "num_critics": "acrlpd.critics",
    "batch_size": "data.batch_size",
}


@dataclass(kw_only=True)
class QChunkingConfig:
    """Chunks of actions that critics value."""

    horizon_length: int = key(
        10, "actions of a chunk that are carried out and valued; task.replan_steps", unit="control steps", low=1,
        fixed=True,
    )  # fmt: skip


@dataclass(kw_only=True)
class ACRLPDHyperparams:
    """The agent."""

    num_action_samples: int = key(8, "chunks among which the critics choose", unit="chunks", low=1)
    discount: float = key(0.99, "discount per control step", above=0, high=1, fixed=True)
    target_update_rate: float = key(
        0.005, "share by which an update moves the target critics", above=0, high=1, fixed=True
    )
    bc_loss_weight: float = key(0.1, "weight of behaviour cloning of successful episodes", low=0)
    use_ema: bool = key(True, "act with averages of actor and critics", fixed=True)
    pi0_ema_decay: float = key(0.999, "share of the actor's average that an update keeps", low=0, high=1)
    critic_ema_decay: float = key(0.99, "share of the critics' average that an update keeps", low=0, high=1)
    critics: int = key(2, "critics", low=2, high=10, fixed=True)
    hidden: int = key(256, "width of their hidden layers", low=1, fixed=True)
    layers: int = key(3, "their hidden layers", low=1, fixed=True)
    features: Literal["policy", "own"] = key(
        "policy",
        "what critics see of images and prompt: tokens of a fixed copy of the starting policy, which are kept; or a "
        "small network of their own, which is trained with them and sees each image again",
        fixed=True,
    )
    aggregation: Literal["min", "mean"] = key("min", "of the target critics' values")
    temperature: float = key(
        0.1, "of the actor's weights exp(A / temperature); where it starts if it is learned", above=0
    )
    divergence: float | None = key(
        None, "KL of these weights, to which the temperature is learned; null: it stays", unit="nats", above=0
    )
    awr_weight: float = key(1.0, "weight of the flow loss that exp(A / temperature) weighs", low=0)
    best_weight: float = key(1.0, "weight of the flow loss on the best of the samples", low=0)
    flow_samples: int = key(4, "draws of noise and time for a window's flow loss", unit="draws", low=1)
    critic_lr: float = key(3e-4, "learning rate of the critics", above=0, fixed=True)
    actor_lr: float = key(1e-4, "learning rate of the actor", above=0, fixed=True)
    grad_norm: float = key(1.0, "longer gradients are shortened to this norm", above=0)
    lowest_reward: float = key(0.0, "lowest reward of a step", fixed=True)
    highest_reward: float = key(1.0, "highest reward of a step", fixed=True)
    one_reward: bool = key(
        True, "an episode has one reward at most, at its end, so no value is beyond it (LIBERO)", fixed=True
    )


@dataclass(kw_only=True)
class DataConfig:
    """Episodes to learn from."""

    rollouts: int = key(
        400, "of the starting policy, recorded first; 0: the episodes of datasets alone", unit="rollouts", low=0,
        fixed=True,
    )  # fmt: skip
    datasets: list[str] = key(
        [], "episodes in files: LeRobot data sets (v2.0 to v3.0), LIBERO's HDF5 files or folders of them", fixed=True,
        path=True,
    )  # fmt: skip
    gripper: Literal["close-is-1", "open-is-1"] | None = key(
        None, "what 1 means for the gripper in datasets; null: close, and each set must have actions that open it",
        fixed=True,
    )  # fmt: skip
    features: list[str] = key(
        [], "names of state, actions and each camera in LeRobot datasets, NAME=FEATURE each; none: their own names tell",
        fixed=True,
    )  # fmt: skip
    skip_norm_stats: bool = key(
        False,
        "do not compare frames a second, robot, names and statistics of datasets with the policy's",
        fixed=True,
    )
    episodes_per_memory_pool: int = key(
        64, "episodes of datasets in memory at a time; the next ones come with each iteration", unit="episodes", low=1,
        fixed=True,
    )  # fmt: skip
    online_share: float | None = key(
        None, "share of a batch drawn from rollouts of this run, the rest from datasets; null: evenly from all windows",
        above=0, high=1,
    )  # fmt: skip
    init_states: int = key(
        200, "initial states of each task to record and practise from", unit="states", low=1, fixed=True
    )
    shuffle_outcomes: bool = key(
        False, "control: exchange success and failure between episodes of a task, so that reward teaches nothing",
        fixed=True,
    )  # fmt: skip
    shuffle_windows: bool = key(
        False, "control: exchange what followed between the windows of a batch, lengths of episodes included",
        fixed=True,
    )  # fmt: skip
    horizon_is_failure: bool = key(
        False,
        "ablation: an episode that reached its horizon has failed, so nothing is valued after it",
        fixed=True,
    )
    batch_size: int = key(256, "windows of a critics' update", unit="windows", low=1)
    actor_batch_size: int = key(64, "windows of an actor's update", unit="windows", low=1)
    buffer_windows: int = key(200_000, "windows in memory; the oldest episodes leave", unit="windows", low=1)


@dataclass(kw_only=True)
class ACRLPDTrainingConfig:
    """What is done in which order. An iteration collects, then learns."""

    num_train_steps: int = key(
        9, "iterations: collect, then learn; in the first one only the critics learn", unit="iterations", low=0,
        fixed=True,
    )  # fmt: skip
    offline_iterations: int = key(
        5, "the first so many of them collect nothing", unit="iterations", low=0, fixed=True
    )
    rollouts: int = key(100, "rollouts that an online iteration collects", unit="rollouts", low=1)
    critic_updates: int = key(
        1500, "of the critics in the first iteration; 0: the actor learns in it, too", unit="updates", low=0,
        fixed=True,
    )  # fmt: skip
    updates: int = key(200, "of critics and actor in a later iteration", unit="updates", low=0)
    critic_updates_each: int = key(
        2, "further updates of the critics with each of these", unit="updates", low=0
    )
    seed: int = key(0, "seed of all random numbers", low=0, high=MAX_SEED - 1, fixed=True)
    periodic_episodes: int = key(
        0, "episodes of a score every logging.log_freq iterations; 0: none", unit="episodes", low=0
    )
    score_parts: bool = key(
        False, "score also after the first iteration (critics alone) and after the offline ones"
    )
    save_freq: int = key(1, "iterations from one checkpoint to the next", unit="iterations", low=1)
    keep_checkpoints: int = key(2, "how many of the newest to keep", unit="checkpoints", low=1)
    save_openpi_freq: int = key(
        0,
        "iterations from one folder pi0_openpi_step_N, the actor for openpi, to the next; 0: only at the end",
        unit="iterations",
        low=0,
    )
    save_best: bool = key(True, "keep the checkpoint with the best periodic evaluation, however old")
    use_mixed_precision: bool = key(
        False, "draw candidates and compute flow losses in bfloat16 where that is safe (autocast)"
    )
    gradient_checkpointing: bool = key(
        False, "keep less of the forward pass and work it out again: less memory, more time"
    )
    fsdp_size: int = key(
        1, "ranks over which the actor is sharded (FSDP2); 1: each rank has all of it", unit="ranks", low=1
    )
    max_bad_updates: int = key(
        5, "after so many gradients in a row that are not finite, the last checkpoint is loaded", low=1
    )
    max_rollbacks: int = key(3, "most such loads for the same iteration; then the run ends", low=0)
    optimizer: OptimizerConfig = section(OptimizerConfig)


@dataclass(kw_only=True)
class RLTrainConfig:
    """A run of ACRLPD."""

    policy_path: str = key(MISSING, "policy folder to start from", fixed=True, path=True)
    norm_stats_path: str | None = key(
        None, "normalisation statistics; null: the policy folder's own", fixed=True, path=True
    )
    device: str = key("auto", "where the networks run: cpu, cuda, cuda:1; auto: the GPU if there is one")
    dtype: Literal["float32", "bfloat16"] = key(
        "float32", "type of the actor's weights in training; averages stay in float32", fixed=True
    )
    output_dir: str = key("outputs", "folder of all runs", path=True)
    exp_name: str = key("acrlpd", "name of this run and of its folder in output_dir")
    task: TaskConfig = section(TaskConfig)
    data: DataConfig = section(DataConfig)
    acrlpd: ACRLPDHyperparams = section(ACRLPDHyperparams)
    qchunking: QChunkingConfig = section(QChunkingConfig)
    training: ACRLPDTrainingConfig = section(ACRLPDTrainingConfig)
    evaluation: ScoreConfig = section(ScoreConfig)
    features: FeaturesConfig = section(FeaturesConfig)
    logging: LoggingConfig = section(LoggingConfig)


def list_configs() -> list[str]:
    """Names of the presets: the files configs/acrlpd_*.yaml."""
    return sorted(path.stem for path in CONFIGS.glob("acrlpd_*.yaml"))


def get_config(name: str, overrides: Sequence[str] = ()) -> RLTrainConfig:
    """A preset by name.

    Raises:
        ConfigError: there is none of that name, with the nearest one; or as `load_rl_config`.
    """
    if name not in (known := list_configs()):
        near = difflib.get_close_matches(name, known, 1, 0.0)
        meant = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(
            f"there is no preset {name!r}{meant} --list shows all: {', '.join(known) or 'none'}"
        )
    return load_rl_config(CONFIGS / f"{name}.yaml", overrides)


def load_rl_config(path: str | Path, overrides: Sequence[str] = ()) -> RLTrainConfig:
    """Read a YAML file, apply `overrides` and check the result.

    Raises:
        ConfigError: as `pi0.training.settings.read_config`; a key of an earlier sketch is answered by today's.
    """
    try:
        return read_config(RLTrainConfig, path, overrides, {}, conflicts)
    except ConfigError as error:
        hints = [f"{old} is {new} here" for old, new in RENAMED.items() if f".{old}" in str(error)]
        raise ConfigError("\n".join([str(error), *hints])) from error


def cli(arguments: Sequence[str] | None = None) -> RLTrainConfig:
    """The configuration that the command line of a script of your own names, with the options of `pi0.acrlpd.train`.

    Args:
        arguments: words, such as `--config acrlpd_debug --override acrlpd.critics=4`; None: those of this process.

    Raises:
        ConfigError: as `named_config`.
    """
    parser = argparse.ArgumentParser(epilog=help_text(), formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_options(parser)
    return named_config(parser.parse_args(arguments))


def add_config_options(parser: argparse.ArgumentParser) -> argparse._MutuallyExclusiveGroup:
    """Add the options that name a configuration; returns the group of which one must be given."""
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--config", help=f"name of a preset: {', '.join(list_configs())}")
    which.add_argument("--config_path", type=Path, help="YAML file")
    parser.add_argument(
        "--override", nargs="*", action="extend", default=[], help="KEY=VALUE: acrlpd.critics=4"
    )
    return which


def named_config(options: argparse.Namespace) -> RLTrainConfig:
    """The configuration that the options of `add_config_options` name.

    Raises:
        ConfigError: as `get_config` or `load_rl_config`.
    """
    if options.config:
        return get_config(options.config, options.override)
    return load_rl_config(options.config_path, options.override)


def validate(config: RLTrainConfig) -> None:
    """Check a configuration that code has made; raises `ConfigError`."""
    check_config(config, conflicts)


def conflicts(config: RLTrainConfig) -> list[str]:
    """Conflicts between keys whose values are each valid, a line each."""
    found = task_conflicts(config.task)
    if problem := name_problem(config.exp_name):
        found.append(f"exp_name = {show(config.exp_name)} {problem}")
    if config.qchunking.horizon_length != config.task.replan_steps:
        found.append(
            f"qchunking.horizon_length = {config.qchunking.horizon_length} and task.replan_steps = "
            f"{config.task.replan_steps} must be equal: critics value what is carried out"
        )
    if config.training.fsdp_size > 1 and config.dtype == "bfloat16":
        found.append(
            f"training.fsdp_size = {config.training.fsdp_size} and dtype = bfloat16: small steps round away in "
            "bfloat16; set dtype = float32 and training.use_mixed_precision = true"
        )
    if config.training.fsdp_size > 1 and not config.acrlpd.use_ema:
        found.append(
            f"training.fsdp_size = {config.training.fsdp_size} and acrlpd.use_ema = false: only the average is whole "
            "on each rank, so only it can act; set acrlpd.use_ema = true"
        )
    if not config.data.datasets:
        if not config.data.rollouts:
            found.append(
                "data.rollouts = 0 and data.datasets = [] leave nothing to learn from; record rollouts or name files"
            )
        if config.data.online_share is not None:
            found.append(
                f"data.online_share = {config.data.online_share}, but there are no data.datasets to draw the rest from; "
                "name some, or set it to null"
            )
    elif config.data.shuffle_outcomes or config.data.horizon_is_failure:
        found.append(
            "data.shuffle_outcomes and data.horizon_is_failure are for rollouts alone; leave data.datasets out"
        )
    weights = ("awr_weight", "best_weight", "bc_loss_weight")
    moves = config.training.num_train_steps > 1 and config.training.updates
    if moves and not any(getattr(config.acrlpd, name) for name in weights):
        found.append(
            f"{', '.join(f'acrlpd.{name}' for name in weights)} are all 0, so the actor learns nothing; raise one"
        )
    if config.acrlpd.lowest_reward > config.acrlpd.highest_reward:
        found.append(
            f"acrlpd.lowest_reward = {config.acrlpd.lowest_reward} is above acrlpd.highest_reward = "
            f"{config.acrlpd.highest_reward}"
        )
    return found


def to_dict(config: RLTrainConfig) -> dict[str, Any]:
    """The configuration as nested plain values."""
    return dataclasses.asdict(config)


def help_text() -> str:
    """The keys as `--help` prints them."""
    return typed_yaml.help_text(RLTrainConfig)
