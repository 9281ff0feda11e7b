"""The rooms of the package: imports point down, no two trainers know each other, and no folder is in a circle.

`ROOMS` is docs/architecture.md's house, from the top down. A name in a string counts as an import too where it is the
place of a class for `pi0.workers` ("pi0.libero.worker:Worker").
"""

import ast
import re
from pathlib import Path

import pytest

from pi0.base.paths import REPO_ROOT

PACKAGE = REPO_ROOT / "pi0"
DOORS = "doors"
ROOMS = [
    (DOORS,),
    ("stages",),
    ("ript", "parallel", "acrlpd"),  # trainers: none imports another
    ("libero",),
    ("training",),
    ("report",),
    ("ranks",),
    ("data",),
    ("policy",),
    ("workers",),
    ("serving",),
    ("model",),
    ("base",),
]
FLOOR = {room: floor for floor, rooms in enumerate(ROOMS) for room in rooms}
KNOWN_TO_STAGES = {"base"}  # the lessons are about scripts and need nothing of what these do


def room_of(file: Path) -> str:
    """The folder of a module; commands (pi0/NAME.py, pi0/NAME/__main__.py) and stage scripts are doors."""
    parts = file.relative_to(REPO_ROOT).parts
    is_door = parts[0] != "pi0" or len(parts) == 2 or file.name == "__main__.py"
    return DOORS if is_door else parts[1]


def imported_modules(file: Path) -> list[tuple[int, str]]:
    """Modules of this package that a file imports, wherever in it, with their lines."""
    found: list[tuple[int, str]] = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found += [(node.lineno, name) for name in re.findall(r"^(pi0(?:\.\w+)+):\w+$", node.value)]
    return [(line, name) for line, name in found if name.partition(".")[0] == "pi0"]


def room_of_module(name: str) -> str:
    """The room that a dotted name leads to; `from pi0 import PI0Policy` leads to the policy."""
    first = name.split(".")[1] if "." in name else ""
    if first in ("PI0Policy", "pick_device"):
        return "policy"
    return first if (PACKAGE / first).is_dir() and first else DOORS


FILES = sorted([*PACKAGE.rglob("*.py"), *REPO_ROOT.glob("[01][0-9]_train_*.py")])
ARROWS = [
    (room_of(file), room_of_module(name), f"{file.relative_to(REPO_ROOT)}:{line} imports {name}")
    for file in FILES
    for line, name in imported_modules(file)
    if room_of(file) != room_of_module(name) and file != PACKAGE / "__init__.py"
]


def test_every_folder_of_the_package_is_a_room():
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and any(path.rglob("*.py"))}
    assert folders <= set(FLOOR), "give a new folder its place in ROOMS and in docs/architecture.md"


def test_imports_point_down():
    assert [said for start, end, said in ARROWS if FLOOR[start] >= FLOOR[end]] == []


def test_the_lessons_need_nothing_but_the_base():
    assert {end for start, end, _ in ARROWS if start == "stages"} <= KNOWN_TO_STAGES


def test_no_two_modules_import_each_other_in_a_circle():
    modules = {file: ".".join(file.relative_to(REPO_ROOT).with_suffix("").parts) for file in FILES}
    names = {name.removesuffix(".__init__"): name for name in modules.values()}
    needs: dict[str, set[str]] = {}
    for file, module in modules.items():
        for node in ast.parse(file.read_text()).body:  # at its top: what is imported later closes no circle
            if isinstance(node, ast.ImportFrom) and node.module:
                targets = [f"{node.module}.{alias.name}" for alias in node.names] + [node.module]
                needs.setdefault(module, set()).update(names[t] for t in targets if t in names)
    done: set[str] = set()

    def follow(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join((*way[way.index(module) :], module))
        if module not in done:
            for needed in sorted(needs.get(module, set()) - {module}):
                follow(needed, (*way, module))
            done.add(module)

    for module in sorted(needs):
        follow(module, ())


@pytest.mark.parametrize("room", sorted(set(FLOOR) - {DOORS, "acrlpd"}))
def test_the_house_is_described_as_it_stands(room):
    described = (REPO_ROOT / "docs" / "architecture.md").read_text()
    lines = [line for line in described.splitlines() if line.startswith(f"| `pi0/{room}/` |")]
    assert len(lines) == 1, f"docs/architecture.md has one line about pi0/{room}/"
    below = {end for start, end, _ in ARROWS if start == room}
    said = set(re.findall(r"`(\w+)`", lines[0].split("|")[3]))
    assert below <= said <= {name for name in FLOOR if FLOOR[name] > FLOOR[room]}
