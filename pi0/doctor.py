"""Checks a machine before a long run: `python -m pi0.doctor [--config_path FILE] [--override KEY=VALUE ...]`.

Each finding is one line: `ok`, `note` (a run would work, but see this) or `stop` (a run would fail), what was
found, and the remedy. Without a configuration it checks the defaults, and no policy. The exit status is 1 if
something would stop a run.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from pi0.base.errors import InputError, OutputError, run_command
from pi0.base.paths import DATA_ROOT, INSTALLED, cache_dir

# A check imports the packages it needs itself, because a package may be missing.
if TYPE_CHECKING:
    from pi0 import PI0Policy
    from pi0.libero.suites import Task
    from pi0.ript.config import AlgoConfig, Config

SET_UP = f"pip install --no-deps -r {DATA_ROOT / 'requirements.lock'}" if INSTALLED else "make setup"
OK, NOTE, STOP = "ok", "note", "stop"
GIB = 2**30
# A run writes checkpoints, videos and logs, and scenes into the cache; with less space it may end in the middle.
DISK_NEEDED_GIB = 2
# A worker process with one scene of LIBERO's own meshes needs at most 1.1; the trainer is that of the small policy.
WORKER_GIB, TRAINER_GIB = 1.2, 1.5
# Pixels a side: the input of published policies, and the frames that openpi draws in LIBERO and resizes to it
# (examples/libero/main.py: resize_size, and LIBERO_ENV_RESOLUTION, "resolution used to render training data").
PUBLISHED_INPUT, PUBLISHED_FRAMES = 224, 256


@dataclass(frozen=True)
class Finding:
    """One line of the report. `mend` is the remedy, empty if none is needed."""

    status: str
    subject: str
    text: str
    mend: str = ""

    def __str__(self) -> str:
        return f"{self.status:4}  {self.subject:12}  {self.text}" + (f"; {self.mend}" if self.mend else "")


def check_python() -> Iterator[Finding]:
    """Whether the interpreter is the one of the lock file."""
    version = f"Python {sys.version.split()[0]} ({sys.executable})"
    if sys.version_info[:2] == (3, 11):
        yield Finding(OK, "python", version)
    else:
        yield Finding(NOTE, "python", version, "the locked packages are for 3.11: run .venv/bin/python")


def locked_versions(lock: Path = DATA_ROOT / "requirements.lock") -> dict[str, str]:
    """Version of every package in the lock file, by name."""
    return dict(re.findall(r"^([\w.-]+)==([^\s;#]+)", lock.read_text(), flags=re.MULTILINE))


def needed_versions() -> dict[str, str]:
    """Locked versions of what must be there: in a checkout all, else what the project asks for and LIBERO's packages."""
    locked = locked_versions()
    if not INSTALLED:
        return locked
    from pi0.libero.libero_import import INSTALLED_ALONE

    asked = [line for line in metadata.requires("ript-pi0") or [] if "extra ==" not in line]
    names = {re.split(r"[\s<>=!~;\[]", line, maxsplit=1)[0] for line in asked}
    return {name: version for name, version in locked.items() if name in names | {*INSTALLED_ALONE}}


def check_packages(locked: dict[str, str]) -> Iterator[Finding]:
    """Installed packages against the lock file; a local suffix of the version (torch's +cpu) does not matter."""
    differing = 0
    for name, version in locked.items():
        try:
            installed = metadata.version(name)
        except metadata.PackageNotFoundError:
            differing += 1
            yield Finding(STOP, "packages", f"{name} is missing", f"run: {SET_UP} (for {name} {version})")
            continue
        if installed.partition("+")[0] != version:
            differing += 1
            yield Finding(NOTE, "packages", f"{name} is {installed}, locked is {version}", f"run: {SET_UP}")
    if not differing:
        yield Finding(OK, "packages", f"{len(locked)} packages as locked")


def check_gl() -> Iterator[Finding]:
    """Back ends that can draw a frame; each is tried in a process of its own."""
    from pi0.libero.gl import BACKENDS, INSTALL_HINT, probe, wrong_device

    asked = os.environ.get("MUJOCO_GL", "").lower()
    if asked and asked not in BACKENDS:
        known = ", ".join(BACKENDS)
        yield Finding(STOP, "gl", f"MUJOCO_GL={asked} draws on a screen only", f"set it to one of {known}")
        return
    outcomes = [probe(backend) for backend in ((asked,) if asked else BACKENDS)]
    # If one works, failures of the others are only notes.
    failed = NOTE if any(outcome.works for outcome in outcomes) else STOP
    for outcome in outcomes:
        if outcome.works:
            yield Finding(OK, "gl", f"{outcome.backend} draws frames ({outcome.detail})")
        elif wrong := wrong_device(outcome):
            yield Finding(STOP, "gl", wrong)
        else:
            mend = "another back end works" if failed == NOTE else INSTALL_HINT
            yield Finding(failed, "gl", f"{outcome.backend} does not draw: {outcome.detail}", mend)


