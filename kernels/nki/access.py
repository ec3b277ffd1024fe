"""Which elements an indirect copy touches, once its indices are known."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from quire.kernels.nki.checks import check_start_partition, read
from quire.kernels.nki.rules import refuse
from quire.kernels.nki.tensor import Indirection


@dataclass(frozen=True)
class Places:
    """Elements of a flat storage, in the order of the copy, and which rows of them are within bounds."""

    elements: np.ndarray  # [rows, elements of a row]
    valid: np.ndarray  # [rows] bool

    def moved(self) -> tuple[int, int]:
        """How many elements a copy moves, and in how many rows."""
        num_rows = int(self.valid.sum())
        return num_rows * self.elements.shape[1], num_rows


def resolve(indirection: Indirection, storage_size: int, skip: bool) -> Places:
    """Reads the indices and gives the places. Out of bounds is refused, or left out with `skip`."""
    check_start_partition(indirection.index)
    idx = read(indirection.index).reshape(-1).astype(np.int64)
    pattern = indirection.pattern
    # The first step of a vector's pattern is documented as ignored: the index says where each row starts.
    own = pattern[1:] if indirection.is_vector else pattern
    within = np.zeros((), np.int64)
    for step, count in own:
        within = within[..., None] + step * np.arange(count)
    elements = indirection.offset + idx[:, None] * indirection.stride + within.reshape(1, -1)
    valid = (idx >= 0) & (idx < indirection.extent) & (elements.min(1) >= 0) & (elements.max(1) < storage_size)
    if not skip and not valid.all():
        refuse(
            "indirect-bounds",
            f"index {idx[~valid][0]} is outside an axis of {indirection.extent}; clip it, or use oob_mode.skip",
        )
    return Places(elements, valid)
