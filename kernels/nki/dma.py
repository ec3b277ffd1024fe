"""DMA: copies between HBM and SBUF, gathers and scatters by indices in SBUF, transposes of 2-byte types."""

from __future__ import annotations

from enum import Enum

import numpy as np

from quire.kernels.nki.access import Places, resolve
from quire.kernels.nki.checks import check_overlap, check_start_partition, read, write, write_exact
from quire.kernels.nki.core import current, generation_name, require_generation
from quire.kernels.nki.dtypes import convert, to_float32
from quire.kernels.nki.engines import Engine
from quire.kernels.nki.rules import refuse
from quire.kernels.nki.tensor import EMPTY, PSUM, WRITTEN, NkiTensor


class dge_mode(Enum):
    """Who makes a copy's descriptors: GpSimd (swdge), the hardware (hwdge), or the runtime beforehand (none)."""

    unknown = "unknown"
    swdge = "swdge"
    hwdge = "hwdge"
    none = "none"


class oob_mode(Enum):
    """What an index out of bounds does."""

    error = "error"
    skip = "skip"


def dma_copy(
    dst: NkiTensor,
    src: NkiTensor,
    priority: int | None = None,
    oob_mode: oob_mode = oob_mode.error,
    dge_mode: dge_mode = dge_mode.unknown,
    engine: Engine = Engine.unknown,
    name: str | None = None,
) -> None:
    """dst = src, as many elements, in row-major order of both; converted through float32 where dtypes differ."""
    _check_ends(dst, src)
    _check_mode(dst, src, priority, dge_mode, engine)
    skip = oob_mode.value == "skip"
    if skip and dst.indirection is None and src.indirection is None:
        refuse("dma-oob", "oob_mode.skip on a copy whose addresses are static; leave it out")
    if dst.values.size != src.values.size:
        refuse("dma-elements", f"{src.values.size} elements into {dst.values.size}; shapes {src.shape} and {dst.shape}")
    if src.indirection is not None:
        _count(dst, *_gather(dst, src, skip))
    elif dst.indirection is not None:
        _count(dst, *_scatter(dst, src, skip))
    else:
        check_overlap(dst, src)
        _write_copied(dst, src, read(src).reshape(dst.shape))
        _count(dst, dst.values.size, max(_rows(dst), _rows(src)))
    if dge_mode.value == "swdge" or _has_vector(dst) or _has_vector(src):
        current().costs.compute(Engine.gpsimd.value, 0)  # makes the descriptors


def dma_transpose(
    dst: NkiTensor,
    src: NkiTensor,
    axes: tuple[int, ...] | None = None,
    priority: int | None = None,
    dge_mode: dge_mode = dge_mode.unknown,
    oob_mode: oob_mode = oob_mode.error,
    name: str | None = None,
) -> None:
    """dst = src with axes (1, 0), (2, 1, 0) or (3, 1, 2, 0). Only direct ones are emulated."""
    _check_ends(dst, src)
    if src.indirection is not None:
        require_generation(3, "an indirect dma_transpose", "gather with dma_copy and use nc_transpose")
        refuse("not-emulated", "an indirect dma_transpose; gather with dma_copy and use nc_transpose")
    _check_mode(dst, src, priority, dge_mode, Engine.unknown)
    wanted = {2: (1, 0), 3: (2, 1, 0), 4: (3, 1, 2, 0)}.get(src.ndim)
    if wanted is None or (axes is not None and tuple(axes) != wanted):
        refuse("dma-transpose", f"axes {axes} of {src.shape}; (1, 0), (2, 1, 0) and (3, 1, 2, 0) are possible")
    # The documents give the limit on the last axis for indirect ones; read strictly, it holds for all.
    if src.values.itemsize != 2 or dst.dtype != src.dtype or src.shape[-1] > 128:
        refuse("dma-transpose", f"{src!r} to {dst.dtype}; use one 2-byte dtype and a last axis of at most 128")
    result = read(src).transpose(wanted)
    if dst.shape != result.shape:
        refuse("shape", f"the transpose is {result.shape} and the destination {dst.shape}")
    write_exact(dst, result)
    current().costs.dma(dst.values.size * dst.values.itemsize, src.values.size)  # 2-byte pieces


