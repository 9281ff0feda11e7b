"""Train a policy for a game by PPO, with worker processes that each play the game by themselves.

    python -m pi0.parallel.train_parallel                                  # Airstriker, 8 workers
    python -m pi0.parallel.train_parallel --config_path configs/parallel_quickstart.yaml
    python -m pi0.parallel.train_parallel --n_workers 2 --mode sync --max_updates 20
    python -m pi0.parallel.train_parallel --game pi0.libero.gym_env:pi0/LIBERO-v0 --workers auto
    python -m pi0.parallel.train_parallel --resume                          # the newest run, or name its folder

Every key below is an option (--save_interval 5) and a line of the YAML file (save_interval: 5); options win. The run's
folder holds checkpoints, metrics.jsonl, report.html, videos and results.json. Ctrl+C stops after a checkpoint,
`kill -USR1` makes one. docs/parallel.md explains how it works.
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
import typing
from pathlib import Path
from typing import Any, NoReturn

from pi0.base import typed_yaml
from pi0.base.errors import run_command
from pi0.base.paths import DATA_ROOT
from pi0.parallel.config import Config, load_config
from pi0.parallel.trainer import ParallelTrainer

DEFAULT_CONFIG = DATA_ROOT / "configs" / "parallel.yaml"


class _Parser(argparse.ArgumentParser):
    """Names the nearest option where there is none."""

    def error(self, message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ")
        if unknown != message:
            word = re.split(r"[= ]", unknown)[0]
            there = [name for action in self._actions for name in action.option_strings]
            (near,) = difflib.get_close_matches(word, there, 1, 0.0)
            message = f"there is no option {word}; the nearest one is {near}, and --help lists all"
        super().error(message)


def parse_arguments(arguments: list[str] | None = None) -> tuple[Config, str]:
    """The command line: the configuration, and which run to resume."""
    parser = _Parser(
        prog="python -m pi0.parallel.train_parallel",
        description=__doc__,
        epilog=typed_yaml.help_text(Config),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config_path", default=DEFAULT_CONFIG, type=Path, help="YAML file, see configs/")
    parser.add_argument("--resume", nargs="?", const="newest", default="", help="the newest run, or a folder")
    keys = typed_yaml.describe_keys(Config)
    for description in keys:
        names = dict.fromkeys([f"--{description.name}", f"--{description.name.replace('_', '-')}"])
        flag: dict[str, Any] = {"nargs": "?", "const": "true"} if description.type is bool else {}
        if description.type == list[str]:  # KEY=VALUE, whose value may have commas
            flag["action"] = "append"
        parser.add_argument(*names, dest=description.name, metavar="VALUE", help=argparse.SUPPRESS, **flag)
    options = vars(parser.parse_args(arguments))
    overrides = []
    for description in keys:
        if (text := options[description.name]) is not None:
            written = json.dumps(text) if isinstance(text, list) else _as_yaml(text, description.type)
            overrides.append(f"{description.name}={written}")
    return load_config(options["config_path"], overrides), options["resume"]


def _as_yaml(text: str, kind: object) -> str:
    """An option's text as YAML: `0.3,0.1` is a list, and what takes text takes numbers, too."""
    if typing.get_origin(kind) is list:
        return text if text.startswith("[") else f"[{text}]"
    takes_text = kind is str or (str in typing.get_args(kind) and text != "null")
    return json.dumps(text) if takes_text else text


def main(arguments: list[str] | None = None) -> None:
    """Read the options, train."""
    config, resume = parse_arguments(arguments)
    ParallelTrainer.of(config, resume).train()


if __name__ == "__main__":
    run_command(main)
