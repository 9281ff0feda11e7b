"""Makes .venv from requirements.lock, and installs the software-GL libraries if it may.

    python3.11 tools/setup.py [--torch auto|cpu|cuda] [--browser] [--game] [--upstream] [--peers] [--qc] [--openpi] [--libero-pro]
                               [--libero-plus] [--lerobot PYTHON3.12]

With --game it also installs requirements-game.lock into .venv: the emulator for pi0.parallel; with --libero-pro
requirements-libero-pro.lock: LIBERO-PRO's changed tasks; with --libero-plus requirements-libero-plus.lock: LIBERO-plus's
variants. With --upstream it makes
.venv-upstream from requirements-upstream.lock instead, for tools/check_upstream.py; with --peers .venv-peers from
requirements-peers.lock, for benchmarks/parallel.py; with --qc .venv-qc from requirements-qc.lock, for benchmarks/qc.py;
with --openpi .venv-openpi from requirements-openpi.lock: openpi's client and server of policies, for tests; with --lerobot
.venv-lerobot from requirements-lerobot.lock, by a Python 3.12: LeRobot with this project's plug-in.

It runs with the system's Python before any package is installed, so it imports only the standard library. A second
run with the same lock file does nothing; a run after an interrupted one continues where that one stopped.
"""

import argparse
import contextlib
import ctypes.util
import glob
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Environment(NamedTuple):
    """A folder of its own Python, and the list of its packages."""

    folder: Path
    lock: Path

    @property
    def python(self):
        return self.folder / "bin" / "python"

    @property
    def stamp(self):
        return self.folder / "requirements.stamp"


PROJECT = Environment(ROOT / ".venv", ROOT / "requirements.lock")
UPSTREAM = Environment(ROOT / ".venv-upstream", ROOT / "requirements-upstream.lock")  # needs no OpenGL
PEERS = Environment(ROOT / ".venv-peers", ROOT / "requirements-peers.lock")
QC = Environment(ROOT / ".venv-qc", ROOT / "requirements-qc.lock")  # no torch
OPENPI = Environment(ROOT / ".venv-openpi", ROOT / "requirements-openpi.lock")  # no torch
LEROBOT = Environment(ROOT / ".venv-lerobot", ROOT / "requirements-lerobot.lock")
PLUGIN = ROOT / "plugins" / "lerobot"
GAME_LOCK = ROOT / "requirements-game.lock"
LIBERO_PRO_LOCK = ROOT / "requirements-libero-pro.lock"
LIBERO_PLUS_LOCK = ROOT / "requirements-libero-plus.lock"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")  # names of Chromium; any of them is enough
# The modules that a trainer, a rollout worker and a test import, some of them late.
IMPORTS = """
import contextlib, importlib, runpy
with contextlib.suppress(Exception):
    runpy.run_path("13_train_production_ready.py", run_name="imported")
with contextlib.suppress(Exception):
    importlib.import_module("pi0.libero.libero_import").prepare_libero()
for name in (
    "torch._dynamo torch.distributed.run torch.distributed.fsdp pi0.workers.serve pi0.libero.worker "
    "pi0.libero.controller libero.libero.envs.problems scipy.linalg h5py pyarrow.parquet av matplotlib.pyplot "
    "matplotlib.backends.backend_agg pytest xdist.plugin"
).split():
    with contextlib.suppress(Exception):
        importlib.import_module(name)
with contextlib.suppress(Exception):
    importlib.import_module("numba").njit(lambda x: 2 * x)(1.0)  # imports the rest of numba
"""
MESA_DRIVERS = ("/usr/lib/*/dri/swrast_dri.so", "/usr/lib*/dri/swrast_dri.so", "/usr/lib/*/libgallium-*.so")


def say(text):
    print(f"setup: {text}", flush=True)


def stop(text):
    sys.exit(f"setup: {text}")


def missing_system_packages(environment, browser):
    """Names of the Debian packages whose content this machine lacks; Chromium only if `browser`."""
    present = {"python3.11-venv": environment.python.exists() or importlib.util.find_spec("ensurepip")}
    if environment == PROJECT:
        present |= {
            "libegl1": ctypes.util.find_library("EGL"),
            "libgl1-mesa-dri": any(glob.glob(pattern) for pattern in MESA_DRIVERS),
            "libosmesa6": ctypes.util.find_library("OSMesa"),
        }
    if browser:
        present["chromium"] = any(map(shutil.which, BROWSERS))
    return [name for name, found in present.items() if not found]


