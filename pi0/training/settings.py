"""Settings of any trainer: common sections, and how a configuration is read and checked.

A trainer's own configuration is a dataclass of keys and sections (`pi0.base.typed_yaml`); it includes these.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from pi0.base import typed_yaml
from pi0.base.typed_yaml import ConfigError, key

Schema = TypeVar("Schema")


@dataclass(kw_only=True)
class OptimizerConfig:
    """The optimizer of the policy's weights."""

    type: Literal["adamw", "adam", "sgd"] = key("adamw", "which optimizer", fixed=True)
    weight_decay: float = key(0.0, "weight decay", low=0, fixed=True)
    beta1: float = key(
        0.9, "decay of the gradient's running mean; momentum for sgd", low=0, high=0.9999, fixed=True
    )
    beta2: float = key(0.95, "decay of the squared gradient's running mean", low=0, high=0.99999, fixed=True)
    final_lr_share: float = key(
        1.0,
        "share of the learning rate that is left at the end; it falls in equal steps, one for each iteration that "
        "learns; 1: constant",
        low=0,
        high=1,
        fixed=True,
    )


@dataclass(kw_only=True)
class LoggingConfig:
    """Where metrics go besides the console, the log file and metrics.jsonl."""

    use_wandb: bool = key(True, "log to Weights & Biases", before=False)
    wandb_project: str = key("ript-pi0", "WandB project")
    wandb_entity: str | None = key(None, "WandB user or team; null: the owner of the API key")
    wandb_mode: Literal["offline", "online", "disabled"] = key(
        "offline",
        "offline writes a run that `wandb sync` uploads later; online needs an API key and a network",
        before="disabled",
    )
    wandb_run_id: str | None = key(None, "WandB run to continue; null: a new one")
    log_freq: int = key(
        5,
        "iterations from one report.html, and one periodic evaluation, to the next",
        unit="iterations",
        low=1,
    )


@dataclass(kw_only=True)
class FeaturesConfig:
    """Outputs besides the policy."""

    save_video: bool = key(True, "save videos of rollouts before and after training")


def read_config(
    schema: type[Schema],
    path: str | Path,
    overrides: Sequence[str],
    profiles: Mapping[str, Mapping[str, Any]],
    conflicts: Callable[[Schema], list[str]],
    *,
    running: int | None = None,
    version: str = "version {}",
) -> Schema:
    """Read a YAML file, apply `overrides` ("training.seed=3") and check the result.

    Args:
        schema, path, overrides, profiles, running, version: as for `pi0.base.typed_yaml.load`.
        conflicts: returns conflicts between keys whose values are each valid, a line each.
    Raises:
        ConfigError: the file cannot be read, a key is unknown, duplicate, missing or refused, a value is invalid, or
            keys conflict; the message has one line for each mistake.
    """
    config = typed_yaml.load(schema, path, overrides, profiles, running=running, version=version)
    if problems := conflicts(config):
        raise ConfigError("\n".join(f"{path}: {problem}" for problem in problems))
    return config


def check_config(config: Schema, conflicts: Callable[[Schema], list[str]]) -> None:
    """Check a configuration that code has made; raises `ConfigError` like `read_config`."""
    if problems := typed_yaml.unfit_values(config) or conflicts(config):
        raise ConfigError("\n".join(problems))
