"""What the machine is doing besides: CPU load and memory, and how many workers it has room for."""

from __future__ import annotations

import os
import time
from pathlib import Path

from pi0.base.errors import InputError

WORKER_MB = 150  # a worker of a console game; measured by benchmarks/parallel.py
LEARNER_MB = (
    900  # the trainer with its network, its optimizer and the transitions of an update, and two scorers
)
WARN_MEMORY = 80  # percent


def cpu_times() -> tuple[float, float]:
    """Seconds that all cores together have been busy, and that they have been there, since the machine started."""
    fields = [float(number) for number in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    ticks = os.sysconf("SC_CLK_TCK")
    return (sum(fields) - fields[3] - fields[4]) / ticks, sum(fields) / ticks


class CpuMeter:
    """Share of all cores that was busy since the last reading."""

    def __init__(self) -> None:
        self._last = cpu_times()

    def percent(self) -> float:
        """Percent since the last call."""
        (busy, there), (was_busy, was_there) = cpu_times(), self._last
        self._last = busy, there
        return 100.0 * (busy - was_busy) / max(there - was_there, 1e-9)


def memory_mb() -> tuple[float, float]:
    """Memory that is free for programs and memory of the machine, MB, both within the container's limit."""
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    total, free = (int(lines[name].split()[0]) * 1024 / 1e6 for name in ("MemTotal", "MemAvailable"))
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if limit != "max":
            used = int(Path("/sys/fs/cgroup/memory.current").read_text()) / 1e6
            total = min(total, int(limit) / 1e6)
            free = min(free, total - used)
    except (OSError, ValueError):
        pass  # no such limit here
    return free, total


def memory_percent() -> float:
    """Share of the memory that is used, percent."""
    free, total = memory_mb()
    return 100.0 * (1 - free / total)


def require_memory(workers: int) -> None:
    """Raise `InputError` if the memory is too little for so many workers: what is needed, what is free, how many fit."""
    free, _ = memory_mb()
    needed = LEARNER_MB + workers * WORKER_MB
    if needed > free:
        fit = max(0, int((free - LEARNER_MB) // WORKER_MB))
        advice = f"start with --n_workers {fit}" if fit else "end other programs"
        raise InputError(
            f"too little memory for {workers} workers: about {needed:.0f} MB are needed, {free:.0f} MB are free, "
            f"which is enough for {fit}; {advice}"
        )


def workers_for(load: float, free_mb: float) -> int:
    """How many workers suit a machine: 8 with a load of other programs below 50%, 4 below 80%, else 2; fewer if
    the free memory is too little for them."""
    wanted = 8 if load < 50 else 4 if load < 80 else 2
    while wanted > 2 and LEARNER_MB + wanted * WORKER_MB > free_mb:
        wanted //= 2
    return wanted


def choose_workers(seconds: float = 1.0) -> int:
    """`workers_for` this machine now; nothing of ours runs while it measures."""
    meter = CpuMeter()
    time.sleep(seconds)
    load = meter.percent()
    workers = workers_for(load, memory_mb()[0])
    print(f"workers = auto: {workers} workers, since other programs use {load:.0f}% of the CPU")
    return workers
