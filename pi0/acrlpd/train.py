"""Improve a pi0 policy by ACRLPD: critics of action chunks, learned from recorded episodes, then from practice.

    python -m pi0.acrlpd.train --list
    python -m pi0.acrlpd.train --config acrlpd_quickstart
    python -m pi0.acrlpd.train --config_path configs/acrlpd_quickstart.yaml --override acrlpd.num_action_samples=16
    python -m pi0.acrlpd.train --config acrlpd_quickstart --resume

The run's folder holds checkpoints, metrics.jsonl, report.html, results.json, the policy and the critic.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from pi0.acrlpd.config import RLTrainConfig, get_config, help_text, list_configs, load_rl_config, to_dict
from pi0.acrlpd.trainer import ACRLPDTrainer
from pi0.base import typed_yaml
from pi0.base.errors import run_command
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
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--config", help="name of a preset, see --list")
    which.add_argument("--config_path", type=Path, help="YAML file")
    which.add_argument("--list", action="store_true", help="print the presets")
    parser.add_argument(
        "--override", nargs="*", action="extend", default=[], help="KEY=VALUE: acrlpd.critics=4"
    )
    parser.add_argument("--resume", nargs="?", const="newest", default="", help="the newest run, or a folder")
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Read the options, train."""
    options = create_argument_parser().parse_args(arguments)
    if options.list:
        print("\n".join(list_configs()))
        return
    if options.config:
        config = get_config(options.config, options.override)
    else:
        config = load_rl_config(options.config_path, options.override)
    unified_training_interface(config, options.resume)


def unified_training_interface(config: RLTrainConfig, resume: str = "") -> Path:
    """Train as configured; returns the run's folder."""
    interrupts = Interrupts()
    interrupts.install()
    set_seed(config.training.seed)
    place = (config.output_dir, config.exp_name, to_dict(config))
    if resume:
        run_dir = run_to_resume(resume, *place, typed_yaml.fixed_keys(RLTrainConfig), dict, "start a new run")
    else:
        run_dir = new_run_dir(*place)
    lock = take_run(run_dir, to_dict(config))
    try:
        ACRLPDTrainer(config, run_dir, interrupts).train(bool(resume))
    finally:
        os.close(lock)
    return run_dir


if __name__ == "__main__":
    run_command(main)
