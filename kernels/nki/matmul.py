"""TensorE: products and transposes. K is contracted and lies on partitions; M stationary columns, N moving columns."""

from __future__ import annotations

from enum import Enum

import numpy as np

from quire.kernels.nki.checks import check_one_bank, check_operands, read, read_float32, write, write_exact
from quire.kernels.nki.core import PARTITIONS, current, generation_name, require_generation
from quire.kernels.nki.dtypes import FLOATS
from quire.kernels.nki.engines import Engine
from quire.kernels.nki.rules import refuse
from quire.kernels.nki.tensor import BY_MATMUL, EMPTY, PSUM, SBUF, NkiTensor

FP32_SLOWDOWN = 4
VECTOR_TRANSPOSE = 32


class matmul_perf_mode(Enum):
    """`nki.isa.matmul_perf_mode`."""

    none = "none"
    double_row = "double_row"


def nc_matmul(
    dst: NkiTensor,
    stationary: NkiTensor,
    moving: NkiTensor,
    is_stationary_onezero: bool = False,
    is_moving_onezero: bool = False,
    is_transpose: bool = False,
    accumulate: bool | None = None,
    tile_position: tuple[int, ...] = (),
    tile_size: tuple[int, ...] = (),
    perf_mode: matmul_perf_mode = matmul_perf_mode.none,
    name: str | None = None,
) -> None:
    """dst[M, N] = stationary[K, M]^T moving[K, N], summed in float32.

    `accumulate` False overwrites, True adds, None overwrites places that no matmul wrote and adds to the others.
    """
    _check_modes(is_transpose, tile_position, tile_size, perf_mode)
    check_operands(stationary, moving, spaces=(SBUF,), rule="matmul-space")
    check_operands(dst, spaces=(PSUM,), rule="matmul-space")
    _check_matmul_dtypes(dst, stationary, moving)
    _check_matmul_sizes(dst, stationary, moving)
    check_one_bank(dst)
    product = read_float32(stationary).T @ read_float32(moving)
    if _accumulates(dst, accumulate):
        product = product + read_float32(dst)
    write(dst, product, BY_MATMUL)
    _count(moving.free_size, stationary.dtype)


def _check_modes(
    is_transpose: bool, tile_position: tuple[int, ...], tile_size: tuple[int, ...], perf_mode: matmul_perf_mode
) -> None:
    if perf_mode is not matmul_perf_mode.none:
        require_generation(3, "double_row", "leave perf_mode out")
        refuse("matmul-mode", "double_row is not emulated; leave perf_mode out")
    if tile_position or tile_size or is_transpose:
        refuse("matmul-mode", "tiling and transpose modes are not emulated; use the whole array, and nc_transpose")


def _check_matmul_dtypes(dst: NkiTensor, stationary: NkiTensor, moving: NkiTensor) -> None:
    names = (stationary.dtype, moving.dtype)
    if not set(names) <= FLOATS:
        refuse("matmul-dtype", f"operands of {names[0]} and {names[1]}; convert integers to bfloat16")
    if "float32" in names and names[0] != names[1]:
        refuse("matmul-dtype", f"{names[0]} with {names[1]}; float32 goes with float32 only, so convert one")
    if set(names) == {"float8_e4m3", "float8_e4m3fn"}:
        refuse("matmul-dtype", "the two kinds of float8_e4m3 do not mix; convert one")
    allowed = ("float32", "bfloat16") if current().generation.number >= 4 else ("float32",)
    if dst.dtype not in allowed:
        refuse("matmul-dst-dtype", f"a destination of {dst.dtype} on {generation_name()}; use {' or '.join(allowed)}")


def _check_matmul_sizes(dst: NkiTensor, stationary: NkiTensor, moving: NkiTensor) -> None:
    if stationary.shape[0] != moving.shape[0]:
        refuse("matmul-contraction", f"{stationary.shape[0]} partitions against {moving.shape[0]}; K must be equal")
    if stationary.free_size > PARTITIONS:
        refuse("matmul-stationary", f"M = {stationary.free_size}; at most {PARTITIONS}, so split it")
    limit = current().generation.max_moving
    if moving.free_size > limit:
        refuse("matmul-moving", f"N = {moving.free_size} on {generation_name()}; at most {limit}, so split it")
    result = (stationary.free_size, moving.free_size)
    if (dst.shape[0], dst.free_size) != result:
        refuse("matmul-shape", f"the result is {result} and the destination {dst.shape}")


