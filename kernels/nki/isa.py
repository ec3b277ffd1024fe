"""The emulator's `nki.isa`: compute instructions with the documented names and arguments. P partitions, F elements of each.

Every instruction checks its operands, computes in float32 as the engines do, rounds into the destination's dtype, and counts its cycles.
Those of DMA are in dma.py. An instruction that the real module has and this one has not is refused by name.
"""

from __future__ import annotations

from enum import Enum
from typing import Any, NoReturn

import numpy as np

from quire.kernels.nki import checks, functions
from quire.kernels.nki.checks import check_operands, read, read_float32, write, write_exact
from quire.kernels.nki.core import current, generation_name, require_generation
from quire.kernels.nki.dma import dge_mode, dma_copy, dma_transpose, oob_mode
from quire.kernels.nki.dtypes import INTEGERS
from quire.kernels.nki.engines import Engine, choose_engine
from quire.kernels.nki.functions import Operator, function_of, operator_of
from quire.kernels.nki.matmul import matmul_perf_mode, nc_matmul, nc_transpose
from quire.kernels.nki.rules import refuse
from quire.kernels.nki.tensor import SBUF, NkiTensor

__all__ = [
    "activation",
    "activation_reduce",
    "affine_select",
    "dge_mode",
    "dma_copy",
    "dma_transpose",
    "engine",
    "get_nc_version",
    "iota",
    "matmul_perf_mode",
    "memset",
    "nc_matmul",
    "nc_transpose",
    "nc_version",
    "oob_mode",
    "reciprocal",
    "reduce_cmd",
    "scalar_tensor_tensor",
    "tensor_copy",
    "tensor_copy_predicated",
    "tensor_reduce",
    "tensor_scalar",
    "tensor_tensor",
]

engine = Engine


class nc_version(Enum):
    """What `get_nc_version` answers."""

    gen2 = 2
    gen3 = 3
    gen4 = 4


class reduce_cmd(Enum):
    """What an activation does with ScalarE's sums."""

    idle = "idle"
    reset = "reset"
    reduce = "reduce"
    reset_reduce = "reset_reduce"


def get_nc_version() -> nc_version:
    """The generation that the kernel is built for."""
    return nc_version(current().generation.number)


def memset(dst: NkiTensor, value: float, engine: Engine = Engine.unknown, name: str | None = None) -> None:
    """Fills [P, F] with a constant."""
    check_operands(dst)
    chosen = choose_engine(engine, "memset", Engine.vector, Engine.gpsimd, tensors=(dst,))
    if dst.dtype in INTEGERS and not isinstance(value, int):
        refuse("memset-value", f"{value!r} into {dst.dtype}; give an int")
    write(dst, np.full(dst.shape, value, np.float64))
    _count(chosen, dst)


def tensor_copy(dst: NkiTensor, src: NkiTensor, engine: Engine = Engine.unknown, name: str | None = None) -> None:
    """[P, F] from SBUF or PSUM to either; bit by bit between equal dtypes, through float32 otherwise."""
    check_operands(dst, src)
    checks.check_elementwise(dst, src)
    if engine is Engine.scalar:
        require_generation(3, "tensor_copy on ScalarE", "use activation with nl.copy")
    chosen = choose_engine(engine, "tensor_copy", Engine.vector, Engine.scalar, Engine.gpsimd, tensors=(dst, src))
    if dst.dtype == src.dtype:
        write_exact(dst, read(src).copy())
    else:
        write(dst, read_float32(src))
    _count(chosen, dst)


def tensor_copy_predicated(
    dst: NkiTensor,
    src: NkiTensor | float,
    predicate: NkiTensor,
    reverse_pred: bool = False,
    name: str | None = None,
) -> None:
    """Where `predicate` [P, F] is not 0, dst = src; elsewhere dst keeps what it has."""
    check_operands(dst, predicate)
    checks.check_elementwise(dst, predicate)
    if predicate.dtype not in ("uint8", "uint16", "uint32"):
        refuse("predicate-dtype", f"the predicate is {predicate.dtype}; use uint8, uint16 or uint32")
    holds = (read(predicate) != 0).reshape(dst.shape) != reverse_pred
    if isinstance(src, NkiTensor):
        check_operands(src)
        checks.check_elementwise(dst, src)
        checks.check_not_both_in_psum(src, predicate)
        if src.dtype != dst.dtype:
            refuse("same-dtype", f"{src.dtype} into {dst.dtype}; copy with tensor_copy first")
        values = read(src).reshape(dst.shape)
    else:
        values = np.full(dst.shape, src).astype(dst.values.dtype)
    # Where every place is overwritten the old contents do not matter; elsewhere they are an operand.
    if not holds.all():
        read(dst)
    write_exact(dst, np.where(holds, values, dst.values))
    _count(Engine.vector, dst)


