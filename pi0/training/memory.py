"""The memory that a run uses."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pi0.ranks.collectives import gather
from pi0.report.declaration import Curve, Metric

RELEASE_EVERY = 10  # iterations
# Parameters of mallopt(3): size from which malloc maps each piece separately, and how much may be free at the heap's end.
_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1
_LARGEST_MMAP_THRESHOLD = 32 << 20  # the largest that all versions accept

# Metrics of `memory_use`, for a trainer that records them as "memory" and has a plot of that name.
METRICS = tuple(
    Metric(
        f"memory/{name}",
        "MB",
        meaning,
        curves=(Curve("memory", "memory (GB)", label, scale=1e-3, span=(0, None)),) if label else (),
    )
    for name, meaning, label in (
        ("rss_mb", "resident memory of rank 0", "main process"),
        (
            "workers_mb",
            "memory of its workers together (pages they share count for each)",
            "simulator processes",
        ),
        ("worker_mb", "memory of each of its workers, by the worker's number", ""),
        ("gpu_mb", "largest memory on its GPU during the step; null without a GPU", "GPU"),
        ("other_ranks", "the same for each other rank, by rank", ""),
    )
)


def resident_mb(process: int | str = "self") -> float:
    """Resident memory of a process, MB; 0 if the process has ended."""
    try:
        pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


@dataclass(frozen=True)
class MemoryNow:
    """Memory of this process, in MB.

    Attributes:
        resident: in the computer's memory.
        peak: most of it since the process began.
        gpu, gpu_reserved: of tensors on its GPU, and what PyTorch holds there for them; None without a GPU.
        gpu_peak: most of `gpu` since the last `memory_use`, or since the process began.
    """

    resident: float
    peak: float
    gpu: float | None = None
    gpu_reserved: float | None = None
    gpu_peak: float | None = None


def memory_now(device: torch.device) -> MemoryNow:
    """Memory of this process, after garbage is collected.

    Args:
        device: where its networks are.
    """
    gc.collect()
    resident, status = resident_mb(), Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) * 1024 / 1e6 for line in status if line.startswith("VmHWM:"))
    if device.type != "cuda":
        return MemoryNow(resident, peak)
    of_gpu = (torch.cuda.memory_allocated, torch.cuda.memory_reserved, torch.cuda.max_memory_allocated)
    return MemoryNow(resident, peak, *(ask(device) / 1e6 for ask in of_gpu))


def bytes_held(tensors: Iterable[torch.Tensor], counted: set[int]) -> int:
    """Bytes of the memory behind tensors on this rank; of a shard, what lies here.

    Args:
        tensors: several may share memory, which counts once.
        counted: addresses of memory that has been counted already; what is new is added.
    """
    total = 0
    for tensor in tensors:
        detached = tensor.detach()
        local = detached.to_local() if hasattr(detached, "to_local") else detached
        storage = local.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in counted:
            counted.add(storage.data_ptr())
            total += storage.nbytes()
    return total


def release() -> None:
    """Collect garbage, and return the memory that malloc keeps to the system; else it would grow step by step.

    Until the next call malloc keeps freed memory: the next minibatch needs it again, and returning a page and getting
    it back costs time (`benchmarks/stage13_parts.py`).
    """
    gc.collect()
    if not gc.get_freeze_count():
        gc.freeze()  # objects made by imports stay, and need not be examined each time
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "malloc_trim"):  # not glibc
        return
    # Both or none: the first alone turns off malloc's own thresholds, and then even more memory is returned.
    if libc.mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD):
        libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    libc.malloc_trim(0)


def memory_use(workers: Iterable[int]) -> dict[str, Any]:
    """Memory now, in MB; a collective that returns the same on all ranks.

    Args:
        workers: process ids of this rank's rollout workers.
    Returns:
        For rank 0: `rss_mb` of the process, `workers_mb` of all its workers together, `worker_mb` of each by its
        number, `gpu_mb` at most since the last call (None without a GPU). `other_ranks`: the same for each, by rank.
    """
    first, *others = gather(_memory_of_this_rank(workers))
    return {**first, "other_ranks": {str(rank): use for rank, use in enumerate(others, 1)}}


def _memory_of_this_rank(workers: Iterable[int]) -> dict[str, Any]:
    gpu = None
    if torch.cuda.is_available():
        gpu = torch.cuda.max_memory_allocated() / 1e6
        torch.cuda.reset_peak_memory_stats()
    each = {str(number): resident_mb(process) for number, process in enumerate(workers)}
    return {"rss_mb": resident_mb(), "workers_mb": sum(each.values()), "worker_mb": each, "gpu_mb": gpu}


def growth(history: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each rank whose memory, or GPU memory, is at a new high, more than 50% above the third step's.

    Args:
        history: rows of steps, each with `memory_use` as "memory"; the first two allocate memory that stays.
    """
    lines = []
    ranks = {"0", *(rank for row in history[-1:] for rank in row["memory"]["other_ranks"])}
    for rank in sorted(ranks, key=int):
        # A run resumed with another number of ranks, or with an earlier version's metrics, lacks it in some steps.
        uses = {
            row["step"]: {"0": row["memory"], **row["memory"].get("other_ranks", {})} for row in history[2:]
        }
        steps = [step for step, of in uses.items() if rank in of]
        for name, sizes in {
            "memory": [uses[step][rank]["rss_mb"] + uses[step][rank]["workers_mb"] for step in steps],
            "GPU memory": [uses[step][rank]["gpu_mb"] or 0.0 for step in steps],
        }.items():
            if len(sizes) > 1 and sizes[-1] > 1.5 * sizes[0] and sizes[-1] >= max(sizes):
                whose = f"{name} of rank {rank}" if len(ranks) > 1 else name
                change = f"from {sizes[0]:.0f} to {sizes[-1]:.0f} MB since step {steps[0]}"
                lines.append(f"{whose} has grown {change}")
    return lines
