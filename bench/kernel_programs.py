"""Programs around one attention kernel each, quire's and jax's, compiled for a TPU that is not here.

`python -m quire.bench.kernel_programs` reads one job per line of its input, as `job` writes them, and prints one line for each. A process
of its own, because what the compiler is to write down about its work is said once, in libtpu's environment.

R rows, W queries of a row, N query heads, K key/value heads, H head_dim, B block_size, M blocks of a row.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from quire.backends.environment import dump_tpu_code
from quire.backends.tpu import TpuBackend
from quire.kernels.paged_attention import tpu
from quire.kernels.paged_attention.contract import RowsOfTokens, StepPlaces

KEYS_PER_TILE = 512
"""What all kernels are given to work on at a time, so that their loops can be compared."""
HLO_DTYPES = {"bfloat16": "bf16", "float32": "f32"}


@dataclass(frozen=True)
class KernelShape:
    """One call of attention: every row has `context` keys, its own included."""

    name: str
    rows: int = 64
    width: int = 1
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    block_size: int = 64
    context: int = 2048
    dtype: str = "bfloat16"
    sliding_window: int | None = None
    soft_cap: float | None = None
    num_layers: int = 1
    """Of the cache, which hold their blocks one after the other."""

    @property
    def blocks_per_row(self) -> int:
        return -(-self.context // self.block_size)

    @property
    def num_blocks(self) -> int:
        return 1 + self.rows * self.blocks_per_row

    @property
    def kv_bytes(self) -> int:
        """Keys and values that the call has to read, without any padding of them."""
        keys = self.context if self.sliding_window is None else min(self.sliding_window + self.width - 1, self.context)
        return 2 * self.rows * keys * self.num_kv_heads * self.head_dim * jnp.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Program:
    """A function of arrays of the given shapes; `donated` are the arguments whose memory its results take."""

    function: Callable[..., Any]
    arguments: tuple[jax.ShapeDtypeStruct, ...]
    donated: tuple[int, ...] = ()
    cache: jax.ShapeDtypeStruct | None = None


def _array(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


def _rows(shape: KernelShape) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Block tables, sequence lengths and query lengths."""
    return _array(shape.rows, shape.blocks_per_row), _array(shape.rows), _array(shape.rows)


def _queries(shape: KernelShape) -> jax.ShapeDtypeStruct:
    return _array(shape.rows, shape.width, shape.num_heads, shape.head_dim, dtype=shape.dtype)


def _cache(shape: KernelShape) -> jax.ShapeDtypeStruct:
    num_blocks = shape.num_layers * shape.num_blocks
    dimensions = tpu.HeadMajor().shape(num_blocks, shape.block_size, shape.num_kv_heads, shape.head_dim)
    return _array(*dimensions, dtype=shape.dtype)


def _attention(shape: KernelShape, device_kind: str) -> Callable[..., Any]:
    return partial(
        tpu.paged_attention,
        scale=shape.head_dim**-0.5,
        sliding_window=shape.sliding_window,
        soft_cap=shape.soft_cap,
        tuning=tpu.tuning_of(device_kind),
    )


def attention_program(shape: KernelShape, device_kind: str) -> Program:
    """`paged_attention` alone."""
    cache = _cache(shape)
    return Program(_attention(shape, device_kind), (_queries(shape), cache, *_rows(shape)), cache=cache)


def write_program(shape: KernelShape, device_kind: str) -> Program:
    """`write_kv` alone."""

    def write(cache: Any, k: Any, v: Any, tables: Any, seq_lens: Any, query_lens: Any) -> Any:
        rows = RowsOfTokens(tables, seq_lens, query_lens, width=shape.width)
        return tpu.write_kv(cache, k, v, StepPlaces(None, None, [rows]))

    cache = _cache(shape)
    new = _array(shape.rows * shape.width, shape.num_kv_heads, shape.head_dim, dtype=shape.dtype)
    return Program(write, (cache, new, new, *_rows(shape)), (0,), cache)


def layers_program(shape: KernelShape, device_kind: str) -> Program:
    """Layers scanned as the decoder scans them, each writing into and attending to its blocks of one cache."""
    attention = _attention(shape, device_kind)

    def layers(cache: Any, q: Any, tables: Any, seq_lens: Any, query_lens: Any) -> Any:
        def layer(carry: tuple[Any, Any], index: Any) -> tuple[tuple[Any, Any], None]:
            q, cache = carry
            rows = RowsOfTokens(tables, seq_lens, query_lens, width=shape.width)
            places = StepPlaces(jnp.zeros(1, jnp.int32), None, [rows]).shifted(index * shape.num_blocks)
            new = q[:, :, : shape.num_kv_heads].reshape(-1, shape.num_kv_heads, shape.head_dim)
            cache = tpu.write_kv(cache, new, new, places)
            tables_of_layer = places.rectangles[0].block_tables
            return (q + attention(q, cache, tables_of_layer, seq_lens, query_lens), cache), None

        return jax.lax.scan(layer, (q, cache), jnp.arange(shape.num_layers, dtype=jnp.int32))[0]

    cache = _cache(shape)
    return Program(layers, (cache, _queries(shape), *_rows(shape)), (0,), cache)