def _accumulates(dst: NkiTensor, accumulate: bool | None) -> bool:
    """Whether the product is added to what lies there; refuses where hardware would add to something undefined."""
    if accumulate is False:
        return False
    by_matmul = dst.state == BY_MATMUL
    # On gen4 any written place may be added to (documented as undefined for gen2 and gen3 only).
    ready = by_matmul if current().generation.number < 4 else dst.state != EMPTY
    if ready.all():
        return True
    if accumulate or (dst.state != EMPTY).any():
        refuse(
            "matmul-accumulate",
            f"{int((~ready).sum())} of {ready.size} places hold no result of a matmul; start with accumulate=False",
        )
    return False


def nc_transpose(dst: NkiTensor, data: NkiTensor, engine: Engine = Engine.unknown, name: str | None = None) -> None:
    """dst[F, P] = data[P, F]^T: on TensorE from SBUF to PSUM, on VectorE up to 32 x 32."""
    check_operands(dst, data)
    rows, columns = data.shape[0], data.free_size
    if (dst.shape[0], dst.free_size) != (columns, rows):
        refuse("shape", f"the transpose of {data.shape} is ({columns}, {rows}) and the destination {dst.shape}")
    chosen = _transposing_engine(engine, dst, data)
    limit = VECTOR_TRANSPOSE if chosen is Engine.vector else PARTITIONS
    if rows > limit or columns > limit:
        refuse("transpose-size", f"{rows} x {columns} on {chosen.value}; at most {limit} x {limit}, so split it")
    if chosen is Engine.vector:
        _transpose_on_vector(dst, data)
    else:
        _transpose_on_tensor(dst, data)


def _transposing_engine(engine: Engine, dst: NkiTensor, data: NkiTensor) -> Engine:
    """Which engine the compiler picks is not documented: TensorE where it can, unless told otherwise."""
    if engine not in (Engine.unknown, Engine.tensor, Engine.vector):
        refuse("engine", f"nc_transpose does not run on {engine.value}; it runs on tensor, vector")
    if engine is not Engine.unknown:
        return engine
    return Engine.tensor if data.buffer == SBUF and dst.buffer == PSUM else Engine.vector


def _transpose_on_vector(dst: NkiTensor, data: NkiTensor) -> None:
    if dst.dtype != data.dtype:
        refuse("transpose-dtype", f"{data.dtype} into {dst.dtype}; VectorE does not convert here")
    write_exact(dst, read(data).reshape(data.shape[0], -1).T)
    current().costs.compute(Engine.vector.value, data.free_size)


def _transpose_on_tensor(dst: NkiTensor, data: NkiTensor) -> None:
    if (data.buffer, dst.buffer) != (SBUF, PSUM):
        refuse("transpose-space", f"from {data.buffer} to {dst.buffer}; TensorE goes from sbuf to psum")
    is_product = current().generation.number < 3
    # Documented is data's dtype; what works on gen2 is what its matmuls write, float32.
    expected = "float32" if is_product else data.dtype
    if dst.dtype != expected:
        refuse("transpose-dtype", f"{data.dtype} into {dst.dtype} on {generation_name()}; use {expected}")
    check_one_bank(dst)
    if is_product:
        # As hardware does it: a row that holds NaN or infinity spoils every element that it is summed into.
        with np.errstate(invalid="ignore"):
            write(dst, read_float32(data).T @ np.eye(data.shape[0], dtype=np.float32), BY_MATMUL)
    else:
        write_exact(dst, read(data).reshape(data.shape[0], -1).T, BY_MATMUL)
    _count(data.shape[0], data.dtype)


def _count(moving_columns: int, dtype: str) -> None:
    """One column a cycle, 64 at least; float32 passes four times."""
    cycles = max(moving_columns, 64) * (FP32_SLOWDOWN if dtype == "float32" else 1)
    current().costs.compute(Engine.tensor.value, cycles)
