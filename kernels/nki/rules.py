"""Every rule that the emulator enforces, by name, and the one way in which it refuses a program that breaks one.

The table says what each rule is; the sentence that a user reads is made where the rule is checked, since only there are the numbers
known. A test demands an illegal program for every line of the table. Where the documents are silent the stricter reading was taken, and
the line ends in "(strict)".
"""

from __future__ import annotations

import sys
from contextvars import ContextVar
from pathlib import Path
from types import FrameType
from typing import NoReturn

from quire.kernels.errors import NkiError

RULES = {
    # Memories and tensors
    "partitions": "an on-chip tensor has 1 to 128 partitions",
    "rank": "an on-chip tensor has a partition axis and 1 to 4 free axes",
    "dtype": "a dtype is one of the documented ones, and of this generation",
    "buffer": "a tensor lies in sbuf, psum, hbm, private_hbm or shared_hbm",
    "sbuf-capacity": "live SBUF tensors fit into 192, 224 or 256 KiB per partition (gen2, gen3, gen4)",
    "psum-capacity": "live PSUM tensors fit into 8 banks of 2 KiB per partition; a tensor takes whole banks (strict)",
    "psum-bank": "what a matmul or transpose writes lies in one PSUM bank of 2 KiB per partition (gen2, gen3)",
    "start-partition": "over 64 partitions start at 0, 33 to 64 at 0 or 64, up to 32 at 0, 32, 64 or 96",
    # Views
    "index-bounds": "static indices and slices lie within the axis, and are not negative (strict)",
    "empty-view": "a view holds at least one element (strict)",
    "partition-axis": "views of on-chip tensors leave axis 0 where it is and whole",
    "reshape": "a reshape keeps the number of elements and needs them contiguous",
    "broadcast": "only an axis of size 1 is broadcast",
    "broadcast-write": "a place is written once: a broadcast view is no destination",
    "ap-bounds": "an access pattern stays within its storage",
    "ap-partition-step": "the first step of an on-chip access pattern is the storage's free size",
    "ap-of-view": "an explicit offset or an indirection needs a whole, contiguous tensor, not a slice of one (strict)",
    # Indirect addressing
    "indirect-space": "vector_offset indexes tensors in HBM only, and its indices lie in SBUF",
    "indirect-dim": "vector_offset has indirect_dim 0",
    "indirect-exclusive": "vector_offset and scalar_offset exclude each other",
    "indirect-shape": "vector_offset is [P, 1] with P the first count of the pattern; scalar_offset is [1, 1]",
    "indirect-dtype": "indices are int32 or uint32",
    "indirect-operand": "only DMA takes an indirect operand, one a copy (strict)",
    "indirect-bounds": "an index lies within the indexed axis unless oob_mode is skip",
    "scatter-duplicate": "a scatter writes no place twice: which row wins is not documented (strict)",
    # DMA
    "dma-space": "DMA reaches HBM and SBUF, not PSUM",
    "dma-elements": "a DMA copies as many elements as it has places for",
    "dma-hwdge": "hwdge needs gen3 and no vector_offset",
    "dma-swdge": "vector_offset needs swdge: dge_mode swdge or unknown",
    "dma-engine": "a DMA's engine is scalar or sync, and named only with hwdge",
    "dma-priority": "priority is 0 to 3, on gen4, with a DGE",
    "dma-oob": "oob_mode.skip is for indirect copies",
    "dma-transpose": "dma_transpose takes 2-byte types, its documented permutations, a last axis up to 128",
    # Operands of compute instructions
    "operand-space": "an operand lies in a memory that the instruction reaches",
    "uninitialised": "what is read was written before",
    "shape": "operands agree in partitions and in elements per partition; nothing is broadcast",
    "overlap": "an instruction works in place or between places apart: which element it reads first is not documented (strict)",
    "two-psum": "at most one of two tensor operands lies in PSUM",
    "gpsimd-psum": "GpSimd does not reach PSUM",
    "engine": "an instruction runs on the engines that it is documented for",
    "scalar-operand": "a per-partition operand is [P, 1] of float32, or a number",
    "alu-op": "an operator is one of the ALU's that the instruction takes: no divide, no modulo",
    "op-kinds": "op0 and op1 are both bitwise or both arithmetic",
    "bitwise-dtype": "bitwise operators take and give integers of one size",
    "int-precision": "integers above 2^24 do not survive arithmetic in float32 (strict: refused when it happens)",
    "int-cast": "how a fraction becomes an integer is not documented: a cast to one must be exact (strict)",
    "memset-value": "an integer tensor is filled with an int",
    # TensorE
    "matmul-space": "matmul reads SBUF and writes PSUM",
    "matmul-dtype": "operands are floats; float32 goes with float32 only",
    "matmul-dst-dtype": "a matmul's destination is float32 (gen4: or bfloat16)",
    "matmul-contraction": "stationary and moving have the same partitions, at most 128",
    "matmul-stationary": "stationary has at most 128 elements per partition",
    "matmul-moving": "moving has at most 512 elements per partition (gen4: 8 banks' worth)",
    "matmul-shape": "the destination is [elements of stationary, elements of moving]",
    "matmul-accumulate": "accumulation needs an earlier matmul's result in every place (gen2, gen3: a memset is none)",
    "matmul-mode": "double_row needs gen3; it and tiling modes are not emulated",
    "transpose-size": "TensorE transposes up to 128 x 128, VectorE up to 32 x 32",
    "transpose-space": "TensorE transposes from SBUF to PSUM",
    "transpose-dtype": "TensorE on gen2 writes float32; all others write the dtype of the data",
    # ScalarE, VectorE, GpSimd
    "activation-function": "op is an activation function",
    "activation-range": "arguments lie within the documented range of the function",
    "activation-bias": "on gen2 a bias is a [P, 1] tile, never a number",
    "activation-reduce": "ScalarE's registers only add: reduce_op is nl.add, reduce_res [P, 1]",
    "reduce-axis": "a reduction is over the last free axes, never the partition axis",
    "pattern": "an iota pattern has up to 4 axes and as many elements per partition as its tensor",
    "predicate-dtype": "a predicate is uint8, uint16 or uint32",
    "same-dtype": "a predicated copy does not convert",
    # Kernels
    "generation": "the instruction exists on this generation",
    "not-emulated": "the instruction is documented and the emulator does not have it",
    "argument": "arguments are arrays or hashable constants, positional; no lists, no keyword-only parameters",
    "lnc": "gen2 has one physical core per logical core, gen3 and gen4 one or two",
    "output": "a kernel returns tensors in shared_hbm, or its own inputs",
    "output-unwritten": "every element of a returned tensor was written",
}

# NKI's functions take no handle of the core they build for, so what they need of it is found as the official package finds it.
generation: ContextVar[str] = ContextVar("generation", default="no core")
"""The name of the generation whose rules hold; `core.running` sets it."""

_EMULATOR = Path(__file__).parent


def refuse(rule: str, sentence: str) -> NoReturn:
    """Raises NkiError for the kernel's line that the emulator was called from. `sentence` has the numbers and the remedy."""
    assert rule in RULES, f"{rule} is no rule"
    raise NkiError(sentence, rule=rule, generation=generation.get(), place=_place_in_kernel())


def _place_in_kernel() -> str:
    """File and line of the innermost frame that is not the emulator's own."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and Path(frame.f_code.co_filename).parent == _EMULATOR:
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame is not None else "unknown"
