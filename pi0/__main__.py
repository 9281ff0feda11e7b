"""All commands under one name: `pi0 evaluate` is `python -m pi0.evaluate`, and so on.

    python -m pi0 --help
    python -m pi0 evaluate --help

After `pip install .` the command is called `pi0`. `pi0 examples FOLDER` then copies the stage scripts, the configurations
and the warm-started policy, so that what the README says can be done in that folder.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import runpy
import shutil
import sys
from pathlib import Path

from pi0.base.errors import InputError, run_command
from pi0.base.paths import DATA_ROOT

MODULES = {
    "evaluate": "pi0.evaluate",
    "serve": "pi0.serve",
    "doctor": "pi0.doctor",
    "checkpoint": "pi0.checkpoint",
    "report": "pi0.report.__main__",
    "norm_stats": "pi0.norm_stats",
    "warmstart": "pi0.warmstart",
    "tokenizer": "pi0.tokenizer",
    "acrlpd": "pi0.acrlpd.train",
    "record": "pi0.acrlpd.record",
    "parallel": "pi0.parallel.train_parallel",
}
TRAIN = "13_train_production_ready.py"
# Copied by `pi0 examples`: what the README's commands name.
EXAMPLES = ("[01][0-9]_train_*.py", "configs/*.yaml", "checkpoints/*/*")


def main() -> None:
    """Run the command that the first argument names."""
    parser = argparse.ArgumentParser(
        prog="pi0", description=commands(), formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="pi0 COMMAND --help shows the arguments of a command.",
    )  # fmt: skip
    names = [*MODULES, "train", "examples"]
    parser.add_argument("name", metavar="COMMAND", choices=names, help="one of those above")
    parser.add_argument("rest", metavar="...", nargs=argparse.REMAINDER, help="its arguments")
    options = parser.parse_args()
    if options.name == "examples":
        copy_examples(options.rest)
    elif options.name == "train":
        sys.argv = [str(DATA_ROOT / TRAIN), *options.rest]
        sys.path.insert(0, str(DATA_ROOT))
        runpy.run_path(sys.argv[0], run_name="__main__")
    else:
        sys.argv = [f"pi0 {options.name}", *options.rest]
        runpy.run_module(MODULES[options.name], run_name="__main__", alter_sys=True)


def commands() -> str:
    """The commands, each with the first line of what it says of itself."""
    files = {name: Path(importlib.util.find_spec(module).origin) for name, module in MODULES.items()}  # type: ignore[union-attr, arg-type]
    lines = []
    for name, file in {**files, "train": DATA_ROOT / TRAIN}.items():
        said = (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").partition("\n")[0]
        lines.append(f"  {name:<11} {said}")
    lines.append(
        f"  {'examples':<11} Copy the stage scripts, configurations and the warm-started policy to a folder."
    )
    return "\n".join(lines)


def copy_examples(arguments: list[str]) -> None:
    """Copy what the README's commands name into a new folder.

    Raises:
        InputError: not one folder is named, or it is there.
    """
    if len(arguments) != 1 or arguments[0].startswith("-"):
        raise InputError("pi0 examples FOLDER: name one folder, which is not there yet")
    folder = Path(arguments[0])
    if folder.exists():
        raise InputError(f"{folder} is there already; name a folder that is not")
    for pattern in EXAMPLES:
        for file in sorted(DATA_ROOT.glob(pattern)):
            target = folder / file.relative_to(DATA_ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
    print(f"{folder}: try `cd {folder}`, then `pi0 train --config_path configs/quickstart.yaml`")


def command() -> None:
    """The installed command `pi0`."""
    run_command(main)


if __name__ == "__main__":
    command()
