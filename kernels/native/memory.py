"""Host memory for weights, in huge pages where the system gives them.

A decode step reads every weight once, so with pages of 4 KiB it also walks the page tables for each of them. Weights are laid one after the
other in large mappings that ask for huge pages; jax takes such an array as it is, without a copy.
"""

from __future__ import annotations

import mmap
from typing import Any

import jax
import numpy as np

CHUNK = 64 << 20
ALIGNMENT = 64  # what XLA asks of memory that it is to use in place


class Arena:
    """Hands out arrays, one after the other. A mapping is freed when the last array in it is."""

    def __init__(self) -> None:
        self._free = np.empty(0, np.uint8)

    def empty(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """An array with nothing of meaning in it, at an address that is a multiple of ALIGNMENT."""
        num_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        rounded = -(-num_bytes // ALIGNMENT) * ALIGNMENT
        if rounded > self._free.nbytes:
            self._free = _map(max(rounded, CHUNK))
        taken, self._free = self._free[:num_bytes], self._free[rounded:]
        return taken.view(dtype).reshape(shape)


def _map(num_bytes: int) -> np.ndarray:
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return np.frombuffer(mmap.mmap(-1, num_bytes), np.uint8)
    # Private, since memory that could be shared is in huge pages on few systems.
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)


def as_jax(array: np.ndarray) -> jax.Array:
    """The array as jax's own, in place: it must not be written to any more."""
    placed: jax.Array = jax.device_put(array)
    return placed
