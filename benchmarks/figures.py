"""Writes the pictures of benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def save(figure: Figure, file: Path, dpi: int = 100) -> None:
    """Write a figure as a PNG, in a folder that may be new, and say where; the same figure gives the same bytes."""
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=dpi, metadata={"Software": None})
    print(f"written to {file}")
