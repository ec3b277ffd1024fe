"""What every instruction asks of its operands: where they lie, on which partitions, that they were written, and that they agree."""

from __future__ import annotations

import numpy as np

from quire.kernels.nki.core import PSUM_BANK_BYTES, current
from quire.kernels.nki.dtypes import INTEGERS, convert, to_float32
from quire.kernels.nki.rules import refuse
from quire.kernels.nki.tensor import EMPTY, MAX_FREE_AXES, ON_CHIP, PSUM, WRITTEN, NkiTensor


def read(tensor: NkiTensor) -> np.ndarray:
    """The values of an operand, all of which must have been written."""
    unwritten = tensor.state == EMPTY
    if unwritten.any():
        at = tuple(int(i) for i in np.argwhere(unwritten)[0])
        refuse(
            "uninitialised",
            f"{int(unwritten.sum())} of {unwritten.size} elements were never written, {at} first; memset or copy first",
        )
    return tensor.values


def read_float32(tensor: NkiTensor) -> np.ndarray:
    """An operand as the engines compute with it: [P, free elements] float32."""
    return to_float32(read(tensor), tensor.dtype).reshape(tensor.shape[0], -1)


def write(dst: NkiTensor, values: np.ndarray, state: int = WRITTEN) -> None:
    """Float32 results into a destination, converted to its dtype; any shape of as many elements."""
    write_exact(dst, convert(values, dst.dtype), state)


def write_exact(dst: NkiTensor, values: np.ndarray, state: int = WRITTEN) -> None:
    """Values that already have the destination's dtype."""
    if not dst.values.flags.writeable:
        refuse("broadcast-write", f"a destination of shape {dst.shape} holds some places several times")
    dst.values[...] = values.reshape(dst.shape)
    dst.state[...] = state


def check_operands(*tensors: NkiTensor, spaces: tuple[str, ...] = ON_CHIP, rule: str = "operand-space") -> None:
    """Operands of a compute instruction: on chip, plain, and on partitions that the engines can start at."""
    for tensor in tensors:
        if not isinstance(tensor, NkiTensor):
            refuse("operand-space", f"{tensor!r} is no tensor")
        if tensor.indirection is not None:
            refuse("indirect-operand", "only DMA reads or writes an indirect tensor; copy it to SBUF")
        if tensor.buffer not in spaces:
            refuse(rule, f"{tensor!r} lies in {tensor.buffer}, and the instruction reaches {' and '.join(spaces)}")
        if tensor.ndim > 1 + MAX_FREE_AXES:
            refuse("rank", f"a view of shape {tensor.shape} has more than {MAX_FREE_AXES} free axes; flatten some")
        check_start_partition(tensor)


def check_start_partition(tensor: NkiTensor) -> None:
    """The partitions that operands may start at depend on how many they take."""
    start, num = tensor.offset // tensor.storage.free_size, tensor.shape[0]
    allowed = (0,) if num > 64 else (0, 64) if num > 32 else (0, 32, 64, 96)
    if start not in allowed:
        refuse(
            "start-partition",
            f"{num} partitions start at {start}; they can start at {', '.join(map(str, allowed))}",
        )


def check_one_bank(dst: NkiTensor) -> None:
    """A result of TensorE lies in one bank, except on gen4, where it may take them all."""
    if current().generation.number >= 4:
        return
    item = dst.values.itemsize
    first = dst.offset % dst.storage.free_size
    last = first + sum(step * (count - 1) for step, count in dst.get_pattern()[1:])
    if first * item // PSUM_BANK_BYTES != last * item // PSUM_BANK_BYTES:
        refuse(
            "psum-bank",
            f"bytes {first * item} to {(last + 1) * item} of each partition cross a bank of {PSUM_BANK_BYTES}; "
            "split the destination at the bank's end",
        )


def check_elementwise(dst: NkiTensor, *operands: NkiTensor) -> None:
    """Partitions and elements per partition agree; how free axes are cut up does not matter. In place is possible, askew is not."""
    for operand in operands:
        if (operand.shape[0], operand.free_size) != (dst.shape[0], dst.free_size):
            refuse("shape", f"{dst.shape} against {operand.shape}; nothing is broadcast, so give equal shapes")
        check_overlap(dst, operand)


def check_overlap(dst: NkiTensor, src: NkiTensor) -> None:
    """A destination is its source, element by element, or has none of its places."""
    if dst.storage is not src.storage or not np.shares_memory(dst.values, src.values):
        return
    in_order = dst.values.flags.c_contiguous and src.values.flags.c_contiguous
    if dst.offset != src.offset or not (in_order or dst.get_pattern() == src.get_pattern()):
        refuse(
            "overlap", f"a destination {dst.shape} lies askew over its source {src.shape}; go through another tensor"
        )


def check_not_both_in_psum(first: NkiTensor, second: NkiTensor) -> None:
    """Of two tensor operands one at most comes from PSUM."""
    if first.buffer == second.buffer == PSUM:
        refuse("two-psum", "both operands lie in PSUM; copy one to SBUF")


def check_gpsimd(*tensors: NkiTensor) -> None:
    """GpSimd has no port to PSUM."""
    for tensor in tensors:
        if tensor.buffer == PSUM:
            refuse("gpsimd-psum", f"{tensor!r} lies in PSUM, which GpSimd does not reach; copy it to SBUF")


def check_integers(*tensors: NkiTensor) -> None:
    """Operands of bitwise operators, which see patterns of bits."""
    sizes = {tensor.values.itemsize for tensor in tensors}
    names = [tensor.dtype for tensor in tensors]
    if not set(names) <= INTEGERS or len(sizes) != 1:
        refuse("bitwise-dtype", f"bitwise operators on {', '.join(names)}; use integers of one size")


def per_partition(operand: float | NkiTensor, data: NkiTensor, what: str) -> np.ndarray | np.float32:
    """A number, or the [P, 1] float32 of a tile that has one number per partition of `data`."""
    if not isinstance(operand, NkiTensor):
        return np.float32(operand)
    check_operands(operand)
    if operand.shape != (data.shape[0], 1):
        refuse("scalar-operand", f"{what} has shape {operand.shape} and must have ({data.shape[0]}, 1)")
    if operand.dtype != "float32":
        refuse("scalar-operand", f"{what} is {operand.dtype} and must be float32")
    return read_float32(operand)