def tensor_tensor(
    dst: NkiTensor,
    data1: NkiTensor,
    data2: NkiTensor,
    op: Any,
    engine: Engine = Engine.unknown,
    name: str | None = None,
) -> None:
    """dst = data1 op data2, [P, F] each. Equal shapes; 32-bit integers are exact on GpSimd only."""
    check_operands(dst, data1, data2)
    checks.check_elementwise(dst, data1, data2)
    checks.check_not_both_in_psum(data1, data2)
    operator = operator_of(op, "tensor_tensor")
    tensors = (dst, data1, data2)
    chosen = _engine_of_tensor_tensor(engine, operator, tensors)
    if operator.is_bitwise:
        checks.check_integers(*tensors)
        write_exact(dst, operator.apply(read(data1).reshape(dst.shape), read(data2).reshape(dst.shape)))
    elif chosen is Engine.gpsimd and _are_wide_integers(tensors):
        exact = operator.apply(read(data1).reshape(dst.shape), read(data2).reshape(dst.shape))
        write_exact(dst, exact.astype(dst.values.dtype))
    else:
        write(dst, _apply(operator, read_float32(data1), read_float32(data2)))
    _count(chosen, dst)


def _engine_of_tensor_tensor(engine: Engine, operator: Operator, tensors: tuple[NkiTensor, ...]) -> Engine:
    if operator.is_bitwise:
        return choose_engine(engine, "bitwise tensor_tensor", Engine.vector, tensors=tensors)
    if operator.name == "power":
        return choose_engine(engine, "power", Engine.gpsimd, tensors=tensors)
    in_sbuf = all(tensor.buffer == SBUF for tensor in tensors)
    if engine is Engine.unknown and _are_wide_integers(tensors) and in_sbuf:
        return Engine.gpsimd
    return choose_engine(engine, "tensor_tensor", Engine.vector, Engine.gpsimd, tensors=tensors)


def _are_wide_integers(tensors: tuple[NkiTensor, ...]) -> bool:
    return all(tensor.dtype in ("int32", "uint32") for tensor in tensors)


def tensor_scalar(
    dst: NkiTensor,
    data: NkiTensor,
    op0: Any,
    operand0: float | NkiTensor,
    reverse0: bool = False,
    op1: Any = None,
    operand1: float | NkiTensor | None = None,
    reverse1: bool = False,
    engine: Engine = Engine.unknown,
    name: str | None = None,
) -> None:
    """dst = (data op0 operand0) op1 operand1, [P, F]; an operand is a number or float32 [P, 1]."""
    check_operands(dst, data)
    checks.check_elementwise(dst, data)
    steps = [(operator_of(op0, "tensor_scalar"), operand0, reverse0)]
    if op1 is not None:
        assert operand1 is not None, "op1 has an operand"
        steps.append((operator_of(op1, "tensor_scalar"), operand1, reverse1))
    kinds = {operator.is_bitwise for operator, _, _ in steps}
    if len(kinds) > 1:
        refuse("op-kinds", f"{op0.name} and {op1.name} in one instruction; use two")
    if kinds == {True}:
        chosen = choose_engine(engine, "bitwise tensor_scalar", Engine.vector, tensors=(dst, data))
        _bitwise_scalar(dst, data, steps)
    else:
        chosen = choose_engine(engine, "tensor_scalar", Engine.vector, *_scalar_engine(steps), tensors=(dst, data))
        values = read_float32(data)
        for operator, operand, reverse in steps:
            values = _apply_scalar(operator, values, checks.per_partition(operand, data, "an operand"), reverse)
        write(dst, values)
    _count(chosen, dst)


def _scalar_engine(steps: list[tuple[Operator, float | NkiTensor, bool]]) -> tuple[Engine, ...]:
    """ScalarE takes few combinations, documented for Trn2; gen2 is documented as none."""
    names = tuple(operator.name for operator, _, _ in steps)
    fits = names in (("multiply", "add"), ("multiply",), ("add",)) and current().generation.number >= 3
    return (Engine.scalar,) if fits else ()


def _bitwise_scalar(dst: NkiTensor, data: NkiTensor, steps: list[tuple[Operator, Any, bool]]) -> None:
    checks.check_integers(dst, data)
    values = read(data)
    for operator, operand, reverse in steps:
        if not isinstance(operand, int):
            refuse("bitwise-dtype", f"{operator.name} with {operand!r}; give an int (tiles are not documented)")
        other = np.full(values.shape, operand).astype(values.dtype)
        values = operator.apply(other, values) if reverse else operator.apply(values, other)
    write_exact(dst, values.astype(dst.values.dtype))


