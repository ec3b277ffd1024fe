"""Weights packed in panels for the C++ kernels (matrix.h has the layout), and the products with them through jax.ffi."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from quire.kernels.linear.contract import Weight
from quire.kernels.linear.quantize import quantize_weight
from quire.kernels.native.library import FORMATS, PANEL, as_mask, load_library
from quire.kernels.native.memory import Arena, as_jax

_VALUES_PER_WORD = {"float32": 1, "bfloat16": 2, "int8": 4}
_arena = Arena()


def _static() -> Any:
    """A field that programs are traced for, not one that they are given."""
    return flax.struct.field(pytree_node=False)  # type: ignore[no-untyped-call]


@flax.struct.dataclass
class PackedMatrix:
    """A matrix [K, N] as panels of 32 columns, in 32-bit words of g values: 1 float32, 2 bfloat16 or 4 int8.

    The arrays of several matrices, experts, have an axis more, in front."""

    words: Any  # [ceil(N / 32), ceil(K / g), 32] uint32
    scales: Any  # [N] float32; int8 only
    sums: Any  # [ceil(N / 32) x 32] int32, 128 x the sum of a column's int8; int8 only
    shape: tuple[int, int] = _static()  # (K, N)
    format: str = _static()  # one of FORMATS
    instruction_set: str = _static()

    @property
    def buffers(self) -> tuple[jax.Array, ...]:
        """What the handlers take."""
        return (self.words,) if self.scales is None else (self.words, self.scales, self.sums)

    def matmul(self, x: jax.Array, is_used: jax.Array | None = None) -> jax.Array:
        """See `contract.Weight`."""
        out = jax.ShapeDtypeStruct((x.shape[0], self.shape[1]), jnp.float32)
        call = jax.ffi.ffi_call(load_library(self.instruction_set).target("quire_linear"), out)
        product: jax.Array = call(x, as_mask(is_used), *self.buffers, format=np.int64(FORMATS[self.format]))
        return product

    def columns(self, ids: jax.Array, dtype: Any) -> jax.Array:
        """See `contract.Weight`."""
        out = jax.ShapeDtypeStruct((ids.shape[0], self.shape[0]), dtype)
        call = jax.ffi.ffi_call(load_library(self.instruction_set).target("quire_columns"), out)
        rows: jax.Array = call(ids, *self.buffers, format=np.int64(FORMATS[self.format]), n=np.int64(self.shape[1]))
        return rows


def prepare(instruction_set: str, matrix: np.ndarray, quantization: str) -> Weight:
    """Packs a matrix, or several of one shape: see `contract.PrepareWeight`. No other copy of it is kept."""
    scales = sums = None
    if quantization == "int8":
        matrix, scales = quantize_weight(matrix)
    format = matrix.dtype.name
    *several, num_rows, num_columns = matrix.shape
    num_panels = -(-num_columns // PANEL)
    words = _arena.empty((*several, num_panels, -(-num_rows // _VALUES_PER_WORD[format]), PANEL), np.uint32)
    if scales is not None:
        sums = np.empty((*several, num_panels * PANEL), np.int32)
    library = load_library(instruction_set)
    for idx in np.ndindex(*several):
        library.pack(matrix[idx], words[idx], None if sums is None else sums[idx])
    return PackedMatrix(
        as_jax(words),
        None if scales is None else jnp.asarray(scales),
        None if sums is None else jnp.asarray(sums),
        shape=(num_rows, num_columns),
        format=format,
        instruction_set=instruction_set,
    )