def install_system_packages(environment, browser):
    """Install what is missing (as root), or print how; stop if nothing could render or `environment` not be made."""
    missing = missing_system_packages(environment, browser)
    if not missing:
        return
    command = f"apt-get update && apt-get install -y --no-install-recommends {' '.join(missing)}"
    if os.geteuid() == 0 and shutil.which("apt-get"):
        say(f"installing {' '.join(missing)}")
        variables = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        subprocess.run(command.replace("apt-get", "apt-get -q"), shell=True, env=variables, check=False)
        missing = missing_system_packages(environment, browser)
    if "python3.11-venv" in missing:
        stop(f"Python's venv module is incomplete; install it with: sudo sh -c '{command}'")
    # An NVIDIA driver brings its own EGL device, so Mesa's driver is needed only without one.
    has_egl = "libegl1" not in missing and ("libgl1-mesa-dri" not in missing or has_nvidia_gpu())
    if not has_egl and "libosmesa6" in missing:
        stop(f"no OpenGL library can render here; install one with: sudo sh -c '{command}'")
    if missing:
        needed_by = "the tests need it" if missing == ["chromium"] else "rendering may need it"
        say(f"not installed, {needed_by}: sudo sh -c '{command}'")


def has_nvidia_gpu():
    if not shutil.which("nvidia-smi"):
        return False
    listing = subprocess.run(["nvidia-smi", "-L"], check=False, capture_output=True, text=True)
    return listing.returncode == 0 and "GPU" in listing.stdout


def has_working_pip(environment):
    if not environment.python.exists():
        return False
    version = subprocess.run([environment.python, "-m", "pip", "--version"], check=False, capture_output=True)
    return version.returncode == 0


def pip(environment, *arguments):
    """Run pip install; returns what it wrote to standard error, or None when it succeeded."""
    install = [environment.python, "-m", "pip", "install", "--disable-pip-version-check", "--no-compile"]
    command = list(map(str, [*install, *arguments]))
    run = subprocess.run(command, check=False, stderr=subprocess.PIPE, text=True)
    return run.stderr if run.returncode else None


def pip_or_stop(environment, *arguments):
    errors = pip(environment, *arguments)
    if errors is not None:
        stop(f"pip could not install the packages; run the same command again to continue\n{errors}")


def install_torch(environment, requirement, build):
    """Install torch: without CUDA packages for the CPU, with all its requirements on a GPU machine."""
    if build == "cpu":
        errors = pip(environment, "--no-deps", f"{requirement}+cpu")
        if errors is None:
            return
        if "No matching distribution" not in errors:
            stop(f"pip could not install torch; run the same command again to continue\n{errors}")
        say(
            f"no index offers {requirement}+cpu, so the default build is installed with its CUDA packages, "
            "several GB more. To avoid that, stop here, name an index with PyTorch's CPU builds in pip's own "
            "configuration (PIP_EXTRA_INDEX_URL) and run the same command again"
        )
    # The constraint keeps torch's requirements at the locked versions; a CPU build would also satisfy `==`.
    default_build = f"{requirement},!={requirement.partition('==')[2]}+cpu"
    pip_or_stop(environment, "--constraint", environment.lock, default_build)


def discard_half_installed(environment):
    """Remove packages whose installation was interrupted: pip writes RECORD last, but skips a package with a name."""
    for information in environment.folder.glob("lib/python*/site-packages/*.dist-info"):
        if not (information / "RECORD").exists():
            shutil.rmtree(information)


def compile_what_runs_import():
    """Write bytecode of the modules that every process imports, and of no others, which would take 200 MB.

    Python does this itself, but not in an image that sets PYTHONDONTWRITEBYTECODE. There each process would spend
    seconds on it. A module that cannot be imported here fails when it is needed.
    """
    refused = ("PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX")
    variables = {name: value for name, value in os.environ.items() if name not in refused}
    command = [PROJECT.python, "-c", IMPORTS]
    with contextlib.suppress(subprocess.TimeoutExpired):  # it is worth seconds, not more
        subprocess.run(command, cwd=ROOT, env=variables, check=False, capture_output=True, timeout=120)