def check_gpus() -> Iterator[Finding]:
    """NVIDIA GPUs, whether torch sees them, and the EGL devices that can draw frames."""
    import torch

    listing = _output(["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"])
    gpus = [line for line in (listing or "").splitlines() if line.strip()]
    for index, gpu in enumerate(gpus):
        yield Finding(OK, "gpu", f"{index}: {gpu}")
    if not gpus:
        yield Finding(OK, "gpu", "none; networks run on the CPU")
    elif torch.cuda.is_available():
        yield Finding(OK, "gpu", f"torch {torch.__version__} sees {torch.cuda.device_count()} of them")
    else:
        yield Finding(
            NOTE, "gpu", f"torch {torch.__version__} sees none of them", "run: make setup TORCH=cuda"
        )
    devices = _output([sys.executable, "-c", _EGL_DEVICES], MUJOCO_GL="egl", PYOPENGL_PLATFORM="egl")
    count = int(devices) if devices else 0
    if count >= max(1, len(gpus)):
        yield Finding(OK, "gpu", f"EGL devices to draw on: {count} (MUJOCO_EGL_DEVICE_ID picks one)")
    else:
        mend = "install the NVIDIA driver's EGL library (libnvidia-gl), or frames are drawn by the CPU"
        yield Finding(
            NOTE, "gpu", f"EGL devices: {count}, GPUs: {len(gpus)}", mend if gpus else "see gl above"
        )


def check_cache() -> Iterator[Finding]:
    """Whether the folder of the cache can be written, and whether there is enough space."""
    try:
        folder = cache_dir()
    except OutputError as error:
        yield Finding(STOP, "cache", str(error))
        return
    free = shutil.disk_usage(folder).free / GIB
    if free < DISK_NEEDED_GIB:
        text = f"{free:.1f} GiB free in {folder}; compiled scenes may find no place"
        yield Finding(
            NOTE, "cache", text, f"free {DISK_NEEDED_GIB} GiB, or set PI0_CACHE_DIR to another disk"
        )
    else:
        yield Finding(OK, "cache", f"{free:.0f} GiB free in {folder}")


def check_assets(configured: str | None) -> Iterator[Finding]:
    """The meshes and textures that LIBERO would use."""
    from pi0.libero.assets import AssetsError, resolve_assets

    try:
        assets = resolve_assets(configured)
    except AssetsError as error:
        mend = "correct task.assets or LIBERO_ASSETS, or remove them"
        yield Finding(STOP, "assets", str(error), mend)
        return
    except OutputError:  # of the cache, which has a check of its own
        yield Finding(STOP, "assets", "none, since the stand-ins cannot be made", "see cache above")
        return
    if assets.source == "standins" and configured != "standins":
        mend = "to use LIBERO's own, set task.assets or LIBERO_ASSETS to their folder"
        yield Finding(NOTE, "assets", "none found; built-in stand-ins are used", mend)
    else:
        yield Finding(OK, "assets", f"{assets.source}: {assets.path}")


def check_init_states(suite: str, names: Sequence[str | int]) -> Iterator[Finding]:
    """LIBERO's recorded initial states of the tasks."""
    from pi0.libero.suites import DamagedPackageError, find_tasks

    try:
        tasks = find_tasks(suite, list(names))
    except ValueError as error:
        yield Finding(
            STOP, "tasks", str(error), "correct task.benchmark_name, task_name or task_names_to_use"
        )
        return
    if not all(task.has_recorded_states for task in tasks):
        yield Finding(
            OK, "init states", f"drawn for {len(tasks)} tasks of {suite}, also those of the evaluation"
        )
        return
    counts = []
    for task in tasks:
        try:
            counts.append(len(task.recorded_init_states()))
        except DamagedPackageError as error:
            yield Finding(STOP, "init states", f"{task.name}: {error}")
    if len(counts) == len(tasks):
        yield Finding(OK, "init states", f"{sum(counts)} recorded for {len(tasks)} tasks of {suite}")


