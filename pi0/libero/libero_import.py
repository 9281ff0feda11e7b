"""Import LIBERO without its questions.

LIBERO's first import asks on standard input where its data shall live, unless a configuration file is
already there, and its default place for that file is the user's home. This module writes the file into
the project's cache first.
"""

import importlib
import importlib.util
import logging
import os
import sys
from pathlib import Path
from types import ModuleType

import yaml

from pi0.base.files import write_whole
from pi0.base.paths import cache_dir

# What LIBERO brings along (matplotlib, software GL) keeps caches in the home unless told otherwise.
HOME_WRITERS = {"MPLCONFIGDIR": "matplotlib", "MESA_SHADER_CACHE_DIR": "mesa", "NUMBA_CACHE_DIR": "numba"}


def libero_package_root() -> Path:
    """Return the installed `libero/libero` folder, found without importing it.

    Raises:
        ModuleNotFoundError: hf-libero is not installed.
    """
    spec = importlib.util.find_spec("libero")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("LIBERO is not installed: pip install hf-libero==0.1.4")
    return Path(spec.origin).parent / "libero"


def prepare_libero() -> ModuleType:
    """Own LIBERO's configuration directory and return the imported `libero.libero` module.

    A `LIBERO_CONFIG_PATH` that the user set is respected, and a `config.yaml` already in it is left as it
    is. Safe to call again and from several processes at once.
    """
    imported = sys.modules.get("libero.libero")
    if imported is not None:
        return imported
    _quiet_robosuite()
    for variable, name in HOME_WRITERS.items():
        os.environ.setdefault(variable, str(cache_dir() / name))
    ours = cache_dir() / "libero"
    folder = Path(os.environ.setdefault("LIBERO_CONFIG_PATH", str(ours)))
    config_file = folder / "config.yaml"
    root = libero_package_root()
    wanted = yaml.safe_dump(
        {
            "benchmark_root": str(root),
            "bddl_files": str(root / "bddl_files"),
            "init_states": str(root / "init_files"),
            "datasets": str(folder / "datasets"),
            "assets": str(root / "assets"),
        }
    )
    # Our own file follows the environment when that moves; a user's file is the user's.
    stale = folder == ours and config_file.is_file() and config_file.read_text() != wanted
    if stale or not config_file.is_file():
        config_file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(config_file, wanted)
    return importlib.import_module("libero.libero")


def leave_out_wrappers() -> None:
    """For a process that needs LIBERO's tasks alone: keep its package of environments from importing its wrappers.

    They bring matplotlib and gymnasium, a quarter of the time that a worker takes to start. From then on
    `libero.libero.envs` itself is empty; its other submodules are what they always are.
    """
    prepare_libero()
    spec = importlib.util.find_spec("libero.libero.envs")
    assert spec is not None
    sys.modules.setdefault(spec.name, importlib.util.module_from_spec(spec))


def _quiet_robosuite() -> None:
    """Drop robosuite's advice to set up a private macro file, which nothing here needs."""

    def is_not_macro_advice(record: logging.LogRecord) -> bool:
        return "macro" not in record.getMessage()

    logging.getLogger("robosuite_logs").addFilter(is_not_macro_advice)
