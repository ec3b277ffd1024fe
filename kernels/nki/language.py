"""The emulator's `nki.language`: dtypes, buffers, tensors, ranges, and the names of operators and functions.

An unknown name that the real module has is refused as `not-emulated`, with the kernel's line.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from quire.kernels.nki.core import PARTITIONS, PSUM_BANK_BYTES, current
from quire.kernels.nki.dtypes import DTYPES
from quire.kernels.nki.functions import FUNCTIONS, NOT_OPERATORS, OPERATORS
from quire.kernels.nki.isa import memset
from quire.kernels.nki.rules import refuse
from quire.kernels.nki.tensor import BUFFERS, HBM, PRIVATE_HBM, PSUM, SBUF, SHARED_HBM, NkiTensor, allocate

sbuf, psum, hbm, private_hbm, shared_hbm = SBUF, PSUM, HBM, PRIVATE_HBM, SHARED_HBM
bool_ = "bool"
globals().update({name: name for name in DTYPES if name != "bool"})
globals().update({name: name for name in NOT_OPERATORS})
globals().update(FUNCTIONS)
globals().update(OPERATORS)

assert set(BUFFERS) == {sbuf, psum, hbm, private_hbm, shared_hbm}


class tile_size:
    """Sizes that kernels ask for by name."""

    pmax = PARTITIONS
    psum_fmax = PSUM_BANK_BYTES // 4
    gemm_stationary_fmax = PARTITIONS
    gemm_moving_fmax = PSUM_BANK_BYTES // 4


def ndarray(shape: Sequence[int], dtype: str, buffer: str = SBUF, name: str = "") -> NkiTensor:
    """A tensor whose contents are undefined."""
    return allocate(shape, dtype, buffer)


def zeros(shape: Sequence[int], dtype: str, buffer: str = SBUF, name: str = "") -> NkiTensor:
    """A tile of zeros."""
    return full(shape, 0, dtype, buffer)


def ones(shape: Sequence[int], dtype: str, buffer: str = SBUF, name: str = "") -> NkiTensor:
    """A tile of ones."""
    return full(shape, 1, dtype, buffer)


def full(shape: Sequence[int], fill_value: float, dtype: str, buffer: str = SBUF, name: str = "") -> NkiTensor:
    """A tile of one number; filling HBM is not emulated."""
    tensor = allocate(shape, dtype, buffer)
    if not tensor.on_chip:
        refuse("not-emulated", f"filling a tensor in {buffer}; fill one in SBUF and copy it")
    memset(dst=tensor, value=fill_value)
    return tensor


def ds(start: int, size: int) -> slice:
    """`size` elements from `start` on."""
    return slice(start, start + size)


def static_range(start: int, stop: int | None = None, step: int = 1) -> range:
    """A loop that is unrolled."""
    return range(start) if stop is None else range(start, stop, step)


# How loops are scheduled is the compiler's affair; the emulator runs each in order.
affine_range = sequential_range = static_range


def program_id(axis: int) -> int:
    """Which of the logical core's physical cores this is; `axis` must be 0."""
    _check_axis(axis)
    return current().program_id


def num_programs(axis: int = 0) -> int:
    """How many physical cores the logical one has."""
    _check_axis(axis)
    return current().num_programs


def _check_axis(axis: int) -> None:
    if axis != 0:
        refuse("lnc", f"the grid has one axis, not {axis + 1}")


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    refuse("not-emulated", f"nki.language.{name}; use nki.isa, or teach the emulator")
