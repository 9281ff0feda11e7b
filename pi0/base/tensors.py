"""Files that hold tensors."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from pi0.base.errors import OutputError


def count_not_finite(tensor: Tensor) -> int:
    """How many elements are infinite or no numbers."""
    if not tensor.numel() or torch.stack(tensor.aminmax()).isfinite().all():  # faster than each element
        return 0
    return int((~tensor.isfinite()).sum())


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file.

    Raises:
        OutputError: the disk refuses.
    """
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=metadata)
    except (SafetensorError, OSError) as error:
        raise OutputError(f"{path} is not written: {error}; make room or choose another folder") from error