def _check_ends(dst: NkiTensor, src: NkiTensor) -> None:
    for tensor in (dst, src):
        if tensor.buffer == PSUM:
            refuse("dma-space", f"{tensor!r} lies in PSUM; copy through SBUF with tensor_copy")
        if tensor.on_chip and tensor.indirection is None:
            check_start_partition(tensor)
    if dst.indirection is not None and src.indirection is not None:
        refuse("indirect-operand", "both sides are indirect; go through SBUF")


def _check_mode(dst: NkiTensor, src: NkiTensor, priority: int | None, mode: dge_mode, engine: Engine) -> None:
    vector = _has_vector(dst) or _has_vector(src)
    if mode.value == "hwdge":
        if current().generation.number < 3 or vector:
            what = "with vector_offset" if vector else f"on {generation_name()}"
            refuse("dma-hwdge", f"hwdge {what}; use swdge")
        if engine not in (Engine.unknown, Engine.scalar, Engine.sync):
            refuse("dma-engine", f"hwdge on {engine.value}; use scalar or sync")
    elif engine is not Engine.unknown:
        refuse("dma-engine", f"engine={engine.value} with dge_mode {mode.value}; it is for hwdge only")
    if mode.value == "none" and vector:
        refuse("dma-swdge", "vector_offset with dge_mode none; use swdge")
    if priority is not None and (current().generation.number < 4 or not 0 <= priority <= 3 or mode.value == "none"):
        refuse("dma-priority", f"priority={priority} on {generation_name()} with dge_mode {mode.value}; leave it out")


def _has_vector(tensor: NkiTensor) -> bool:
    return tensor.indirection is not None and tensor.indirection.is_vector


def _count(dst: NkiTensor, num_elements: int, num_rows: int) -> None:
    current().costs.dma(num_elements * dst.values.itemsize, num_rows)


def _gather(dst: NkiTensor, src: NkiTensor, skip: bool) -> tuple[int, int]:
    """Rows of `src` into dst; those skipped leave dst as it is, unwritten included. Gives the elements and rows moved."""
    places = _places(src, skip)
    flat, state = src.storage.values.reshape(-1), src.storage.state.reshape(-1)
    if (state[places.elements[places.valid]] == EMPTY).any():
        refuse("uninitialised", "a gather reads rows that were never written")
    at = np.where(places.valid[:, None], places.elements, 0)
    fetched = _converted(flat[at], src, dst).reshape(dst.shape)
    is_moved = np.broadcast_to(places.valid[:, None], places.elements.shape).reshape(dst.shape)
    moved_state = np.where(is_moved, WRITTEN, dst.state)
    write_exact(dst, np.where(is_moved, fetched, dst.values))
    dst.state[...] = moved_state
    return places.moved()


def _scatter(dst: NkiTensor, src: NkiTensor, skip: bool) -> tuple[int, int]:
    """Rows of src to their places in `dst`. Gives the elements and rows moved."""
    places = _places(dst, skip)
    values = _converted(read(src), src, dst).reshape(places.elements.shape)[places.valid]
    elements = places.elements[places.valid]
    if np.unique(elements).size != elements.size:
        refuse("scatter-duplicate", "two rows go to one place; send all but one out of bounds with oob_mode.skip")
    # Whole storages are contiguous, so that these are views.
    dst.storage.values.reshape(-1)[elements] = values
    dst.storage.state.reshape(-1)[elements] = WRITTEN
    return places.moved()


def _places(tensor: NkiTensor, skip: bool) -> Places:
    assert tensor.indirection is not None
    return resolve(tensor.indirection, tensor.storage.values.size, skip)


def _converted(values: np.ndarray, src: NkiTensor, dst: NkiTensor) -> np.ndarray:
    """Bits as they are between equal dtypes."""
    if src.dtype == dst.dtype:
        return values
    return convert(to_float32(values, src.dtype), dst.dtype)


def _write_copied(dst: NkiTensor, src: NkiTensor, values: np.ndarray) -> None:
    if src.dtype == dst.dtype:
        write_exact(dst, values.copy())
    else:
        write(dst, to_float32(values, src.dtype))


def _rows(tensor: NkiTensor) -> int:
    """How many contiguous pieces a view has; each partition of an on-chip one is its own."""
    run, expected = 1, 1
    for step, count in reversed(tensor.get_pattern()[1:] if tensor.on_chip else tensor.get_pattern()):
        if count > 1 and step != expected:
            break
        run, expected = run * count, expected * count
    return tensor.values.size // run
