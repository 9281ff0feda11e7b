"""Named arrays in one block of memory, which two processes can share."""

from __future__ import annotations

import mmap
import os
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


class SharedArrays:
    """A table's arrays in a block of memory that child processes can open by its descriptor; all 0 at first.

    Attributes:
        table: the table.
        arrays: the arrays by name.
        descriptor: of the memory; -1 once it is closed. The arrays stay usable.
    """

    def __init__(self, name: str, table: ArrayTable):
        self.table = table
        self.descriptor = os.memfd_create(name)
        os.ftruncate(self.descriptor, nbytes(table))
        self.arrays = arrays_in(mmap.mmap(self.descriptor, nbytes(table)), table)

    def close(self) -> None:
        """Close the descriptor: no further process can be given the memory."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
        self.descriptor = -1


def _size(shape: tuple[int, ...], dtype: DTypeLike) -> int:
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    return -(-size // _ALIGNMENT) * _ALIGNMENT