def check_checkpoint(config: "Config") -> Iterator[Finding]:
    """Whether the policy loads, its statistics fit, and it acts on a task's prompt."""
    import numpy as np
    import torch

    from pi0 import PI0Policy
    from pi0.libero.environments import refuse_other_robots
    from pi0.libero.suites import find_tasks
    from pi0.model.config import SiglipDims
    from pi0.policy.normalization import NormStatsError

    path = Path(config.policy_path)
    how = {
        "dtype": getattr(torch, config.dtype),
        "norm_stats_path": config.norm_stats_path,
        "trainable": config.training.trainable,
    }
    try:
        size, free = PI0Policy.bytes_of_weights(path, **how), _available_memory()
        if size > free:
            text = f"{path} takes {size / GIB:.1f} GiB as {config.dtype}, but {free / GIB:.1f} GiB are free"
            lower = config.dtype == "float32" and not config.training.use_fsdp
            yield Finding(STOP, "checkpoint", text, "free memory" + ", or set dtype: bfloat16" * lower)
            return
        policy = PI0Policy.from_pretrained(path, **how)
        refuse_other_robots(policy.config)
    except NormStatsError as error:
        yield Finding(STOP, "norm stats", str(error), "set norm_stats_path to the statistics of its training")
        return
    except (OSError, ValueError) as error:
        keys = "policy_path" if config.norm_stats_path is None else "policy_path or norm_stats_path"
        mend = f"correct {keys}, or make one: python -m pi0.warmstart"
        yield Finding(STOP, "checkpoint", str(error), mend)
        return
    network = policy.config
    millions = sum(parameter.numel() for parameter in policy.parameters()) / 1e6
    yield Finding(
        OK, "checkpoint", f"{path}: {millions:.1f} M parameters, chunks of {network.action_horizon}"
    )

    if policy.norm_stats is None:
        yield Finding(STOP, "norm stats", f"{path} has no norm_stats.json", "set norm_stats_path")
        return
    features = f"state {network.robot_state_dim}, actions {network.robot_action_dim} features"
    yield Finding(OK, "norm stats", features)
    for line in policy.norm_stats.floors:
        yield Finding(NOTE, "norm stats", line, "the feature was constant in the training data")

    if config.task.replan_steps > network.action_horizon:
        mend = f"set task.replan_steps to {network.action_horizon} or less"
        yield Finding(STOP, "checkpoint", f"task.replan_steps is {config.task.replan_steps}", mend)
    size = config.task.image_size or network.image_size
    published = isinstance(network.vision, SiglipDims) and network.image_size == PUBLISHED_INPUT
    learned_from = PUBLISHED_FRAMES if published else network.image_size
    if size < learned_from:
        text = f"frames are drawn with {size} pixels a side, but the policy learned from {learned_from}"
        yield Finding(NOTE, "images", text, f"set task.image_size to {learned_from}")
    tasks = find_tasks(config.task.benchmark_name, config.task.chosen)
    algo = config.algo
    if algo.cotraining_path is not None:
        yield _check_cotraining(algo, policy, tasks)
    image = np.zeros((1, size, size, 3), np.uint8)
    observation = {
        "images": dict.fromkeys(network.cameras, image),
        "state": np.zeros((1, network.robot_state_dim), np.float32),
        "prompt": [tasks[0].prompt],
    }
    policy.compiled = config.compile  # fails below if there is no compiler
    noise = torch.zeros(1, network.action_horizon, network.action_dim)
    try:
        policy.select_action(observation, noise)
        start = time.perf_counter()
        policy.select_action(observation, noise)
    except InputError as error:
        yield Finding(STOP, "checkpoint", f"does not act: {error}")
        return
    except (OSError, ValueError, RuntimeError) as error:
        mend = "use a policy that fits the task"
        if config.compile:
            mend = "install what torch.compile needs (apt-get install g++ python3.11-dev), or set compile to false"
        yield Finding(STOP, "checkpoint", f"does not act: {error}", mend)
        return
    yield Finding(OK, "checkpoint", f"acts; {1e3 * (time.perf_counter() - start):.0f} ms a chunk on the CPU")


def _check_cotraining(algo: "AlgoConfig", policy: "PI0Policy", tasks: "Sequence[Task]") -> Finding:
    from pi0.ript.cotraining import find_demonstrations

    try:
        _, indices = find_demonstrations(algo, policy, tasks)
    except (OSError, ValueError) as error:
        return Finding(STOP, "demonstrations", str(error), "correct algo.cotraining_path, or remove it")
    return Finding(
        OK, "demonstrations", f"{algo.cotraining_path}: {len(indices)} demonstrations of {len(tasks)} tasks"
    )


