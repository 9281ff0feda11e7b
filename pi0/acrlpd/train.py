"""Improve a pi0 policy by ACRLPD: critics of action chunks, learned from recorded episodes, then from practice.

    python -m pi0.acrlpd.train --list
    python -m pi0.acrlpd.train --config acrlpd_quickstart
    python -m pi0.acrlpd.train --config_path configs/acrlpd_quickstart.yaml --override acrlpd.num_action_samples=16
    python -m pi0.acrlpd.train --config acrlpd_quickstart --resume
    torchrun --nproc_per_node=2 -m pi0.acrlpd.train --config acrlpd_debug

The run's folder holds checkpoints, metrics.jsonl, report.html, results.json, the policy and the critic.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from pi0.acrlpd.config import (
    RLTrainConfig,
    add_config_options,
    help_text,
    list_configs,
    named_config,
    to_dict,
)
from pi0.acrlpd.fsdp_support import validate_fsdp_sharding
from pi0.acrlpd.trainer import ACRLPDTrainer
from pi0.base import typed_yaml
from pi0.base.errors import InputError, run_command
from pi0.ranks.collectives import on_rank_zero, rank_and_world_size
from pi0.ranks.watch import RankWatch, exit_with, join_ranks, under_torchrun, watched_ranks
from pi0.training.interrupts import Interrupts
from pi0.training.random_state import set_seed
from pi0.training.run_folder import new_run_dir, run_to_resume, take_run


def create_argument_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m pi0.acrlpd.train",
        description=__doc__,
        epilog=help_text(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_config_options(parser).add_argument("--list", action="store_true", help="print the presets")
    parser.add_argument("--resume", nargs="?", const="newest", default="", help="the newest run, or a folder")
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Read the options, train."""
    options = create_argument_parser().parse_args(arguments)
    if options.list:
        print("\n".join(list_configs()))
        return
    with setup_environment() as watch:
        unified_training_interface(customize_config(options), options.resume, watch)


def customize_config(options: argparse.Namespace) -> RLTrainConfig:
    """The configuration that the command line names, with its overrides.

    Raises:
        ConfigError: a file or a value is wrong.
    """
    return named_config(options)


@contextmanager
def setup_environment() -> Iterator[RankWatch | None]:
    """In this context this process is one of the ranks that torchrun has started, if it has; then rank 0 alone prints.

    Yields:
        What passes requests to stop between ranks; None for a single process.
    """
    if not under_torchrun():
        yield None
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    join_ranks()
    if dist.get_rank() > 0:
        sys.stdout = open(os.devnull, "w", errors="replace")  # noqa: SIM115
    try:
        with watched_ranks() as watch:
            yield watch
    except InputError as error:
        exit_with(error)
    finally:
        dist.destroy_process_group()


def create_training_components(config: RLTrainConfig, run_dir: Path, interrupts: Interrupts) -> ACRLPDTrainer:
    """The trainer of a run, with its policy, agent, data and workers; on several ranks its shards are checked.

    Raises:
        InputError: policy, settings and ranks do not fit.
    """
    trainer = ACRLPDTrainer(config, run_dir, interrupts)
    verify_fsdp_sharding(trainer)
    log_gpu_memory(trainer, "set up")
    return trainer


def run_training_experiment(trainer: ACRLPDTrainer, resume: bool) -> None:
    """Train to the end, or until the run is asked to stop."""
    trainer.train(resume)


def log_gpu_memory(trainer: ACRLPDTrainer, label: str) -> None:
    """Print this rank's memory: resident, and on its GPU if it has one."""
    trainer.log_memory_usage(label)


def verify_fsdp_sharding(trainer: ACRLPDTrainer) -> None:
    """Check that the actor is sharded as configured, and say what that saves.

    Raises:
        InputError: it is not.
    """
    if trainer.mesh is not None:
        print(analyze_fsdp_effectiveness(validate_fsdp_sharding(trainer.agent, trainer.mesh)))


def analyze_fsdp_effectiveness(found: dict[str, int]) -> str:
    """One line of what `validate_fsdp_sharding` found."""
    share = found["weights"] / max(1, found["whole_weights"])
    megabytes = {name: found[name] / 2**20 for name in ("weights", "whole_weights")}
    return (
        f"actor sharded: this rank holds {megabytes['weights']:.1f} of {megabytes['whole_weights']:.1f} MB of its weights "
        f"({share:.0%}), and as much of each moment and of the gradient"
    )


def unified_training_interface(
    config: RLTrainConfig, resume: str = "", watch: RankWatch | None = None
) -> Path:
    """Train as configured; returns the run's folder. All ranks call it together.

    Raises:
        InputError: policy, settings and ranks do not fit.
    """
    _, ranks = rank_and_world_size()
    for name in ("batch_size", "actor_batch_size"):
        if (windows := getattr(config.data, name)) < ranks:
            raise typed_yaml.ConfigError(
                f"data.{name} = {windows}: each of {ranks} ranks needs a window; use at least {ranks}"
            )
    interrupts = Interrupts(watch)
    interrupts.install()
    set_seed(config.training.seed)
    place = (config.output_dir, config.exp_name, to_dict(config))
    if resume:
        fixed = typed_yaml.fixed_keys(RLTrainConfig)
        run_dir = on_rank_zero(run_to_resume, resume, *place, fixed, dict, "start a new run")
    else:
        run_dir = on_rank_zero(new_run_dir, *place)
    lock = on_rank_zero(take_run, run_dir, to_dict(config))
    try:
        run_training_experiment(create_training_components(config, run_dir, interrupts), bool(resume))
    finally:
        if rank_and_world_size()[0] == 0:
            os.close(lock)
    return run_dir


if __name__ == "__main__":
    run_command(main)
