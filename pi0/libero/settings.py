"""The sections `task` and `evaluation` of a configuration, which trainers and commands share."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_type_hints

from pi0.base.arguments import Collect
from pi0.base.typed_yaml import SlashedPath, key, show, unfit_values

Suite = Literal[
    "libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90",
    # LIBERO-PRO's changes of these (`pi0.libero.suites.PRO_SUITES`)
    "libero_pro/spatial_lan", "libero_pro/spatial_task", "libero_pro/spatial_swap", "libero_pro/spatial_object",
    "libero_pro/object_lan", "libero_pro/object_task", "libero_pro/object_swap", "libero_pro/object_object",
    "libero_pro/goal_lan", "libero_pro/goal_task", "libero_pro/goal_swap", "libero_pro/goal_object",
    "libero_pro/10_lan", "libero_pro/10_task", "libero_pro/10_swap", "libero_pro/10_object",
    # LIBERO-plus's variants of these (`pi0.libero.suites.PLUS_SUITES`)
    "libero_plus/spatial", "libero_plus/object", "libero_plus/goal", "libero_plus/10",
]  # fmt: skip
PRO, PLUS = "libero_pro/", "libero_plus/"  # how the names of changed suites begin
MAX_SEED = 2**31 - 1
RECORDED_STATES = 50  # for each task of every suite


def is_folder(suite: str) -> bool:
    """Whether a suite is a folder of BDDL files, and not one of LIBERO, LIBERO-PRO or LIBERO-plus."""
    return "/" in suite and not suite.startswith((PRO, PLUS))


@dataclass(kw_only=True)
class TaskConfig:
    """The tasks and how they are simulated."""

    benchmark_name: Suite | SlashedPath = key(
        "libero_spatial", "LIBERO suite, or a folder of BDDL files, each of which is a task", fixed=True
    )
    task_name: str | int | None = key(None, "the one task to train on, by name or index", low=0, fixed=True)
    task_names_to_use: list[str | int] = key(
        [],
        "tasks to train on, by name or index; empty: task_name, or every task of the suite",
        low=0,
        fixed=True,
    )
    assets: str | None = key(
        None,
        "folder of LIBERO's meshes and textures, or 'standins'; null: searched for, else stand-ins",
        fixed=True,
        path=True,
    )
    demonstrations: str | None = key(
        None,
        "folder of LIBERO's HDF5 demonstrations: practice starts from their first states, then from drawn ones",
        fixed=True,
        path=True,
    )
    held_out_states: int | None = key(
        None,
        "how many of LIBERO's 50 recorded states of each task only evaluation uses, from the first on; practice starts "
        "from the others. null: evaluation uses all, and practice starts from states drawn as LIBERO draws them",
        unit="states",
        low=1,
        high=49,
        fixed=True,
    )
    fixtures: Literal["libero_eval", "pinned"] = key(
        "libero_eval",
        "cabinet and stove: placed as in LIBERO's evaluation after env.seed(0); pinned: always at its first place",
        fixed=True,
    )
    num_parallel_envs: int | None = key(
        None, "worker processes that simulate; null: one on each core", unit="processes", low=1
    )
    rollouts_per_env: int = key(
        4, "rollouts that a worker runs at once; the policy acts on them together", unit="rollouts", low=1
    )
    max_open_tasks: int = key(
        10, "scenes that a worker keeps open; the least recently used is closed first", unit="tasks", low=1
    )
    max_episode_length: int | None = key(
        None,
        "an episode that is not solved in so many steps has failed; null: LIBERO's horizon for the suite",
        unit="control steps",
        low=1,
        fixed=True,
    )
    settle_steps: int = key(
        10, "steps of standing still before the policy acts", unit="control steps", low=0, fixed=True
    )
    replan_steps: int = key(
        10,
        "actions of a chunk that are executed before the policy observes again",
        unit="control steps",
        low=1,
        fixed=True,
    )
    image_size: int | None = key(
        None,
        "width and height of a camera image; null: the policy's image size. Published policies use 224, which openpi "
        "makes from 256: set 256 for them",
        unit="pixels",
        low=16,
        high=4096,
        fixed=True,
    )
    render: Literal["fast", "exact"] = key(
        "fast", "without shadows and reflections, or LIBERO's own images", fixed=True
    )

    @property
    def chosen(self) -> list[str | int]:
        """Names or indices of the tasks to train on; empty for every task of the suite."""
        return self.task_names_to_use if self.task_name is None else [self.task_name]


@dataclass(kw_only=True)
class ScoreConfig:
    """Evaluation of a policy, on initial states that are never trained on."""

    episodes: int = key(
        100, "episodes over all tasks, the same before and after", unit="episodes", low=1, fixed=True
    )
    seed: int = key(
        0, "seed of the policy's noise, the same before and after", low=0, high=MAX_SEED, fixed=True
    )


def task_conflicts(task: TaskConfig) -> list[str]:
    """Conflicts between keys of the section whose values are each valid, a line each."""
    conflicts: list[str] = []
    if task.task_name is not None and task.task_names_to_use:
        conflicts.append(
            f"task.task_name = {show(task.task_name)} and task.task_names_to_use = "
            f"{show(task.task_names_to_use)} are both given; give one of them"
        )
    if task.max_open_tasks < task.rollouts_per_env:
        conflicts.append(
            f"task.max_open_tasks = {task.max_open_tasks} is less than task.rollouts_per_env = "
            f"{task.rollouts_per_env}, whose tasks may all differ; set at least as many"
        )
    return conflicts


def add_task_options(parser: argparse.ArgumentParser) -> None:
    """The options that `task_of_command` reads: which tasks a command simulates, and how."""
    parser.add_argument(
        "--suite",
        default="libero_spatial",
        help="libero_spatial, _object, _goal, _10 or _90; LIBERO-PRO's changes of them: libero_pro/spatial_lan, ...; "
        "LIBERO-plus's variants: libero_plus/spatial, ...; or a folder of BDDL files, as a path with a slash",
    )
    parser.add_argument(
        "--tasks", action=Collect, nargs="*", default=[], help="tasks by index or name; none: the whole suite"
    )
    parser.add_argument("--assets", help="folder of LIBERO's assets, or standins; searched for by default")
    parser.add_argument(
        "--render",
        default="fast",
        choices=choices_of(TaskConfig, "render"),
        help="fast frames, or exactly LIBERO's",
    )
    parser.add_argument(
        "--image_size",
        type=range_of(TaskConfig, "image_size"),
        help="pixels a side of the frames, which are resized to the policy's; default: the policy's; openpi's: 256",
    )
    parser.add_argument(
        "--replan_steps",
        type=range_of(TaskConfig, "replan_steps"),
        help="actions executed of each chunk; default: all, at most 10; openpi's: 5",
    )
    parser.add_argument(
        "--max_episode_length",
        type=range_of(TaskConfig, "max_episode_length"),
        help="control steps; default: the suite's usual horizon",
    )
    parser.add_argument(
        "--settle_steps",
        type=range_of(TaskConfig, "settle_steps"),
        default=10,
        help="control steps of standing still before the policy acts",
    )
    parser.add_argument(
        "--workers",
        type=range_of(TaskConfig, "num_parallel_envs"),
        help="simulator processes; one on each core by default",
    )


# Common options of commands, by the key of the section that each of them sets.
_OPTIONS = {
    "benchmark_name": "suite",
    "task_names_to_use": "tasks",
    "assets": "assets",
    "fixtures": "fixtures",
    "render": "render",
    "image_size": "image_size",
    "replan_steps": "replan_steps",
    "max_episode_length": "max_episode_length",
    "settle_steps": "settle_steps",
    "num_parallel_envs": "workers",
}


def task_of_command(options: argparse.Namespace, **decided: Any) -> TaskConfig:
    """The task section from the options of a command.

    Args:
        options: the command line; a key without an option keeps its default.
        decided: keys that the command itself decides; they win over options.
    """
    given = {name: getattr(options, option) for name, option in _OPTIONS.items() if hasattr(options, option)}
    return TaskConfig(**given | decided)


def choices_of(section: type, name: str) -> tuple[str, ...]:
    """The `choices` of a command's option that sets a key of a section with a few words as values."""
    return get_args(get_type_hints(section)[name])


def range_of(section: type, name: str) -> Callable[[str], int]:
    """The `type` of a command's option that sets an integer key of a section.

    `argparse` then refuses the same numbers as the YAML schema, with the option's name.
    """

    def parse(text: str) -> int:
        value = int(text)
        if problems := unfit_values(section(**{name: value})):
            raise argparse.ArgumentTypeError(problems[0].removeprefix(f"{name} = "))
        return value

    parse.__name__ = "int"  # argparse prints this name if the text is not a number
    return parse
