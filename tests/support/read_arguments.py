"""Run a program until its own parser has read the arguments and what they name is found; status 0 if it is.

Usage: read_arguments.py STAND_INS WORDS...
STAND_INS: words, in JSON, that stand for what a user has come by; WORDS: as after `python`, or from `torchrun` on.
"""

import argparse
import json
import os
import runpy
import sys
from pathlib import Path

from torch.distributed.run import parse_args as parse_launch

from pi0.acrlpd.config import get_config, load_rl_config
from pi0.libero.suites import find_tasks, suite_tasks
from pi0.ript.config import check_evaluation, load_config

parse_args = argparse.ArgumentParser.parse_args
stand_ins = json.loads(sys.argv[1])


def parse_and_end(parser, *arguments):
    look_up(vars(parse_args(parser, *arguments)))
    os._exit(0)  # taking down all that was imported would take a second


def look_up(options: dict) -> None:
    """Find what the arguments name; raises `InputError` or `AssertionError`."""
    if options.get("config_path") and "override" not in options:  # a trainer whose keys are options
        assert Path(options["config_path"]).is_file(), options["config_path"]
    elif options.get("config") or str(options.get("config_path", "")).startswith("configs/acrlpd"):
        overrides = options["override"]
        preset, path = options.get("config"), options.get("config_path")
        config = get_config(preset, overrides) if preset else load_rl_config(path, overrides)
        assert is_there(config.policy_path), config.policy_path
    elif options.get("config_path"):
        config = load_config(options["config_path"], options["override"])
        check_evaluation(config, find_tasks(config.task.benchmark_name, config.task.chosen))
        assert is_there(config.policy_path), config.policy_path
    if options.get("policy_path") is not None:  # else the policy runs elsewhere
        assert is_there(options["policy_path"]), options["policy_path"]
    if "tasks" in options and "suite" in options:
        find_tasks(options["suite"], options["tasks"])
    for suite in options.get("suites", []):
        suite_tasks(suite)


def is_there(checkpoint: str) -> bool:
    """Whether a checkpoint is there, or stands for one that a user has come by or has trained."""
    return checkpoint in stand_ins or Path(checkpoint).is_dir()


words = sys.argv[2:]
if words[0] == "torchrun":
    launch = parse_launch(words[1:])
    words = [*(["-m"] if launch.module else []), launch.training_script, *launch.training_script_args]
argparse.ArgumentParser.parse_args = parse_and_end
if words[0] == "-m":
    sys.argv, sys.path[0] = words[1:], os.getcwd()
    runpy.run_module(words[1], run_name="__main__", alter_sys=True)
else:
    sys.argv, sys.path[0] = words, str(Path(words[0]).resolve().parent)
    runpy.run_path(words[0], run_name="__main__")
