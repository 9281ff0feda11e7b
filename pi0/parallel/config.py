"""The configuration: every key of `configs/parallel_*.yaml`, which is also an option of `train_parallel`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pi0.base import typed_yaml
from pi0.base.typed_yaml import key, section
from pi0.training.run_folder import name_problem
from pi0.training.settings import LoggingConfig, check_config, read_config

DEFAULT_GAME = "Airstriker-Genesis-v0"


@dataclass(kw_only=True)
class Config:
    """Settings of a run."""

    game: str = key(
        DEFAULT_GAME, "a retro game, or the id of a gymnasium environment with images", fixed=True
    )
    state: str | None = key(None, "save state of a retro game to start from; null: its default", fixed=True)
    game_options: list[str] = key([], "KEY=VALUE arguments of gymnasium.make", fixed=True)
    image: str | None = key(None, "key of the image in an observation that is a dictionary", fixed=True)
    skip: int = key(4, "frames that an action is held", unit="frames", low=1, fixed=True)
    noop_max: int = key(
        30,
        "an episode begins with 0 to so many frames without action (no-ops)",
        unit="frames",
        low=0,
        fixed=True,
    )
    max_steps: int = key(
        10000, "an episode is truncated after so many steps", unit="steps", low=1, high=1_000_000, fixed=True
    )

    n_workers: int = key(
        8, "workers, each with a game and a random stream of its own", unit="workers", low=1, fixed=True
    )
    workers: str = key(
        "each",
        "each: a process for each of n_workers; 0: all of them one after another in this process, with the same "
        "numbers; a number: that is n_workers; auto: n_workers is 8, 4 or 2 by the load and memory of the machine",
    )
    workers_schedule: list[int] = key(
        [],
        "numbers of workers that collect in equal parts of the run, such as 8,4; empty: all, always",
        low=1,
        fixed=True,
    )
    nice: int | None = key(
        None,
        "by how much the workers' priority is lowered; null: 0, or 15 where they work while the trainer learns and "
        "there are fewer cores than processes, since all wait for the trainer",
        low=0,
        high=19,
    )
    deadline_s: float = key(120.0, "a worker that needs longer for a slice is replaced", unit="s", above=0)
    worker_memory_mb: float = key(
        1500.0, "a worker that uses more is replaced between two slices", unit="MB", above=0
    )
    exploration: list[float] = key(
        [],
        "share of uniform choice in the policy of the upper and the lower half of the workers",
        low=0,
        high=1,
        fixed=True,
    )
    priority: bool = key(
        False, "workers with better scores collect more, 0.5 to 2 times the mean", fixed=True
    )

    mode: Literal["sync", "overlap", "async"] = key(
        "overlap",
        "sync: collect, then learn; overlap: collect the next slice while learning from the last; async: learn "
        "whenever min_batch_size transitions are there, with V-trace",
        fixed=True,
    )
    update_interval: int = key(
        2048, "transitions of all workers in an update", unit="transitions", low=2, fixed=True
    )
    min_batch_size: int = key(
        1024, "async: transitions that an update waits for", unit="transitions", low=2, fixed=True
    )
    max_policy_lag: int = key(
        4, "async: slices of a policy that is older are dropped", unit="updates", low=1, fixed=True
    )
    max_episodes: int = key(1000, "training ends after so many episodes", unit="episodes", low=1)
    max_updates: int | None = key(
        None, "or after so many updates; null: only max_episodes ends it", unit="updates", low=1
    )

    gamma: float = key(0.99, "discount", low=0, high=1, fixed=True)
    gae_lambda: float = key(0.95, "lambda of the advantages", low=0, high=1, fixed=True)
    clip: float = key(0.1, "how far a probability may move in an update, as a ratio", above=0, fixed=True)
    entropy_weight: float = key(0.01, "weight of the entropy", low=0, fixed=True)
    value_weight: float = key(0.5, "weight of the value loss", low=0, fixed=True)
    grad_norm: float = key(0.5, "gradients are scaled down to this norm", above=0, fixed=True)
    epochs: int = key(4, "passes over the transitions of an update", low=1, fixed=True)
    minibatch: int = key(256, "transitions of a step of the optimizer", unit="transitions", low=2, fixed=True)
    lr: float = key(2.5e-4, "learning rate at the beginning; it falls to 0", above=0, fixed=True)
    shuffle_advantages: bool = key(
        False, "control: give each transition the advantage of another", fixed=True
    )
    factored: bool = key(
        True,
        "if an action has several parts, such as buttons, each part is chosen independently given the screen; false: "
        "each combination has a logit of its own",
        fixed=True,
    )
    precision: Literal["auto", "float32", "bfloat16"] = key(
        "auto",
        "of the convolutions in an update; auto: bfloat16 where the processor or GPU computes with it",
        fixed=True,
    )
    threads: int | None = key(
        None,
        "torch threads of an update; null: the cores, less the workers where they work at the same time",
        low=1,
    )
    seed: int = key(0, "of everything that is random", low=0, high=2**32 - 1, fixed=True)

    render: bool = key(False, "write videos: the best episode, and one before and after training")
    evaluation_episodes: int = key(
        20, "episodes of each score, before and after; 0: none", unit="episodes", low=0
    )
    evaluation_interval: int | None = key(
        None,
        "updates from one score to the next, made by processes beside the training; null: only before and after",
        unit="updates",
        low=1,
    )
    save_interval: int = key(10, "updates from one checkpoint to the next", unit="updates", low=1)
    max_checkpoints: int = key(100, "newest checkpoints that stay, beside the best", low=1)
    max_bad_updates: int = key(
        5, "so many gradients in a row that are not finite lead back to a checkpoint", low=1
    )
    max_rollbacks: int = key(3, "returns to a checkpoint because of one update", low=0)
    output_dir: str = key("outputs", "folder of the runs' folders", path=True)
    exp_name: str = key("parallel", "beginning of the name of the run's folder")
    logging: LoggingConfig = section(LoggingConfig)


def load_config(path: str | Path, overrides: Sequence[str]) -> Config:
    """Read a YAML file with overrides.

    Raises:
        ConfigError: as for `pi0.training.settings.read_config`.
    """
    return read_config(Config, path, overrides, {}, conflicts)


def make_config(**values: Any) -> Config:
    """A configuration that code makes.

    Raises:
        ConfigError: a value is invalid, or two contradict each other.
    """
    config = Config(**values)
    check_config(config, conflicts)
    return config


def conflicts(config: Config) -> list[str]:
    """Values that contradict each other, a line each."""
    found = []
    if not re.fullmatch(r"each|auto|\d+", config.workers):
        found.append(f"workers = {config.workers!r}: expected each, auto or a number")
    if len(config.exploration) not in (0, 1, 2):
        found.append(
            "exploration: expected one share, or one for the upper and one for the lower half, as 0.3,0.1"
        )
    most = int(config.workers) if re.fullmatch(r"[1-9]\d*", config.workers) else config.n_workers
    greatest = max(config.workers_schedule, default=most)
    if most != greatest:
        found.append(
            f"workers_schedule = {config.workers_schedule}: n_workers must be its greatest number, {greatest}"
        )
    if config.mode == "async" and config.workers == "0":
        found.append("workers = 0 collects and learns in turns, so mode must be sync or overlap")
    if config.mode == "async" and (config.workers_schedule or config.priority):
        found.append(
            "mode = async: workers_schedule and priority need an update for each slice: sync or overlap"
        )
    if config.update_interval < 2 * most:
        found.append(
            f"update_interval = {config.update_interval}: {most} workers need {2 * most} transitions or more, 2 each"
        )
    if problem := name_problem(config.exp_name):
        found.append(f"exp_name = {config.exp_name!r}: {problem}")
    return found


def to_dict(config: Config) -> dict[str, Any]:
    """The configuration as nested plain values."""
    return asdict(config)


def fixed() -> list[str]:
    """Names of the keys that a resumed run must keep."""
    return typed_yaml.fixed_keys(Config)