def scalar_tensor_tensor(
    dst: NkiTensor,
    data: NkiTensor,
    op0: Any,
    operand0: float | NkiTensor,
    op1: Any,
    operand1: NkiTensor,
    reverse0: bool = False,
    reverse1: bool = False,
    name: str | None = None,
) -> None:
    """dst = (data op0 operand0) op1 operand1, where operand1 is [P, F] as data is."""
    check_operands(dst, data, operand1)
    checks.check_elementwise(dst, data, operand1)
    checks.check_not_both_in_psum(data, operand1)
    first, second = (operator_of(op, "scalar_tensor_tensor", allowed=lambda o: not o.is_bitwise) for op in (op0, op1))
    values = _apply_scalar(first, read_float32(data), checks.per_partition(operand0, data, "operand0"), reverse0)
    other = read_float32(operand1)
    write(dst, _apply(second, other, values) if reverse1 else _apply(second, values, other))
    _count(Engine.vector, dst)


def tensor_reduce(
    dst: NkiTensor,
    op: Any,
    data: NkiTensor,
    axis: int | tuple[int, ...],
    negate: bool = False,
    keepdims: bool = False,
    name: str | None = None,
) -> None:
    """Reduces the last free axes of data; `negate` multiplies the result by -1."""
    check_operands(dst, data)
    axes = (axis,) if isinstance(axis, int) else tuple(axis)
    if 0 in axes or sorted(axes) != list(range(min(axes), data.ndim)):
        refuse("reduce-axis", f"axes {axes} of {data.shape}; reduce the last free axes, partitions by a transpose")
    operator = operator_of(op, "tensor_reduce", allowed=lambda o: o.reduce is not None)
    assert operator.reduce is not None
    kept = (dst.shape[0], dst.free_size)
    expected = (data.shape[0], int(np.prod(data.shape[1 : min(axes)], dtype=int)))
    if kept != expected:
        refuse("shape", f"reducing {axes} of {data.shape} leaves {expected} elements, the destination has {kept}")
    if operator.is_bitwise:
        checks.check_integers(dst, data)
        write_exact(dst, operator.reduce.reduce(read(data), axis=axes))
    else:
        values = operator.reduce.reduce(read_float32(data).reshape(data.shape), axis=axes, dtype=np.float32)
        write(dst, -values if negate else values)
    _count(Engine.vector, data)


def reciprocal(dst: NkiTensor, data: NkiTensor, name: str | None = None) -> None:
    """dst = 1 / data, [P, F]."""
    check_operands(dst, data)
    checks.check_elementwise(dst, data)
    write(dst, functions.reciprocal(read_float32(data)))
    _count(Engine.vector, dst)


def activation(
    dst: NkiTensor,
    op: Any,
    data: NkiTensor,
    bias: float | NkiTensor | None = None,
    scale: float | NkiTensor = 1.0,
    reduce_op: Any = None,
    reduce_res: NkiTensor | None = None,
    reduce_cmd: reduce_cmd = reduce_cmd.idle,
    name: str | None = None,
) -> None:
    """dst = op(data * scale + bias) on ScalarE in float32, [P, F]; `reduce_res` [P, 1] gets the sums of its rows.

    Sums that go on over several instructions are not emulated: reduce_cmd is idle, or reset_reduce.
    """
    check_operands(dst, data)
    checks.check_elementwise(dst, data)
    function = function_of(op)
    if isinstance(bias, (int, float)) and current().generation.number < 3:
        refuse("activation-bias", f"bias={bias!r} on {generation_name()}; memset a [P, 1] tile with it")
    values = read_float32(data) * checks.per_partition(scale, data, "scale")
    if bias is not None:
        values = values + _bias(bias, data)
    result = function(values.astype(np.float32))
    write(dst, result)
    _count(Engine.scalar, dst)
    _reduce_activation(result, data, reduce_op, reduce_res, reduce_cmd)


def _bias(bias: float | NkiTensor, data: NkiTensor) -> np.ndarray | np.float32:
    """Unlike other operands, a bias may have any dtype."""
    if not isinstance(bias, NkiTensor):
        return np.float32(bias)
    check_operands(bias)
    if bias.shape != (data.shape[0], 1):
        refuse("scalar-operand", f"bias has shape {bias.shape} and must have ({data.shape[0]}, 1)")
    return read_float32(bias)


