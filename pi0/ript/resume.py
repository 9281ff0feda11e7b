"""What a resumed RIPT run is compared with: its settings, and what lies outside its folder but decides its results."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from typing import Any

from pi0.base.typed_yaml import fixed_keys
from pi0.libero import outside
from pi0.libero.environments import Environments
from pi0.libero.suites import find_tasks
from pi0.ript.config import Config, describe_keys


def comparable(settings: dict[str, Any]) -> dict[str, Any]:
    """The same settings (`to_dict`, or read from a file) with absolute paths, and tasks by index."""
    same = copy.deepcopy(settings)
    for description in describe_keys():
        *sections, name = description.name.split(".")
        content: Any = same
        for part in sections:
            content = content.get(part) if isinstance(content, dict) else None
        if description.path and isinstance(content, dict) and isinstance(content.get(name), str):
            content[name] = str(Path(content[name]).expanduser().resolve())
    task = same.get("task")
    if isinstance(task, dict):
        with contextlib.suppress(ValueError, TypeError):  # of a damaged file; it differs from what is valid
            suite = str(task.get("benchmark_name"))
            if task.get("task_name") is not None:
                task["task_name"] = find_tasks(suite, [task["task_name"]])[0].index
            named = task.get("task_names_to_use") or []
            task["task_names_to_use"] = [find_tasks(suite, [name])[0].index for name in named]
    return same


# Arguments of `pi0.training.run_folder.run_to_resume`: keys that must not change, and how settings are compared.
SETTINGS = (fixed_keys(Config), comparable)


def compare_outside(config: Config, environments: Environments, facts: dict[str, Any]) -> dict[str, Any]:
    """Fingerprints and versions of what the run stands on now, {"outside": {...}}, compared with those in its facts.

    Raises:
        OutputError: assets, BDDL files or the simulator are others.
    """
    paths = {
        "policy_path": config.policy_path,
        "norm_stats_path": config.norm_stats_path,
        "algo.cotraining_path": config.algo.cotraining_path,
        "task.demonstrations": config.task.demonstrations,
    }
    return outside.compare_outside(environments, facts, paths)
