"""Named arrays in one block of memory, which two processes can share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

# Name of each array, with its shape and type.
ArrayTable = Mapping[str, tuple[tuple[int, ...], DTypeLike]]

_ALIGNMENT = 64  # bytes; no two arrays share a cache line


def nbytes(table: ArrayTable) -> int:
    """Size of the block that holds a table's arrays, bytes; at least 1, since no block is empty."""
    return max(1, sum(_size(shape, dtype) for shape, dtype in table.values()))


def arrays_in(block: Any, table: ArrayTable) -> dict[str, np.ndarray]:
    """A table's arrays by name, laid out in `block` in the table's order.

    Args:
        block: a writable buffer of `nbytes(table)` bytes, e.g. a `bytearray` or shared memory.
    """
    arrays, offset = {}, 0
    for name, (shape, dtype) in table.items():
        arrays[name] = np.ndarray(shape, dtype, buffer=block, offset=offset)
        offset += _size(shape, dtype)
    return arrays


def _size(shape: tuple[int, ...], dtype: DTypeLike) -> int:
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    return -(-size // _ALIGNMENT) * _ALIGNMENT