def check_output(folder: Path) -> Iterator[Finding]:
    """Whether results can be written, and whether there is enough space."""
    try:
        # The run itself makes the folder.
        existing = next(path for path in (folder, *folder.resolve().parents) if path.exists())
        with tempfile.TemporaryDirectory(dir=existing):
            pass
    except OSError as error:
        yield Finding(
            STOP, "disk", f"cannot write: {error}", "set output_dir to a folder that can be written"
        )
        return
    free = shutil.disk_usage(existing).free / GIB
    if free < DISK_NEEDED_GIB:
        mend = f"free {DISK_NEEDED_GIB} GiB, or set output_dir to another disk"
        yield Finding(STOP, "disk", f"{free:.1f} GiB free in {folder}", mend)
    else:
        yield Finding(OK, "disk", f"{free:.0f} GiB free in {folder}")


def check_memory_and_cores(workers: int | None) -> Iterator[Finding]:
    """Whether there is enough memory for workers and trainer, and a core for each worker."""
    from pi0.workers.pool import usable_cores

    cores = usable_cores()
    workers = workers or cores
    free, needed = _available_memory() / GIB, TRAINER_GIB + workers * WORKER_GIB
    text = f"{free:.1f} GiB free, about {needed:.1f} needed with {workers} workers"
    if free < needed:
        yield Finding(STOP, "memory", text, "set task.num_parallel_envs lower, or free memory")
    else:
        yield Finding(OK, "memory", text)
    if workers > cores:
        mend = f"task.num_parallel_envs={cores} is likely as fast"
        yield Finding(NOTE, "cores", f"{cores} for {workers} workers", mend)
    else:
        yield Finding(OK, "cores", f"{cores} for {workers} workers")


def examine(config: "Config | None") -> Iterator[Finding]:
    """Every check in turn; an unexpected error of a check is a finding too, and the other checks still run."""
    suite, names = (config.task.benchmark_name, config.task.chosen) if config else ("libero_spatial", [])
    checks: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("python", check_python),
        ("packages", lambda: check_packages(needed_versions())),
        ("gl", check_gl),
        ("gpu", check_gpus),
        ("memory", lambda: check_memory_and_cores(config.task.num_parallel_envs if config else None)),
        ("disk", lambda: check_output(Path(config.output_dir if config else "outputs"))),
        ("cache", check_cache),
        ("assets", lambda: check_assets(config.task.assets if config else None)),
        ("init states", lambda: check_init_states(suite, names)),
    ]
    if config:
        checks.append(("checkpoint", lambda: check_checkpoint(config)))
    for subject, check in checks:
        try:
            yield from check()
        except Exception as error:  # noqa: BLE001  (it is reported, and the other checks must run)
            yield Finding(STOP, subject, f"could not be checked: {type(error).__name__}: {error}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the findings one by one; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m pi0.doctor", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config_path", help="the configuration of the planned run")
    parser.add_argument(
        "--override",
        action="extend",
        nargs="*",
        default=[],
        metavar="KEY=VALUE",
        help="as for the stage scripts",
    )
    options = parser.parse_args(arguments)
    if options.override and not options.config_path:
        parser.error("--override changes a configuration: give it with --config_path")

    findings: list[Finding] = []

    def report(finding: Finding) -> None:
        findings.append(finding)
        print(str(finding).replace("\n", " "), flush=True)

    config = None
    if options.config_path:
        try:
            config = _read_config(options.config_path, options.override)
        except (ImportError, ValueError) as error:
            for line in str(error).splitlines():
                report(Finding(STOP, "config", line))
        else:
            report(Finding(OK, "config", options.config_path))
    for finding in examine(config):
        report(finding)
    stopping = sum(finding.status == STOP for finding in findings)
    print(f"findings that would stop a run: {stopping}" if stopping else "nothing would stop a run")
    return 1 if stopping else 0


def _read_config(path: str, overrides: Sequence[str]) -> "Config":
    from pi0.ript.config import load_config

    return load_config(path, overrides)


def _available_memory() -> int:
    """Memory in bytes that new processes can use."""
    match = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), flags=re.MULTILINE)
    if match is None:
        raise RuntimeError("/proc/meminfo has no MemAvailable")
    return 1024 * int(match.group(1))


def _output(command: Sequence[str], **environment: str) -> str | None:
    """Standard output of a command, or None if it does not exist, fails or takes half a minute."""
    try:
        run = subprocess.run(
            command,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout if run.returncode == 0 else None


_EGL_DEVICES = "from mujoco.egl import egl_ext; print(len(egl_ext.eglQueryDevicesEXT()))"


if __name__ == "__main__":
    run_command(main)