def _reduce_activation(
    result: np.ndarray, data: NkiTensor, op: Any, reduce_res: NkiTensor | None, command: reduce_cmd
) -> None:
    if command is reduce_cmd.idle and op is None and reduce_res is None:
        return
    if command is not reduce_cmd.reset_reduce:
        refuse("not-emulated", f"{command}; only reset_reduce, which sums one instruction")
    if not isinstance(op, Operator) or op.name != "add":
        refuse("activation-reduce", f"reduce_op={getattr(op, 'name', op)}; it can only be nl.add")
    if reduce_res is None or reduce_res.shape != (data.shape[0], 1):
        shape = None if reduce_res is None else reduce_res.shape
        refuse("activation-reduce", f"reduce_res has shape {shape} and must have ({data.shape[0]}, 1)")
    check_operands(reduce_res)
    write(reduce_res, result.sum(axis=1, dtype=np.float32))
    current().costs.compute(Engine.scalar.value, 0)  # reads the registers out


def activation_reduce(
    dst: NkiTensor,
    op: Any,
    data: NkiTensor,
    reduce_op: Any,
    reduce_res: NkiTensor,
    bias: float | NkiTensor | None = None,
    scale: float | NkiTensor = 1.0,
    name: str | None = None,
) -> None:
    """`activation` with reset_reduce."""
    activation(dst, op, data, bias, scale, reduce_op, reduce_res, reduce_cmd.reset_reduce)


def iota(
    dst: NkiTensor,
    pattern: list[list[int]],
    offset: int = 0,
    channel_multiplier: int = 0,
    name: str | None = None,
) -> None:
    """dst[p, ...] = offset + p * channel_multiplier + sum of index * step, in int32, then cast."""
    check_operands(dst, spaces=(SBUF,))
    values = _affine(dst, pattern, offset, channel_multiplier)
    if dst.dtype in ("int32", "uint32"):
        write_exact(dst, values.astype(dst.values.dtype))
    else:
        write(dst, values.astype(np.float32))
    _count(Engine.gpsimd, dst)


def affine_select(
    dst: NkiTensor,
    pattern: list[list[int]],
    channel_multiplier: int,
    on_true_tile: NkiTensor,
    on_false_value: float,
    cmp_op: Any = functions.OPERATORS["equal"],
    offset: int = 0,
    name: str | None = None,
) -> None:
    """Where cmp_op(affine value, 0) holds on_true_tile [P, F], elsewhere a float32 constant."""
    check_operands(dst, on_true_tile, spaces=(SBUF,))
    checks.check_elementwise(dst, on_true_tile)
    operator = operator_of(cmp_op, "affine_select", allowed=lambda o: o.name.endswith(("equal", "less", "greater")))
    holds = operator.apply(_affine(dst, pattern, offset, channel_multiplier), np.zeros((), np.int32))
    values = np.where(holds != 0, read_float32(on_true_tile), np.float32(on_false_value))
    write(dst, values)
    _count(Engine.gpsimd, dst)


def _affine(dst: NkiTensor, pattern: list[list[int]], offset: int, channel_multiplier: int) -> np.ndarray:
    """[P, F] int32."""
    if not 1 <= len(pattern) <= 4 or int(np.prod([num for _, num in pattern])) != dst.free_size:
        refuse("pattern", f"{pattern} for {dst.free_size} elements per partition; counts must multiply to it")
    values = np.zeros((), np.int64)
    for step, num in pattern:
        values = values[..., None] + step * np.arange(num)
    rows = offset + channel_multiplier * np.arange(dst.shape[0])
    return (rows[:, None] + values.reshape(1, -1)).astype(np.int32)


def _apply(operator: Operator, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        return operator.apply(left, right).astype(np.float32)


def _apply_scalar(
    operator: Operator, values: np.ndarray, operand: np.ndarray | np.float32, reverse: bool
) -> np.ndarray:
    other = np.asarray(operand, np.float32)
    return _apply(operator, other, values) if reverse else _apply(operator, values, other)


def _count(engine: Engine, tensor: NkiTensor) -> None:
    """One cycle per element of a partition."""
    current().costs.compute(engine.value, tensor.free_size)


# Documented instructions that are not here, and the generation that first has each.
_OTHERS = {
    "range_select": 3,
    "nonzero_with_count": 3,
    "exponential": 4,
    "activate2": 4,
    "nc_matmul_mx": 4,
    "rand2": 4,
    "core_barrier": 3,
    "sendrecv": 3,
}


def __getattr__(name: str) -> NoReturn:
    if name.startswith("__"):
        raise AttributeError(name)
    require_generation(_OTHERS.get(name, 2), f"nki.isa.{name}", "compose it of older instructions")
    refuse("not-emulated", f"nki.isa.{name}; compose it of others, or teach the emulator")
