"""How much memory a run takes."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import torch


def resident_mb(process: int | str = "self") -> float:
    """Resident memory of a process, MB; 0 for one that is gone."""
    try:
        pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def memory_use(workers: Iterable[int]) -> dict[str, float | None]:
    """Memory now, MB.

    Args:
        workers: ids of the rollout workers.
    Returns:
        `rss_mb` of this process, `workers_mb` of all its workers together, `gpu_mb` at most since the last
        call (None without a GPU).
    """
    gpu = None
    if torch.cuda.is_available():
        gpu = torch.cuda.max_memory_allocated() / 1e6
        torch.cuda.reset_peak_memory_stats()
    return {"rss_mb": resident_mb(), "workers_mb": sum(map(resident_mb, workers)), "gpu_mb": gpu}