def jax_ragged_program(shape: KernelShape, device_kind: str) -> Program:
    """jax's ragged_paged_attention."""
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

    function = partial(
        ragged_paged_attention,
        sm_scale=shape.head_dim**-0.5,
        sliding_window=shape.sliding_window,
        soft_cap=shape.soft_cap,
        num_kv_pages_per_block=KEYS_PER_TILE // shape.block_size,
        num_queries_per_block=ragged_queries(shape),
        vmem_limit_bytes=64 * 2**20,
    )
    pages = _array(shape.num_blocks, shape.block_size, 2 * shape.num_kv_heads, shape.head_dim, dtype=shape.dtype)
    queries = _array(shape.rows * shape.width, shape.num_heads, shape.head_dim, dtype=shape.dtype)
    tables, lens, _ = _rows(shape)
    return Program(function, (queries, pages, lens, tables, _array(shape.rows + 1), _array(1)))


def ragged_queries(shape: KernelShape) -> int:
    """Queries in a block of jax's ragged kernel: a row's, where there are many."""
    return max(8, min(shape.width, 128))


def jax_paged_program(shape: KernelShape, device_kind: str) -> Program:
    """jax's paged_attention, which has one query per row and works on one head at a time."""
    from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention

    if shape.width != 1:
        raise NotImplementedError("one query per row only")
    function = partial(paged_attention, pages_per_compute_block=KEYS_PER_TILE // shape.block_size)
    pages = _array(shape.num_kv_heads, shape.num_blocks, shape.block_size, shape.head_dim, dtype=shape.dtype)
    queries = _array(shape.rows, shape.num_heads, shape.head_dim, dtype=shape.dtype)
    tables, lens, _ = _rows(shape)
    return Program(function, (queries, pages, pages, lens, tables))


PROGRAMS: dict[str, Callable[[KernelShape, str], Program]] = {
    "paged_attention": attention_program,
    "write_kv": write_program,
    "layers": layers_program,
    "jax_ragged_paged_attention": jax_ragged_program,
    "jax_paged_attention": jax_paged_program,
}


def compile_program(target: str, name: str, shape: KernelShape) -> dict[str, Any]:
    """Compiles a program for one chip of the target; what the compiler says of it, or its error, as plain data."""
    backend = TpuBackend(f"{target}:1x1")
    mesh = backend.make_mesh(1)
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    begin = time.perf_counter()
    try:
        program = PROGRAMS[name](shape, backend.capabilities.device_kind)
        arguments = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding) for a in program.arguments]
        # jax's own kernels look for the chip there; quire's must do without, as they do in an engine's step.
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh) if name.startswith("jax_") else nullcontext():
            compiled: Any = backend.compile(backend.lower(program.function, arguments, program.donated))
    except Exception as error:  # a compiler's and other people's kernels': whatever they raise is the answer
        return {"error": f"{type(error).__name__}: {error}"[:2000]}
    memory, text = compiled.memory_analysis(), compiled.as_text()
    return {
        "seconds": round(time.perf_counter() - begin, 2),
        "temp_bytes": memory.temp_size_in_bytes,
        "alias_bytes": memory.alias_size_in_bytes,
        "cache_bytes": 0 if program.cache is None else math.prod(program.cache.shape) * program.cache.dtype.itemsize,
        "cache_copies": [] if program.cache is None else _copies(text, program.cache),
    }


def _copies(text: str, array: jax.ShapeDtypeStruct) -> list[str]:
    """Instructions of a compiled program that copy a whole array of this kind, or a layout of it."""
    shape = f"{HLO_DTYPES[array.dtype.name]}[{','.join(map(str, array.shape))}]"
    return re.findall(rf"^.*= \(?{re.escape(shape)}\S* (?:copy|copy-start|transpose)\(.*$", text, re.MULTILINE)


def job(target: str, program: str, shape: KernelShape) -> str:
    """The line that asks for a program."""
    return json.dumps({"target": target, "program": program, "shape": asdict(shape)})


def main() -> None:
    """Answers jobs, line by line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--dump-to", type=Path, help="a folder for the final code of what is compiled")
    parser.add_argument("--profile", action="store_true", help="the compiler's estimates, too")
    options = parser.parse_args()
    if options.dump_to is not None:
        dump_tpu_code(options.dump_to, with_profile=options.profile)
    for line in sys.stdin:
        wanted = json.loads(line)
        answer = compile_program(wanted["target"], wanted["program"], KernelShape(**wanted["shape"]))
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
