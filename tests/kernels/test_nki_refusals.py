"""Illegal NKI programs, each refused by the emulator with the name of the rule that it breaks, and a legal twin that runs.

A program is issued by a function without arguments. Helpers: `sb` and `ps` are written tiles in SBUF and PSUM, `mm` a PSUM tile that a
matmul wrote, `hbm` an input; `new` is a tile that nobody wrote.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quire.kernels.errors import NkiError, QuireError
from quire.kernels.nki import isa as nisa
from quire.kernels.nki import language as nl
from quire.kernels.nki import simulate
from quire.kernels.nki.rules import RULES
from quire.kernels.nki.tensor import NkiTensor, from_array

F32, BF16, I32, U32, U8 = nl.float32, nl.bfloat16, nl.int32, nl.uint32, nl.uint8
KIB = 1024


def new(*shape: int, dtype: str = F32, buffer: str = nl.sbuf) -> NkiTensor:
    return nl.ndarray(shape, dtype, buffer=buffer)


def sb(*shape: int, dtype: str = F32, value: float = 1) -> NkiTensor:
    return nl.full(shape, int(value) if "int" in dtype else value, dtype)


def ps(*shape: int, dtype: str = F32) -> NkiTensor:
    return nl.zeros(shape, dtype, buffer=nl.psum)


def mm(m: int, n: int) -> NkiTensor:
    tile = new(m, n, buffer=nl.psum)
    nisa.nc_matmul(dst=tile, stationary=sb(8, m), moving=sb(8, n))
    return tile


def hbm(*shape: int, dtype: Any = np.float32) -> NkiTensor:
    return from_array(np.ones(shape, dtype))


def idx(*values: int, dtype: str = I32) -> NkiTensor:
    tile = new(len(values), 1, dtype=dtype)
    nisa.dma_copy(dst=tile, src=from_array(np.array(values, dtype)[:, None]))
    return tile


def rows(table: NkiTensor, index: NkiTensor, **keywords: Any) -> NkiTensor:
    """Rows of a [slots, width] table."""
    width = table.shape[1]
    return table.ap([[width, index.shape[0]], [1, width]], vector_offset=index, **keywords)


@dataclass(frozen=True)
class Program:
    rule: str
    illegal: Callable[[], Any]
    legal: Callable[[], Any]
    generation: str = "gen2"
    legal_generation: str | None = None  # where the twin is the same program on another one


def on_gen(rule: str, generation: str, program: Callable[[], Any], *, first: str) -> Program:
    """A program that `first` is the first generation to run."""
    return Program(rule, program, program, generation, first)


def matmul(dst: NkiTensor, stationary: NkiTensor, moving: NkiTensor, **keywords: Any) -> None:
    nisa.nc_matmul(dst=dst, stationary=stationary, moving=moving, **keywords)


def copy(dst: NkiTensor, src: NkiTensor, **keywords: Any) -> None:
    nisa.tensor_copy(dst=dst, src=src, **keywords)


def dma(dst: NkiTensor, src: NkiTensor, **keywords: Any) -> None:
    nisa.dma_copy(dst=dst, src=src, **keywords)


def act(data: NkiTensor, op: Any = nl.exp, **keywords: Any) -> None:
    nisa.activation(dst=new(*data.shape), op=op, data=data, **keywords)


def summed(data: NkiTensor, op: Any = nl.add, width: int = 1) -> None:
    act(data, reduce_op=op, reduce_res=new(data.shape[0], width), reduce_cmd=nisa.reduce_cmd.reset_reduce)


def tt(data1: NkiTensor, data2: NkiTensor, op: Any = nl.add, dtype: str = F32, **keywords: Any) -> None:
    nisa.tensor_tensor(dst=new(*data1.shape, dtype=dtype), data1=data1, data2=data2, op=op, **keywords)


def ts(data: NkiTensor, op: Any, operand: Any, dtype: str = F32, **keywords: Any) -> None:
    nisa.tensor_scalar(dst=new(*data.shape, dtype=dtype), data=data, op0=op, operand0=operand, **keywords)


def twice(tile: NkiTensor, accumulate: bool | None, columns: int = 4) -> None:
    matmul(tile[:, 0:columns], sb(8, 4), sb(8, columns))
    matmul(tile, sb(8, 4), sb(8, tile.shape[1]), accumulate=accumulate)


SKIP = {"oob_mode": nisa.oob_mode.skip}
HWDGE = {"dge_mode": nisa.dge_mode.hwdge}
SWDGE = {"dge_mode": nisa.dge_mode.swdge}
NO_DGE = {"dge_mode": nisa.dge_mode.none}

PROGRAMS = [
    # Memories and tensors
    Program("partitions", lambda: new(129, 4), lambda: new(128, 4)),
    Program("partitions", lambda: new(256, 4, buffer=nl.psum), lambda: new(256, 4, buffer=nl.hbm)),
    Program("rank", lambda: new(128), lambda: new(128, 1)),
    Program("rank", lambda: new(8, 1, 1, 1, 1, 2), lambda: new(8, 1, 1, 1, 2)),
    Program("rank", lambda: act(sb(8, 1, 1, 1, 2).expand_dim(1)), lambda: act(sb(8, 1, 1, 2).expand_dim(1))),
    Program("dtype", lambda: new(8, 4, dtype="float64"), lambda: new(8, 4, dtype="float16")),
    on_gen("dtype", "gen3", lambda: new(8, 4, dtype="float8_e4m3fn"), first="gen4"),
    Program("buffer", lambda: new(8, 4, buffer="l2"), lambda: new(8, 4, buffer=nl.private_hbm)),
    Program("sbuf-capacity", lambda: new(1, 192 * KIB + 1, dtype=U8), lambda: new(1, 192 * KIB, dtype=U8)),
    Program(
        "sbuf-capacity",
        lambda: [new(128, 30 * KIB) for _ in range(2)],  # both are held
        lambda: [new(128, 30 * KIB).shape for _ in range(2)],  # one after the other
    ),
    on_gen("sbuf-capacity", "gen2", lambda: new(1, 224 * KIB, dtype=U8), first="gen3"),
    on_gen("sbuf-capacity", "gen3", lambda: new(1, 256 * KIB, dtype=U8), first="gen4"),
    Program("psum-capacity", lambda: [ps(8, 1) for _ in range(9)], lambda: [ps(8, 1) for _ in range(8)]),
    Program("psum-capacity", lambda: ps(8, 8 * 512 + 1), lambda: ps(8, 8 * 512)),
    Program(
        "psum-bank",
        lambda: matmul(new(4, 1024, buffer=nl.psum)[:, 256:768], sb(8, 4), sb(8, 512)),
        lambda: matmul(new(4, 1024, buffer=nl.psum)[:, 512:1024], sb(8, 4), sb(8, 512)),
    ),
    Program(
        "psum-bank",
        lambda: nisa.nc_transpose(dst=new(4, 520, buffer=nl.psum)[:, 508:516], data=sb(8, 4)),
        lambda: nisa.nc_transpose(dst=new(4, 520, buffer=nl.psum)[:, 512:520], data=sb(8, 4)),
    ),
    Program("start-partition", lambda: act(sb(128, 4)[16:32]), lambda: act(sb(128, 4)[32:64])),
    Program("start-partition", lambda: act(sb(128, 4)[32:96]), lambda: act(sb(128, 4)[64:128])),
    Program("start-partition", lambda: act(sb(128, 4)[5]), lambda: act(sb(128, 4)[96])),
    Program("start-partition", lambda: dma(new(128, 4)[8:16], hbm(8, 4)), lambda: dma(new(128, 4)[0:8], hbm(8, 4))),
    Program(
        "start-partition",
        lambda: dma(new(2, 4), rows(hbm(8, 4), sb(128, 1, dtype=I32)[2:4])),
        lambda: dma(new(2, 4), rows(hbm(8, 4), sb(128, 1, dtype=I32)[32:34])),
    ),
    # Views
    Program("index-bounds", lambda: sb(8, 4)[:, 0:5], lambda: sb(8, 4)[:, 0:4]),
    Program("index-bounds", lambda: sb(8, 4)[:, nl.ds(2, 3)], lambda: sb(8, 4)[:, nl.ds(2, 2)]),
    Program("index-bounds", lambda: hbm(8, 4)[-1], lambda: hbm(8, 4)[7]),
    Program("index-bounds", lambda: hbm(8, 4)[0, 0, 0], lambda: hbm(8, 4)[0, 0:1]),
    Program("empty-view", lambda: sb(8, 4)[:, 2:2], lambda: sb(8, 4)[:, 2:3]),
    Program("partition-axis", lambda: sb(8, 4).permute((1, 0)), lambda: hbm(8, 4).permute((1, 0))),
    Program("partition-axis", lambda: sb(8, 4).reshape((4, 8)), lambda: sb(8, 4).reshape((8, 2, 2))),
    Program("partition-axis", lambda: sb(1, 4).broadcast(0, 8), lambda: sb(4, 1).broadcast(1, 8)),
    Program("partition-axis", lambda: sb(8, 4).expand_dim(0), lambda: sb(8, 4).expand_dim(1)),
    Program("partition-axis", lambda: sb(1, 4, 1).squeeze_dim(0), lambda: sb(1, 4, 1).squeeze_dim(2)),
    Program("reshape", lambda: hbm(8, 4).reshape((33,)), lambda: hbm(8, 4).reshape((32,))),
    Program("reshape", lambda: hbm(8, 4)[:, 0:2].reshape((16,)), lambda: hbm(8, 4)[0:4].reshape((16,))),
    Program("broadcast", lambda: sb(8, 4).broadcast(1, 8), lambda: sb(8, 1).broadcast(1, 8)),
    Program(
        "broadcast-write",
        lambda: copy(sb(8, 1).broadcast(1, 4), sb(8, 4)),
        lambda: copy(sb(8, 4), sb(8, 1).broadcast(1, 4)),
    ),
    Program("ap-bounds", lambda: hbm(8, 4).ap([[4, 8], [1, 5]]), lambda: hbm(8, 4).ap([[4, 8], [1, 4]])),
    Program("ap-bounds", lambda: hbm(8, 4).ap([[1, 32]], offset=1), lambda: hbm(8, 4).ap([[1, 31]], offset=1)),
    Program("ap-partition-step", lambda: sb(8, 4).ap([[2, 8], [1, 2]]), lambda: sb(8, 4).ap([[4, 8], [1, 2]])),
    Program("ap-of-view", lambda: hbm(8, 4)[2:4].ap([[1, 4]], offset=4), lambda: hbm(8, 4)[2:4].ap([[1, 4]])),
    # Indirect addressing
    Program(
        "indirect-space",
        lambda: dma(new(2, 4), rows(sb(8, 4), idx(0, 5))),
        lambda: dma(new(2, 4), rows(hbm(8, 4), idx(0, 5))),
    ),
    Program(
        "indirect-space",
        lambda: dma(new(2, 4), rows(hbm(8, 4), hbm(2, 1, dtype=np.int32))),
        lambda: dma(new(2, 4), rows(hbm(8, 4), sb(2, 1, dtype=I32))),
    ),
    Program(
        "indirect-dim",
        lambda: rows(hbm(8, 4), idx(0, 1), indirect_dim=1),
        lambda: rows(hbm(8, 4), idx(0, 1), indirect_dim=0),
    ),
    Program(
        "indirect-exclusive",
        lambda: rows(hbm(8, 4), idx(0, 1), scalar_offset=idx(0)),
        lambda: hbm(8, 4).ap([[4, 2], [1, 4]], scalar_offset=idx(0)),
    ),
    Program(
        "indirect-shape",
        lambda: hbm(8, 4).ap([[4, 3], [1, 4]], vector_offset=idx(0, 1)),
        lambda: hbm(8, 4).ap([[4, 2], [1, 4]], vector_offset=idx(0, 1)),
    ),
    Program(
        "indirect-shape",
        lambda: hbm(8, 4).ap([[4, 129], [1, 4]], vector_offset=sb(128, 1, dtype=I32)),
        lambda: hbm(8, 4).ap([[4, 128], [1, 4]], vector_offset=sb(128, 1, dtype=I32)),
    ),
    Program("indirect-dtype", lambda: rows(hbm(8, 4), sb(2, 1)), lambda: rows(hbm(8, 4), sb(2, 1, dtype=U32))),
    Program("ap-of-view", lambda: rows(hbm(8, 4)[4:8], idx(0, 1)), lambda: rows(hbm(8, 4), idx(4, 5))),
    Program(
        "indirect-operand",
        lambda: tt(rows(hbm(8, 4), idx(0, 1)), sb(2, 4)),
        lambda: dma(new(2, 4), rows(hbm(8, 4), idx(0, 1))),
    ),
    Program(
        "indirect-operand",
        lambda: dma(rows(hbm(8, 4), idx(0, 1)), rows(hbm(8, 4), idx(2, 3))),
        lambda: dma(rows(hbm(8, 4), idx(0, 1)), hbm(2, 4)),
    ),
    Program(
        "indirect-bounds",
        lambda: dma(new(2, 4), rows(hbm(8, 4), idx(0, 8))),
        lambda: dma(new(2, 4), rows(hbm(8, 4), idx(0, 8)), **SKIP),
    ),
    Program(
        "indirect-bounds",
        lambda: dma(rows(hbm(8, 4), idx(0, -1)), sb(2, 4)),
        lambda: dma(rows(hbm(8, 4), idx(0, -1)), sb(2, 4), **SKIP),
    ),
    Program(
        "indirect-bounds",
        lambda: dma(new(1, 4), hbm(8, 4).ap([[4, 1], [1, 4]], scalar_offset=idx(8))),
        lambda: dma(new(1, 4), hbm(8, 4).ap([[4, 1], [1, 4]], scalar_offset=idx(7))),
    ),
    Program(
        "scatter-duplicate",
        lambda: dma(rows(hbm(8, 4), idx(3, 3)), sb(2, 4)),
        lambda: dma(new(2, 4), rows(hbm(8, 4), idx(3, 3))),
    ),
    # DMA
    Program("dma-space", lambda: dma(ps(8, 4), hbm(8, 4)), lambda: dma(sb(8, 4), hbm(8, 4))),
    Program("dma-space", lambda: dma(hbm(8, 4), ps(8, 4)), lambda: dma(hbm(8, 4), sb(8, 4))),
    Program("dma-elements", lambda: dma(new(8, 4), hbm(8, 3)), lambda: dma(new(8, 4), hbm(2, 4, 4))),
    on_gen("dma-hwdge", "gen2", lambda: dma(new(8, 4), hbm(8, 4), **HWDGE), first="gen3"),
    Program(
        "dma-hwdge",
        lambda: dma(new(2, 4), rows(hbm(8, 4), idx(0, 1)), **HWDGE),
        lambda: dma(new(2, 4), rows(hbm(8, 4), idx(0, 1)), **SWDGE),
        generation="gen3",
    ),
    Program(
        "dma-swdge",
        lambda: dma(new(2, 4), rows(hbm(8, 4), idx(0, 1)), **NO_DGE),
        lambda: dma(new(2, 4), rows(hbm(8, 4), idx(0, 1))),
    ),
    Program(
        "dma-engine",
        lambda: dma(new(8, 4), hbm(8, 4), engine=nisa.engine.gpsimd, **HWDGE),
        lambda: dma(new(8, 4), hbm(8, 4), engine=nisa.engine.sync, **HWDGE),
        generation="gen3",
    ),
    Program(
        "dma-engine",
        lambda: dma(new(8, 4), hbm(8, 4), engine=nisa.engine.sync),
        lambda: dma(new(8, 4), hbm(8, 4), **SWDGE),
    ),
    on_gen("dma-priority", "gen3", lambda: dma(new(8, 4), hbm(8, 4), priority=1), first="gen4"),
    Program("dma-oob", lambda: dma(new(8, 4), hbm(8, 4), **SKIP), lambda: dma(new(8, 4), hbm(8, 4))),
    Program(
        "dma-transpose",
        lambda: nisa.dma_transpose(dst=new(4, 8), src=hbm(8, 4)),
        lambda: nisa.dma_transpose(dst=new(4, 8, dtype="float16"), src=hbm(8, 4, dtype=np.float16)),
    ),
    Program(
        "dma-transpose",
        lambda: nisa.dma_transpose(dst=new(8, 4, dtype="float16"), src=hbm(8, 4, dtype=np.float16), axes=(0, 1)),
        lambda: nisa.dma_transpose(dst=new(4, 8, dtype="float16"), src=hbm(8, 4, dtype=np.float16), axes=(1, 0)),
    ),
    Program(
        "generation",
        lambda: nisa.dma_transpose(dst=new(4, 2), src=rows(hbm(8, 4), idx(0, 1))),
        lambda: dma(new(2, 4), rows(hbm(8, 4), idx(0, 1))),
    ),
    # Operands of compute instructions
    Program("operand-space", lambda: act(hbm(8, 4)), lambda: act(sb(8, 4))),
    Program("operand-space", lambda: nisa.memset(dst=hbm(8, 4), value=0), lambda: nisa.memset(dst=ps(8, 4), value=0)),
    Program("uninitialised", lambda: act(new(8, 4)), lambda: act(sb(8, 4))),
    Program("uninitialised", lambda: dma(hbm(8, 4), new(8, 4)), lambda: dma(new(8, 4), hbm(8, 4))),
    Program(
        "uninitialised",
        lambda: (dma(t := new(2, 4), rows(hbm(8, 4), idx(0, 8)), **SKIP), act(t)),
        lambda: (dma(t := sb(2, 4), rows(hbm(8, 4), idx(0, 8)), **SKIP), act(t)),
    ),
    Program(
        "uninitialised",
        lambda: dma(new(2, 4), rows(new(8, 4, buffer=nl.hbm), idx(0, 1))),
        lambda: dma(new(2, 4), rows(hbm(8, 4), idx(0, 1))),
    ),
    Program(
        "uninitialised",
        lambda: nisa.tensor_copy_predicated(dst=new(8, 4), src=sb(8, 4), predicate=sb(8, 4, dtype=U8, value=0)),
        lambda: nisa.tensor_copy_predicated(dst=new(8, 4), src=sb(8, 4), predicate=sb(8, 4, dtype=U8, value=1)),
    ),
    Program("shape", lambda: tt(sb(8, 4), sb(8, 1)), lambda: tt(sb(8, 4), sb(8, 1).broadcast(1, 4))),
    Program("shape", lambda: copy(new(8, 4), sb(4, 8)), lambda: copy(new(8, 4), sb(8, 2, 2))),
    Program(
        "shape",
        lambda: nisa.tensor_reduce(dst=new(8, 2), op=nl.add, data=sb(8, 4), axis=1),
        lambda: nisa.tensor_reduce(dst=new(8, 1), op=nl.add, data=sb(8, 4), axis=1),
    ),
    Program(
        "shape",
        lambda: nisa.nc_transpose(dst=new(8, 4, buffer=nl.psum), data=sb(8, 4)),
        lambda: nisa.nc_transpose(dst=new(4, 8, buffer=nl.psum), data=sb(8, 4)),
    ),
    Program(
        "overlap", lambda: copy((t := sb(8, 4))[:, 0:3], t[:, 1:4]), lambda: copy((t := sb(8, 4))[:, 0:2], t[:, 2:4])
    ),
    Program(
        "overlap",
        lambda: copy(t := sb(8, 3, 3), t.permute((0, 2, 1))),
        lambda: copy(t := sb(8, 9), t.reshape((8, 3, 3))),
    ),
    Program("overlap", lambda: dma((t := hbm(8, 4))[1:8], t[0:7]), lambda: dma((t := hbm(8, 4))[4:8], t[0:4])),
    Program("two-psum", lambda: tt(ps(8, 4), ps(8, 4)), lambda: tt(ps(8, 4), sb(8, 4))),
    Program(
        "two-psum",
        lambda: nisa.scalar_tensor_tensor(new(8, 4), ps(8, 4), nl.add, 1.0, nl.add, ps(8, 4)),
        lambda: nisa.scalar_tensor_tensor(new(8, 4), ps(8, 4), nl.add, 1.0, nl.add, sb(8, 4)),
    ),
    Program(
        "gpsimd-psum",
        lambda: copy(new(8, 4), ps(8, 4), engine=nisa.engine.gpsimd),
        lambda: copy(new(8, 4), ps(8, 4), engine=nisa.engine.vector),
    ),
    Program("gpsimd-psum", lambda: tt(ps(8, 4), sb(8, 4), op=nl.power), lambda: tt(sb(8, 4), sb(8, 4), op=nl.power)),
    Program(
        "operand-space",
        lambda: nisa.iota(dst=ps(8, 4), pattern=[[1, 4]]),
        lambda: nisa.iota(dst=new(8, 4), pattern=[[1, 4]]),
    ),
    Program(
        "engine",
        lambda: nisa.memset(dst=new(8, 4), value=0, engine=nisa.engine.scalar),
        lambda: nisa.memset(dst=new(8, 4), value=0, engine=nisa.engine.gpsimd),
    ),
    Program(
        "engine",
        lambda: ts(sb(8, 4), nl.multiply, 2.0, engine=nisa.engine.scalar),
        lambda: ts(sb(8, 4), nl.multiply, 2.0, engine=nisa.engine.vector),
    ),
    on_gen("generation", "gen2", lambda: copy(new(8, 4), sb(8, 4), engine=nisa.engine.scalar), first="gen3"),
    Program("scalar-operand", lambda: ts(sb(8, 4), nl.add, sb(8, 4)), lambda: ts(sb(8, 4), nl.add, sb(8, 1))),
    Program(
        "scalar-operand",
        lambda: ts(sb(8, 4), nl.add, sb(8, 1, dtype=BF16)),
        lambda: ts(sb(8, 4, dtype=BF16), nl.add, sb(8, 1)),
    ),
    Program("scalar-operand", lambda: act(sb(8, 4), scale=sb(8, 1, dtype=BF16)), lambda: act(sb(8, 4), scale=sb(8, 1))),
    Program("alu-op", lambda: tt(sb(8, 4), sb(8, 4), op=nl.divide), lambda: tt(sb(8, 4), sb(8, 4), op=nl.multiply)),
    Program("alu-op", lambda: ts(sb(8, 4), nl.exp, 0.0), lambda: act(sb(8, 4), nl.exp)),
    Program(
        "alu-op",
        lambda: nisa.tensor_reduce(dst=new(8, 1), op=nl.subtract, data=sb(8, 4), axis=1),
        lambda: nisa.tensor_reduce(dst=new(8, 1), op=nl.maximum, data=sb(8, 4), axis=1),
    ),
    Program(
        "op-kinds",
        lambda: ts(sb(8, 4, dtype=I32), nl.bitwise_and, 1, I32, op1=nl.add, operand1=1),
        lambda: ts(sb(8, 4, dtype=I32), nl.bitwise_and, 1, I32, op1=nl.left_shift, operand1=1),
    ),
    Program(
        "bitwise-dtype",
        lambda: tt(sb(8, 4), sb(8, 4), op=nl.bitwise_or),
        lambda: tt(sb(8, 4, dtype=I32), sb(8, 4, dtype=I32), op=nl.bitwise_or, dtype=I32),
    ),
    Program(
        "int-precision",
        lambda: ts(sb(8, 4, dtype=I32, value=2**24 + 1), nl.add, 1.0),
        lambda: ts(sb(8, 4, dtype=I32, value=2**24), nl.add, 1.0),
    ),
    Program(
        "int-precision",
        lambda: tt(*[sb(8, 4, dtype=I32, value=2**25)] * 2, dtype=I32, engine=nisa.engine.vector),
        lambda: tt(*[sb(8, 4, dtype=I32, value=2**25)] * 2, dtype=I32),
    ),
    Program(
        "int-cast",
        lambda: ts(sb(8, 4), nl.multiply, 0.5, I32),
        lambda: ts(sb(8, 4), nl.multiply, 2.0, I32),
    ),
    Program("int-cast", lambda: ts(sb(8, 4), nl.multiply, 256.0, U8), lambda: ts(sb(8, 4), nl.multiply, 255.0, U8)),
    Program(
        "memset-value",
        lambda: nisa.memset(dst=new(8, 4, dtype=I32), value=1.0),
        lambda: nisa.memset(dst=new(8, 4, dtype=I32), value=1),
    ),
    # TensorE
    Program("matmul-space", lambda: matmul(new(4, 6), sb(8, 4), sb(8, 6)), lambda: mm(4, 6)),
    Program("matmul-space", lambda: matmul(new(4, 6, buffer=nl.psum), ps(8, 4), sb(8, 6)), lambda: mm(4, 6)),
    Program(
        "matmul-dtype",
        lambda: matmul(new(4, 6, buffer=nl.psum), sb(8, 4), sb(8, 6, dtype=BF16)),
        lambda: matmul(new(4, 6, buffer=nl.psum), sb(8, 4, dtype="float16"), sb(8, 6, dtype=BF16)),
    ),
    Program(
        "matmul-dtype",
        lambda: matmul(new(4, 6, buffer=nl.psum), sb(8, 4, dtype=I32), sb(8, 6, dtype=I32)),
        lambda: matmul(new(4, 6, buffer=nl.psum), sb(8, 4, dtype=BF16), sb(8, 6, dtype=BF16)),
    ),
    Program(
        "matmul-dtype",
        lambda: matmul(new(4, 6, buffer=nl.psum), sb(8, 4, dtype="float8_e4m3"), sb(8, 6, dtype="float8_e4m3fn")),
        lambda: matmul(new(4, 6, buffer=nl.psum), sb(8, 4, dtype="float8_e5m2"), sb(8, 6, dtype="float8_e4m3fn")),
        generation="gen4",
    ),
    on_gen(
        "matmul-dst-dtype",
        "gen3",
        lambda: matmul(new(4, 6, dtype=BF16, buffer=nl.psum), sb(8, 4), sb(8, 6)),
        first="gen4",
    ),
    Program(
        "matmul-contraction",
        lambda: matmul(new(4, 6, buffer=nl.psum), sb(8, 4), sb(16, 6)),
        lambda: matmul(new(4, 6, buffer=nl.psum), sb(16, 4), sb(16, 6)),
    ),
    Program("matmul-stationary", lambda: matmul(new(8, 6, buffer=nl.psum), sb(8, 129), sb(8, 6)), lambda: mm(128, 6)),
    Program("matmul-moving", lambda: mm(4, 513), lambda: mm(4, 512)),
    on_gen("matmul-moving", "gen3", lambda: mm(4, 513), first="gen4"),
    Program("matmul-shape", lambda: matmul(new(6, 4, buffer=nl.psum), sb(8, 4), sb(8, 6)), lambda: mm(4, 6)),
    Program("matmul-accumulate", lambda: twice(ps(4, 4), True), lambda: twice(new(4, 4, buffer=nl.psum), True)),
    Program(
        "matmul-accumulate",
        lambda: matmul(ps(4, 6), sb(8, 4), sb(8, 6), accumulate=True),
        lambda: matmul(ps(4, 6), sb(8, 4), sb(8, 6), accumulate=False),
    ),
    on_gen("matmul-accumulate", "gen3", lambda: matmul(ps(4, 6), sb(8, 4), sb(8, 6), accumulate=True), first="gen4"),
    Program(
        "matmul-accumulate",
        lambda: matmul(new(4, 6, buffer=nl.psum), sb(8, 4), sb(8, 6), accumulate=True),
        lambda: matmul(new(4, 6, buffer=nl.psum), sb(8, 4), sb(8, 6)),
    ),
    Program(
        "matmul-accumulate",
        lambda: twice(new(4, 6, buffer=nl.psum), None, columns=4),
        lambda: twice(new(4, 6, buffer=nl.psum), None, columns=6),
    ),
    Program(
        "matmul-mode",
        lambda: matmul(new(4, 6, buffer=nl.psum), sb(8, 4), sb(8, 6), tile_position=(64, 0), tile_size=(64, 128)),
        lambda: mm(4, 6),
    ),
    Program(
        "generation",
        lambda: matmul(new(4, 6, buffer=nl.psum), sb(8, 4), sb(8, 6), perf_mode=nisa.matmul_perf_mode.double_row),
        lambda: mm(4, 6),
    ),
    Program(
        "transpose-size",
        lambda: nisa.nc_transpose(dst=new(33, 8), data=sb(8, 33), engine=nisa.engine.vector),
        lambda: nisa.nc_transpose(dst=new(32, 8), data=sb(8, 32), engine=nisa.engine.vector),
    ),
    Program(
        "transpose-space",
        lambda: nisa.nc_transpose(dst=new(4, 8), data=sb(8, 4), engine=nisa.engine.tensor),
        lambda: nisa.nc_transpose(dst=new(4, 8, buffer=nl.psum), data=sb(8, 4), engine=nisa.engine.tensor),
    ),
    Program(
        "transpose-dtype",
        lambda: nisa.nc_transpose(dst=new(4, 8, dtype=BF16, buffer=nl.psum), data=sb(8, 4, dtype=BF16)),
        lambda: nisa.nc_transpose(dst=new(4, 8, buffer=nl.psum), data=sb(8, 4, dtype=BF16)),
    ),
    Program(
        "transpose-dtype",
        lambda: nisa.nc_transpose(dst=new(4, 8, buffer=nl.psum), data=sb(8, 4, dtype=BF16)),
        lambda: nisa.nc_transpose(dst=new(4, 8, dtype=BF16, buffer=nl.psum), data=sb(8, 4, dtype=BF16)),
        generation="gen3",
    ),
    # ScalarE, VectorE, GpSimd
    Program("activation-function", lambda: act(sb(8, 4), nl.add), lambda: act(sb(8, 4), nl.tanh)),
    Program("activation-range", lambda: act(sb(8, 4, value=4), nl.sin), lambda: act(sb(8, 4, value=3), nl.sin)),
    Program("activation-range", lambda: act(sb(8, 4, value=0), nl.log), lambda: act(sb(8, 4, value=1e-9), nl.log)),
    Program(
        "activation-range",
        lambda: nisa.reciprocal(dst=new(8, 4), data=sb(8, 4, value=0)),
        lambda: nisa.reciprocal(dst=new(8, 4), data=sb(8, 4, value=-0.5)),
    ),
    on_gen("activation-bias", "gen2", lambda: act(sb(8, 4), bias=-1.0), first="gen3"),
    Program("activation-bias", lambda: act(sb(8, 4), bias=0.0), lambda: act(sb(8, 4), bias=sb(8, 1, dtype=BF16))),
    Program("scalar-operand", lambda: act(sb(8, 4), bias=sb(8, 4)), lambda: act(sb(8, 4), bias=sb(8, 1))),
    Program("activation-reduce", lambda: summed(sb(8, 4), nl.maximum), lambda: summed(sb(8, 4), nl.add)),
    Program("activation-reduce", lambda: summed(sb(8, 4), width=4), lambda: summed(sb(8, 4), width=1)),
    Program(
        "reduce-axis",
        lambda: nisa.tensor_reduce(dst=new(1, 4), op=nl.add, data=sb(8, 4), axis=0),
        lambda: nisa.tensor_reduce(dst=new(8, 1), op=nl.add, data=sb(8, 4), axis=1),
    ),
    Program(
        "reduce-axis",
        lambda: nisa.tensor_reduce(dst=new(8, 2), op=nl.add, data=sb(8, 4, 2), axis=1),
        lambda: nisa.tensor_reduce(dst=new(8, 1), op=nl.add, data=sb(8, 4, 2), axis=(1, 2)),
    ),
    Program(
        "pattern",
        lambda: nisa.iota(dst=new(8, 4), pattern=[[1, 5]]),
        lambda: nisa.iota(dst=new(8, 4), pattern=[[2, 2], [1, 2]]),
    ),
    Program(
        "predicate-dtype",
        lambda: nisa.tensor_copy_predicated(dst=sb(8, 4), src=sb(8, 4), predicate=sb(8, 4)),
        lambda: nisa.tensor_copy_predicated(dst=sb(8, 4), src=sb(8, 4), predicate=sb(8, 4, dtype=U32)),
    ),
    Program(
        "same-dtype",
        lambda: nisa.tensor_copy_predicated(dst=sb(8, 4), src=sb(8, 4, dtype=BF16), predicate=sb(8, 4, dtype=U8)),
        lambda: nisa.tensor_copy_predicated(dst=sb(8, 4), src=2.5, predicate=sb(8, 4, dtype=U8)),
    ),
    Program(
        "same-dtype",
        lambda: nisa.tensor_copy_predicated(dst=sb(8, 4), src=sb(8, 4, dtype=I32), predicate=sb(8, 4, dtype=U8)),
        lambda: nisa.tensor_copy_predicated(dst=sb(8, 4), src=sb(8, 4), predicate=sb(8, 4, dtype=U8)),
    ),
    # Kernels
    Program("generation", lambda: nisa.exponential, lambda: nisa.activation, generation="gen3"),
    Program("not-emulated", lambda: nisa.nc_stream_shuffle, lambda: nisa.nc_transpose),
    Program("not-emulated", lambda: nl.rearrange, lambda: nl.zeros),
    Program("lnc", lambda: nl.program_id(1), lambda: nl.program_id(0)),
]


def run(program: Callable[[], Any], generation: str) -> None:
    def kernel() -> tuple[NkiTensor, ...]:
        program()
        return ()

    simulate(kernel, generation=generation)


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.rule)
def test_an_illegal_program_is_refused_by_the_name_of_its_rule(program: Program) -> None:
    with pytest.raises(NkiError) as caught:
        run(program.illegal, program.generation)
    assert caught.value.rule == program.rule
    assert caught.value.generation == program.generation
    assert Path(caught.value.place.rpartition(":")[0]) == Path(__file__), (
        "the place is the program's, not the emulator's"
    )


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.rule)
def test_its_legal_twin_runs(program: Program) -> None:
    run(program.legal, program.legal_generation or program.generation)


OF_KERNELS = {"argument", "output", "output-unwritten"}


def test_every_rule_has_an_illegal_program() -> None:
    assert {program.rule for program in PROGRAMS} | OF_KERNELS == set(RULES)


def shared(*shape: int) -> NkiTensor:
    return nl.ndarray(shape, F32, buffer=nl.shared_hbm)


def copied(x: NkiTensor) -> NkiTensor:
    out = shared(*x.shape)
    nisa.dma_copy(dst=out, src=x)
    return out


def keyword_only(x: NkiTensor, *, scale: float = 1.0) -> NkiTensor:
    return x


@pytest.mark.parametrize(
    ("rule", "kernel", "arguments"),
    [
        ("argument", lambda x, sizes: x, [np.zeros(4, np.float32), [1, 2]]),
        ("argument", keyword_only, [np.zeros(4, np.float32)]),
        ("dtype", copied, [np.zeros(4, np.float64)]),
        ("output", lambda x: sb(8, 4), [np.zeros(4, np.float32)]),
        ("output", lambda x: x.reshape((2, 2)), [np.zeros(4, np.float32)]),
        ("output", lambda x: 3, [np.zeros(4, np.float32)]),
        ("output-unwritten", lambda x: shared(4), [np.zeros(4, np.float32)]),
    ],
)
def test_what_enters_and_leaves_a_kernel_is_checked(rule: str, kernel: Any, arguments: list[Any]) -> None:
    with pytest.raises(NkiError) as caught:
        simulate(kernel, *arguments)
    assert caught.value.rule == rule


def test_legal_kernels_take_constants_and_return_inputs_or_shared_tensors() -> None:
    x = np.arange(4, dtype=np.float32)
    np.testing.assert_array_equal(simulate(copied, x).output, x)
    first, second = simulate(lambda x, sizes, name: (x, copied(x)), x, (1, 2), "name").outputs
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize(("generation", "lnc"), [("gen2", 2), ("gen3", 3)])
def test_cores_that_a_generation_does_not_join_are_refused(generation: str, lnc: int) -> None:
    with pytest.raises(NkiError, match="lnc"):
        simulate(copied, np.zeros(4, np.float32), generation=generation, lnc=lnc)


def test_a_refusal_is_an_error_of_quires_tree_and_says_what_where_and_how_to_mend_it() -> None:
    with pytest.raises(QuireError) as caught:
        run(lambda: new(129, 4), "gen3")
    message = str(caught.value)
    assert "test_nki_refusals.py:" in message
    assert "partitions (gen3)" in message
    assert "129" in message
    assert "split it" in message