def main():
    if sys.version_info[:2] != (3, 11):
        stop(
            f"Python 3.11 is needed, but {sys.executable} is {sys.version.split()[0]}. Install python3.11, "
            "or name one: make setup PYTHON=/path/to/python3.11"
        )
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--torch", choices=("auto", "cpu", "cuda"), default="auto", help="which build of torch"
    )
    parser.add_argument(
        "--browser", action="store_true", help="also Chromium, in which the tests open the report"
    )
    parser.add_argument(
        "--upstream", action="store_true", help="make .venv-upstream, an environment of openpi's PyTorch code"
    )
    parser.add_argument(
        "--peers", action="store_true", help="make .venv-peers, an environment of other projects' trainers"
    )
    parser.add_argument(
        "--qc", action="store_true", help="make .venv-qc, an environment of OGBench and of what qc imports"
    )
    parser.add_argument(
        "--openpi",
        action="store_true",
        help="make .venv-openpi, an environment of openpi's policy client and server",
    )
    parser.add_argument(
        "--lerobot",
        metavar="PYTHON3.12",
        help="make .venv-lerobot by this interpreter, an environment of LeRobot with this project's plug-in (5 GB)",
    )
    parser.add_argument("--game", action="store_true", help="also the emulator for pi0.parallel (500 MB)")
    parser.add_argument("--libero-pro", action="store_true", help="also LIBERO-PRO's changed tasks (6 MB)")
    parser.add_argument(
        "--libero-plus", action="store_true", help="also LIBERO-plus's variants of tasks (25 MB)"
    )
    options = parser.parse_args()
    environment = PROJECT
    others = (
        (UPSTREAM, options.upstream), (PEERS, options.peers), (QC, options.qc), (OPENPI, options.openpi),
        (LEROBOT, options.lerobot),
    )  # fmt: skip
    for other, chosen in others:
        environment = other if chosen else environment
    build = options.torch
    if build == "auto":
        build = "cuda" if has_nvidia_gpu() else "cpu"

    python = python_3_12(options.lerobot) if options.lerobot else sys.executable
    install_system_packages(environment, options.browser)
    install_environment(environment, build, python)
    if options.lerobot:
        pip_or_stop(LEROBOT, "--no-deps", "--no-build-isolation", "--editable", ROOT, "--editable", PLUGIN)
    if options.game:
        install_optional(GAME_LOCK)
    if options.libero_pro:
        install_optional(LIBERO_PRO_LOCK)
    if options.libero_plus:
        install_optional(LIBERO_PLUS_LOCK)


def python_3_12(name):
    """The interpreter of that name, if it is one of Python 3.12 and runs."""
    found = shutil.which(name)
    version = [found, "-c", "import sys; print(*sys.version_info[:2], sep='.')"]
    run = subprocess.run(version, check=False, capture_output=True, text=True) if found else None
    if run is None or run.returncode or run.stdout.strip() != "3.12":
        stop(
            f"LeRobot needs Python 3.12, and {name!r} is none; name one: make lerobot PYTHON312=/path/to/python3.12"
        )
    return found


def install_environment(environment, build, python=sys.executable):
    """Install the packages of an environment's lock file, unless they are there."""
    lock_text = environment.lock.read_text()
    stamp = f"{hashlib.sha256(lock_text.encode()).hexdigest()} torch-{build}\n"
    if environment.stamp.exists() and environment.stamp.read_text() == stamp and environment.python.exists():
        return

    start = time.monotonic()
    environment.stamp.unlink(missing_ok=True)
    requirements = re.findall(r"^[\w.-]+==\S+", lock_text, flags=re.MULTILINE)
    torch = next((requirement for requirement in requirements if requirement.startswith("torch==")), None)
    builders = [requirement for requirement in requirements if requirement.startswith("setuptools==")]
    if not has_working_pip(environment):
        say(f"making {environment.folder.name}")
        subprocess.run([python, "-m", "venv", "--clear", str(environment.folder)], check=True)
    discard_half_installed(environment)
    of_torch = f", torch for {build}" if torch else ""
    say(f"installing {len(requirements)} packages from {environment.lock.name}{of_torch}")
    if torch:
        install_torch(environment, torch, build)
    if builders:  # without build isolation the locked setuptools builds bddl, not the newest one
        pip_or_stop(environment, "--no-deps", *builders)
    others = [requirement for requirement in requirements if requirement not in (torch, *builders)]
    pip_or_stop(environment, "--no-deps", "--no-build-isolation", "--use-pep517", *others)
    if environment == PROJECT:
        compile_what_runs_import()
    environment.stamp.write_text(stamp)
    say(f"{environment.folder.name} is ready after {time.monotonic() - start:.0f} s")


def install_optional(lock):
    """Install the packages of an optional lock file into .venv, unless they are there."""
    stamp = PROJECT.folder / f"{lock.stem}.stamp"
    text = lock.read_text()
    found = hashlib.sha256((PROJECT.stamp.read_text() + text).encode()).hexdigest() + "\n"
    if stamp.exists() and stamp.read_text() == found:
        return
    stamp.unlink(missing_ok=True)
    requirements = re.findall(r"^[\w.-]+==\S+", text, flags=re.MULTILINE)
    say(f"installing {len(requirements)} packages from {lock.name}")
    pip_or_stop(PROJECT, "--no-deps", *requirements)
    stamp.write_text(found)


if __name__ == "__main__":
    main()
