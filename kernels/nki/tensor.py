"""NKI tensors: storage in HBM, SBUF or PSUM, and views of it, which cost nothing and copy nothing.

A view is a pair of numpy views of one storage: its values, and for every element whether it was written and by what. On-chip storage
lies as [partitions, elements per partition], so that a view's first partition and its bytes within the partition follow from
its offset and strides.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from quire.kernels.nki.core import PARTITIONS, PSUM_BANK_BYTES, current
from quire.kernels.nki.dtypes import nki_dtype, numpy_dtype
from quire.kernels.nki.rules import refuse

SBUF, PSUM, HBM, PRIVATE_HBM, SHARED_HBM = BUFFERS = ("sbuf", "psum", "hbm", "private_hbm", "shared_hbm")
ON_CHIP = (SBUF, PSUM)
MAX_FREE_AXES = 4
INDEX_DTYPES = ("int32", "uint32")

EMPTY, WRITTEN, BY_MATMUL = 0, 1, 2
"""What an element holds: nothing, something, or something that a matmul may add to."""

Pattern = Sequence[Sequence[int]]


class Storage:
    """One allocation. Its memory is given back when the kernel holds no view of it any more."""

    def __init__(self, values: np.ndarray, state: np.ndarray, buffer: str) -> None:
        self.values, self.state, self.buffer = values, state, buffer

    @property
    def free_size(self) -> int:
        """Elements per partition."""
        return math.prod(self.values.shape[1:])


@dataclass(frozen=True)
class Indirection:
    """Offsets that a DMA reads from SBUF when it runs: one per row (`is_vector`), or one for all."""

    index: NkiTensor
    is_vector: bool
    stride: int  # elements that one step of the index is worth
    extent: int  # of the indexed axis
    offset: int
    pattern: tuple[tuple[int, int], ...]


class NkiTensor:
    """A view of a storage, as kernels handle it; a whole tensor is the view of all of it."""

    def __init__(
        self, storage: Storage, values: np.ndarray, state: np.ndarray, indirection: Indirection | None = None
    ) -> None:
        if values.size == 0:
            refuse("empty-view", f"a view of shape {values.shape} holds nothing; leave the instruction out")
        self.storage, self.values, self.state, self.indirection = storage, values, state, indirection

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def ndim(self) -> int:
        return self.values.ndim

    @property
    def dtype(self) -> str:
        return str(self.values.dtype)

    @property
    def buffer(self) -> str:
        return self.storage.buffer

    @property
    def on_chip(self) -> bool:
        return self.buffer in ON_CHIP

    @property
    def free_size(self) -> int:
        """Elements per partition."""
        return math.prod(self.shape[1:])

    @property
    def offset(self) -> int:
        """Of the view's first element, in elements of the storage."""
        start = self.values.__array_interface__["data"][0] - self.storage.values.__array_interface__["data"][0]
        return start // self.values.itemsize

    @property
    def is_whole(self) -> bool:
        """Whether this is every element of the storage, in order."""
        return self.values.flags.c_contiguous and self.values.size == self.storage.values.size

    def __repr__(self) -> str:
        return f"NkiTensor({list(self.shape)}, {self.dtype}, {self.buffer})"

    def __getitem__(self, key: Any) -> NkiTensor:
        """Integers and slices. On chip an integer keeps axis 0 as one partition, and two axes at least remain."""
        keys = tuple(_checked_key(k, axis, self.shape[axis]) for axis, k in enumerate(_full_key(key, self.ndim)))
        if self.on_chip and isinstance(keys[0], int):
            keys = (slice(keys[0], keys[0] + 1), *keys[1:])
        values, state = self.values[keys], self.state[keys]
        if self.on_chip and values.ndim == 1:
            values, state = values[:, None], state[:, None]
        return NkiTensor(self.storage, values, state)

    def slice(self, dim: int, start: int, end: int, step: int = 1) -> NkiTensor:
        return self[(slice(None),) * dim + (slice(start, end, step),)]

    def select(self, dim: int, index: int) -> NkiTensor:
        if not isinstance(index, int):
            refuse("not-emulated", "select by a tensor; use ap(scalar_offset=...)")
        return self[(slice(None),) * dim + (index,)]

    def permute(self, dims: Sequence[int]) -> NkiTensor:
        if self.on_chip and dims[0] != 0:
            refuse("partition-axis", f"permute{tuple(dims)} moves the partition axis; transpose with nc_transpose")
        return self._view(self.values.transpose(dims), self.state.transpose(dims))

    def broadcast(self, dim: int, size: int) -> NkiTensor:
        if self.on_chip and dim == 0:
            refuse("partition-axis", "partitions cannot be broadcast by a view; use DMA, a matmul or a shuffle")
        if self.shape[dim] != 1:
            refuse("broadcast", f"axis {dim} has size {self.shape[dim]}, only size 1 is broadcast")
        shape = (*self.shape[:dim], size, *self.shape[dim + 1 :])
        return self._view(np.broadcast_to(self.values, shape), np.broadcast_to(self.state, shape))

    def expand_dim(self, dim: int) -> NkiTensor:
        if self.on_chip and dim == 0:
            refuse("partition-axis", "expand_dim(0) would put an axis before the partitions")
        return self._view(np.expand_dims(self.values, dim), np.expand_dims(self.state, dim))

    def squeeze_dim(self, dim: int) -> NkiTensor:
        if self.on_chip and dim == 0:
            refuse("partition-axis", "squeeze_dim(0) would remove the partition axis")
        if self.shape[dim] != 1:
            refuse("reshape", f"axis {dim} has size {self.shape[dim]} and cannot be squeezed")
        return self._view(np.squeeze(self.values, dim), np.squeeze(self.state, dim))

    def reshape(self, shape: Sequence[int]) -> NkiTensor:
        shape = tuple(shape)
        if math.prod(shape) != self.values.size:
            refuse("reshape", f"{self.shape} has {self.values.size} elements, {shape} has {math.prod(shape)}")
        if self.on_chip and shape[0] != self.shape[0]:
            refuse("partition-axis", f"a reshape from {self.shape} to {shape} would mix partitions")
        values, state = self.values.reshape(shape), self.state.reshape(shape)
        if not np.may_share_memory(values, self.values):
            refuse("reshape", f"{self.shape} with strides is not contiguous and cannot be seen as {shape}; copy it")
        return self._view(values, state)

    def reshape_dim(self, dim: int, shape: Sequence[int]) -> NkiTensor:
        return self.reshape((*self.shape[:dim], *shape, *self.shape[dim + 1 :]))

    def flatten_dims(self, start: int, end: int) -> NkiTensor:
        """Merges the axes from `start` up to and including `end`."""
        merged = math.prod(self.shape[start : end + 1])
        return self.reshape((*self.shape[:start], merged, *self.shape[end + 1 :]))

    def ap(
        self,
        pattern: Pattern,
        offset: int | None = None,
        scalar_offset: NkiTensor | None = None,
        vector_offset: NkiTensor | None = None,
        indirect_dim: int = 0,
    ) -> NkiTensor:
        """A hardware access pattern over the storage: [[step, count], ...] in elements, the outermost first."""
        if offset is not None and not self.is_whole:
            refuse("ap-of-view", f"offset {offset} is from the storage's start, and this is a view at {self.offset}")
        steps = tuple((int(step), int(count)) for step, count in pattern)
        start = self.offset if offset is None else offset
        if self.on_chip and steps[0][0] != self.storage.free_size and steps[0][1] > 1:
            refuse(
                "ap-partition-step",
                f"the first step is {steps[0][0]}; a partition of this tensor has {self.storage.free_size} elements",
            )
        if scalar_offset is None and vector_offset is None:
            return self._strided(steps, start)
        found = _indirection(self, steps, start, scalar_offset, vector_offset, indirect_dim)
        # The values of an indirect view are those at offset 0: only its shape and dtype have a meaning before the DMA runs.
        shape = tuple(count for _, count in steps)
        values, state = (np.broadcast_to(x.reshape(-1)[:1], shape) for x in (self.storage.values, self.storage.state))
        return NkiTensor(self.storage, values, state, found)

    def get_pattern(self) -> list[list[int]]:
        """The view as [[step, count], ...]."""
        steps = (stride // self.values.itemsize for stride in self.values.strides)
        return [[step, count] for step, count in zip(steps, self.shape, strict=True)]

    def _strided(self, steps: tuple[tuple[int, int], ...], start: int) -> NkiTensor:
        last = start + sum(step * (count - 1) for step, count in steps)
        size = self.storage.values.size
        if start < 0 or last >= size or min(step for step, _ in steps) < 0:
            refuse("ap-bounds", f"the pattern reaches from element {start} to {last} of a storage of {size}")
        shape = tuple(count for _, count in steps)
        views = []
        for flat in (self.storage.values.reshape(-1), self.storage.state.reshape(-1)):
            strides = tuple(step * flat.itemsize for step, _ in steps)
            # Elements read twice are never written through.
            is_plain = all(step > 0 for step, count in steps if count > 1)
            views.append(np.lib.stride_tricks.as_strided(flat[start:], shape, strides, writeable=is_plain))
        return self._view(*views)

    def _view(self, values: np.ndarray, state: np.ndarray) -> NkiTensor:
        return NkiTensor(self.storage, values, state)


def allocate(shape: Sequence[int], dtype: str, buffer: str) -> NkiTensor:
    """An uninitialised tensor. Floats hold NaN, so that a read which escapes the rules shows."""
    shape = tuple(shape)
    if buffer not in BUFFERS:
        refuse("buffer", f"{buffer!r} is none of {', '.join(BUFFERS)}")
    numpy_type = numpy_dtype(dtype)
    if buffer in ON_CHIP:
        _check_tile(shape)
    values = np.full(shape, np.nan if "float" in dtype else 0, numpy_type)
    storage = Storage(values, np.full(shape, EMPTY, np.uint8), buffer)
    _take_memory(storage)
    if buffer == SHARED_HBM:
        storage = _shared(storage)
    return NkiTensor(storage, storage.values, storage.state)


def from_array(array: np.ndarray) -> NkiTensor:
    """An input: HBM that someone else wrote. The array is copied, as a kernel may write to it."""
    nki_dtype(array.dtype)
    values = np.array(array, order="C")
    storage = Storage(values, np.full(values.shape, WRITTEN, np.uint8), HBM)
    return NkiTensor(storage, storage.values, storage.state)


def _indirection(
    base: NkiTensor,
    pattern: tuple[tuple[int, int], ...],
    offset: int,
    scalar_offset: NkiTensor | None,
    vector_offset: NkiTensor | None,
    indirect_dim: int,
) -> Indirection:
    """The checked indirection of an `ap` call on `base`."""
    if scalar_offset is not None and vector_offset is not None:
        refuse("indirect-exclusive", "give vector_offset or scalar_offset, not both")
    if not base.is_whole:
        refuse("ap-of-view", f"indices count rows of a whole tensor, and this is a view of shape {base.shape}")
    if vector_offset is not None:
        _check_vector(base, pattern, vector_offset, indirect_dim)
        index = vector_offset
    else:
        assert scalar_offset is not None
        index = scalar_offset
        _check_index(index, (1, 1), "scalar_offset")
    stride = math.prod(base.shape[indirect_dim + 1 :])
    extent = base.shape[indirect_dim]
    return Indirection(index, vector_offset is not None, stride, extent, offset, pattern)


def _check_vector(base: NkiTensor, pattern: tuple[tuple[int, int], ...], index: NkiTensor, indirect_dim: int) -> None:
    if base.on_chip:
        refuse("indirect-space", f"vector_offset indexes HBM, and this tensor lies in {base.buffer}")
    if indirect_dim != 0:
        refuse("indirect-dim", f"vector_offset has indirect_dim 0, not {indirect_dim}; reshape the tensor first")
    rows = pattern[0][1]
    if rows > PARTITIONS:
        refuse("indirect-shape", f"{rows} rows in one gather; at most {PARTITIONS}, so split it")
    _check_index(index, (rows, 1), "vector_offset")


def _check_index(index: NkiTensor, shape: tuple[int, int], what: str) -> None:
    if index.buffer != SBUF:
        refuse("indirect-space", f"{what} lies in {index.buffer}; copy it to SBUF")
    if index.shape != shape:
        refuse("indirect-shape", f"{what} has shape {index.shape} and must have {shape}")
    if index.dtype not in INDEX_DTYPES:
        refuse("indirect-dtype", f"{what} is {index.dtype} and must be int32 or uint32")


def _check_tile(shape: tuple[int, ...]) -> None:
    if not 2 <= len(shape) <= 1 + MAX_FREE_AXES:
        refuse("rank", f"a tile of shape {shape} has {len(shape)} axes; 2 to {1 + MAX_FREE_AXES} are possible")
    if not 1 <= shape[0] <= PARTITIONS:
        refuse("partitions", f"a tile of shape {shape} has {shape[0]} partitions; there are {PARTITIONS}, so split it")


def _take_memory(storage: Storage) -> None:
    core, num_bytes = current(), storage.free_size * storage.values.itemsize
    if storage.buffer == SBUF:
        core.take_sbuf(num_bytes)
        weakref.finalize(storage, core.give_sbuf, num_bytes)
    if storage.buffer == PSUM:
        num_banks = -(-num_bytes // PSUM_BANK_BYTES)
        core.take_banks(num_banks)
        weakref.finalize(storage, core.give_banks, num_banks)


def _shared(storage: Storage) -> Storage:
    """The programs of a launch allocate the same tensors in the same order, and share those in shared_hbm."""
    core = current()
    if core.num_shared == len(core.shared):
        core.shared.append(storage)
    core.num_shared += 1
    return core.shared[core.num_shared - 1]


def _full_key(key: Any, ndim: int) -> tuple[Any, ...]:
    keys = key if isinstance(key, tuple) else (key,)
    if Ellipsis in keys:
        at = keys.index(Ellipsis)
        keys = (*keys[:at], *[slice(None)] * (ndim - len(keys) + 1), *keys[at + 1 :])
    if len(keys) > ndim:
        refuse("index-bounds", f"{len(keys)} indices for {ndim} axes")
    return (*keys, *[slice(None)] * (ndim - len(keys)))


def _checked_key(key: Any, axis: int, size: int) -> int | slice:
    """Numpy would clamp a slice and wrap a negative index; hardware does neither."""
    if isinstance(key, slice):
        start, stop = key.start or 0, size if key.stop is None else key.stop
        if not 0 <= start <= stop <= size or (key.step or 1) < 1:
            refuse("index-bounds", f"{start}:{stop}:{key.step or 1} on axis {axis} of size {size}")
        return slice(start, stop, key.step)
    if not isinstance(key, (int, np.integer)):
        refuse("not-emulated", f"an index of type {type(key).__name__}; use integers, slices and nl.ds")
    if not 0 <= key < size:
        refuse("index-bounds", f"{key} on axis {axis} of size {size}")
    return int(key)
