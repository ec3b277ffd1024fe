"""How many instructions a program would be on a NeuronCore, roughly: neuronx-cc unrolls loops, and refuses programs that are too long.

An approximation, in both halves. The limit is a default of the compiler. The estimate counts tiles of the documented sizes
(matmuls of 128 x 128 x 512, other instructions of 128 partitions x 2,048 elements, one DMA descriptor for each slice that is gathered
or scattered) and knows nothing of fusion, of layouts, of kernels or of how the compiler tiles. It says whether a program is far from
the limit or beyond it.
"""

from __future__ import annotations

import math
from typing import Any

from quire.backends.stablehlo_ir import Tensor, field, tensor

PARTITIONS = 128
MOVING = 512
"""Columns that one matmul instruction streams."""
FREE_ELEMENTS = 2048
"""Elements of each partition that one instruction of another engine works on."""
DESCRIPTOR_BYTES = 2**16
"""What one DMA descriptor moves, at most."""

_FREE = frozenset(
    {
        "stablehlo.constant",
        "stablehlo.reshape",
        "stablehlo.bitcast_convert",
        "stablehlo.return",
        "stablehlo.optimization_barrier",
        "stablehlo.while",
        "stablehlo.if",
        "stablehlo.case",
        "stablehlo.tuple",
        "stablehlo.get_tuple_element",
        "func.call",
        "func.return",
        "sdy.manual_computation",
        "sdy.return",
    }
)
_DATA_MOVES = ("stablehlo.gather", "stablehlo.dynamic_slice", "stablehlo.scatter", "stablehlo.dynamic_update_slice")


def instructions(op: Any, name: str) -> int:
    """Of one execution of an operation."""
    if name in _FREE:
        return 0
    if name == "stablehlo.dot_general":
        return _matmul(op)
    if name in _DATA_MOVES:
        return _descriptors(op, name)
    kinds = [tensor(value) for value in (*op.operation.operands, *op.operation.results)]
    if name == "stablehlo.custom_call":
        # A kernel's instructions are not in the program. What it makes is counted, not what it may update in place, such as the cache.
        operands = {tensor(value) for value in op.operation.operands}
        kinds = [tensor(value) for value in op.operation.results if tensor(value) not in operands]
    # A reduction is as long as what it reads, a broadcast as what it writes.
    return max(map(_tiles, kinds), default=0)


def _tiles(kind: Tensor) -> int:
    return math.ceil(kind.size / (PARTITIONS * FREE_ELEMENTS)) if kind.element else 0


def _matmul(op: Any) -> int:
    left, right = (tensor(operand) for operand in op.operation.operands)
    dims = "dot_dimension_numbers"
    batch = math.prod(left.shape[axis] for axis in field(op, dims, "lhs_batching_dimensions"))
    depth = math.prod(left.shape[axis] for axis in field(op, dims, "lhs_contracting_dimensions"))
    if not batch or not depth:
        return 0
    rows, columns = left.size // (batch * depth), right.size // (batch * depth)
    # Either side can be the stationary one.
    tiles = min(
        math.ceil(stationary / PARTITIONS) * math.ceil(moving / MOVING)
        for stationary, moving in ((rows, columns), (columns, rows))
    )
    return batch * math.ceil(depth / PARTITIONS) * tiles


def _descriptors(op: Any, name: str) -> int:
    """One for each contiguous slice that is read or written, more for a long one."""
    moved = tensor(op.operation.results[0] if name in _DATA_MOVES[:2] else op.operation.operands[_update_operand(name)])
    count = _num_slices(op, name)
    slice_bytes = moved.size * moved.item_bytes / max(1, count)
    return count * math.ceil(slice_bytes / DESCRIPTOR_BYTES)


def _update_operand(name: str) -> int:
    return 2 if name == "stablehlo.scatter" else 1


def _num_slices(op: Any, name: str) -> int:
    if name == "stablehlo.gather":
        indices = tensor(op.operation.operands[1])
        (vector_axis,) = field(op, "dimension_numbers", "index_vector_dim") or (len(indices.shape),)
    elif name == "stablehlo.scatter":
        indices = tensor(op.operation.operands[1])
        (vector_axis,) = field(op, "scatter_dimension_numbers", "index_vector_dim") or (len(indices.shape),)
    else:
        return 1
    return math.prod(dim for axis, dim in enumerate(indices.shape) if axis != vector_axis)
