"""The variants of LIBERO-plus: what their names say, and which of them can be drawn here.

The installed package is read as data. Its lists and robots are Python files, of which constants are taken from the
syntax tree; none of its code runs. The package holds no geometry, textures or lights: those are a download of its own.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from functools import cache

from pi0.base.errors import InputError
from pi0.libero.changes import UNMOVED, Change
from pi0.libero.libero_import import libero_plus_root

# How a name goes on after that of LIBERO's task (LIBERO-plus, benchmark/__init__.py and envs/env_wrapper.py).
_ENDINGS = (
    re.compile(
        r"(_language_(?P<language>\d+))?_view_(?P<view>\d+_\d+_\d+_\d+_\d+)_initstate_(?P<robot>\d+)(_noise_(?P<noise>\d+))?"
    ),
    re.compile(r"_(?P<light>light)_\d+"),
    re.compile(r"_(?P<background>table|tb)_\d+"),
    re.compile(r"(_moved)?_(?P<layout>add_\d+|level\d+_sample\d+)"),
)


class UnreadableVariantError(InputError, ValueError):
    """The installed LIBERO-plus has a variant that does not follow its own rules."""


@dataclass(frozen=True)
class Variant:
    """A variant of one of LIBERO's tasks.

    Attributes:
        name: LIBERO-plus's name of it.
        change: what it changes.
        goal: name of its BDDL file, without the ending; variants with the same one share a scene.
        instruction: name of the BDDL file that words its instruction; empty where LIBERO's holds.
        states: its file of initial states, below `init_files`.
        left_out: why it cannot be drawn; empty if it can.
    """

    name: str
    change: Change
    goal: str
    instruction: str
    states: str
    left_out: str


def read_name(name: str, bases: list[str]) -> tuple[str, dict[str, str]]:
    """The task of LIBERO that a variant changes, and what the rest of its name says.

    Args:
        name: LIBERO-plus's name.
        bases: names of LIBERO's tasks.

    Raises:
        UnreadableVariantError: the name has another form.
    """
    for base in sorted(bases, key=len, reverse=True):
        if name.startswith(base):
            for ending in _ENDINGS:
                if found := ending.fullmatch(name, len(base)):
                    return base, {key: value for key, value in found.groupdict().items() if value is not None}
    raise UnreadableVariantError(f"LIBERO-plus has a variant {name!r}, whose name cannot be read")


@cache
def variants(suite: str, bases: tuple[str, ...]) -> tuple[Variant, ...]:
    """All variants of a suite of LIBERO, in LIBERO-plus's order.

    Args:
        suite: such as libero_spatial.
        bases: names of its tasks.

    Raises:
        MissingPackageError: LIBERO-plus is not installed.
        UnreadableVariantError: a name has another form.
    """
    return tuple(_variant(suite, name, list(bases)) for name in _names()[suite])


def _variant(suite: str, name: str, bases: list[str]) -> Variant:
    base, said = read_name(name, bases)
    goal, instruction, states, left_out = base, "", f"{suite}/{base}.pruned_init", ""
    view: tuple[int, ...] = UNMOVED
    joints: tuple[float, ...] = ()
    noise = 0
    if "view" in said:
        view = tuple(int(number) for number in said["view"].split("_"))
        joints = robots()[int(said["robot"])] if int(said["robot"]) else ()
        noise = int(said.get("noise", 0))
        changed = {
            "language": "language" in said,
            "noise": noise > 0,
            "camera": view != UNMOVED,
            "robot": joints != (),
        }
        if sum(changed.values()) != 1:
            raise UnreadableVariantError(
                f"LIBERO-plus's variant {name!r} changes {sum(changed.values())} things"
            )
        (kind,) = (kind for kind, is_changed in changed.items() if is_changed)
        if kind == "language":
            instruction = f"{base}_language_{said['language']}"
    elif "light" in said:
        kind, left_out = "light", "its lights are in scene files that the package does not hold"
    elif "background" in said:
        kind, left_out = "background", "its textures are files that the package does not hold"
    else:
        kind, goal, states = "layout", name, f"libero_newobj/{suite}/{name}.pruned_init"
    return Variant(name, Change(kind, base, view, joints, noise), goal, instruction, states, left_out)


@cache
def robots() -> dict[int, tuple[float, ...]]:
    """The joints (rad) to which LIBERO-plus's robots are reset, by the number behind `_initstate_`."""
    file = libero_plus_root() / "envs" / "robots" / "mounted_panda.py"
    found = {}
    for robot in ast.parse(file.read_text()).body:
        number = isinstance(robot, ast.ClassDef) and re.fullmatch(r"MountedPanda(\d+)", robot.name)
        if number:
            (array,) = (node for node in ast.walk(robot) if isinstance(node, ast.List))
            found[int(number.group(1))] = tuple(float(joint) for joint in ast.literal_eval(array))
    return found


@cache
def _names() -> dict[str, list[str]]:
    """Names of variants by suite of LIBERO."""
    (statement,) = ast.parse((libero_plus_root() / "benchmark" / "libero_suite_task_map.py").read_text()).body
    assert isinstance(statement, ast.Assign)
    return ast.literal_eval(statement.value)
