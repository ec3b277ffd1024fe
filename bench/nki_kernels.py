"""`quire bench kernels --target gen2|gen3|gen4`: what the NKI kernels cost by the emulator's count, beside what memory allows.

Each kernel is run in the emulator by the rules of a generation of NeuronCore, for one core's share of a model and a few rows: rows cost the
same, so that numbers are per row, which in a decode step is per token.

    dma_bytes, dma_descriptors   copied between HBM and SBUF, and in how many contiguous pieces
    *_cycles                     of each engine, by the documented costs of instructions
    bound_us                     the row's keys and values over the core's memory bandwidth: nothing can be faster
    least_us, most_us            if everything overlaps that can, and if nothing does; the time is between them
    least_over_bound             how far the busiest engine is from the memory's pace

Latencies between instructions, queues and hazards are not in these numbers, and nothing has run on a device. Clocks of gen4 are not
public, so its times are left out. Prints one JSON line per shape, and a table to stderr.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from tqdm import tqdm

from quire.backends.select import only_cpu
from quire.kernels.nki import Simulation, load_emulated, simulate
from quire.kernels.nki.core import GENERATIONS
from quire.kernels.paged_attention import nki

TARGETS = tuple(GENERATIONS)
ENGINES = ("tensor", "vector", "scalar", "gpsimd")


@dataclass(frozen=True)
class NkiShape:
    """One core's share of a step. Every row has `num_keys` tokens in the cache, the last `width` of which are its queries."""

    name: str
    rows: int = 2
    width: int = 1
    num_keys: int = 2048
    num_heads: int = 16
    num_kv_heads: int = 4
    head_dim: int = 128
    block_size: int = 32

    @property
    def kv_bytes(self) -> int:
        """Of a row's keys and values."""
        return self.num_keys * 2 * self.num_kv_heads * self.head_dim * 2


DECODE = NkiShape("decode, 8B over 2 cores")
SHAPES = [
    DECODE,
    replace(DECODE, name="decode, 8B over 8 cores", num_heads=4, num_kv_heads=1),
    replace(DECODE, name="decode, blocks of 16", block_size=16),
    replace(DECODE, name="decode, head_dim 64", num_heads=16, num_kv_heads=4, head_dim=64),
    replace(DECODE, name="decode, 256 tokens", num_keys=256),
    replace(DECODE, name="verify 5", width=5),
    replace(DECODE, name="prefill tile of 128", rows=1, width=128),
]


def measure(shape: NkiShape, generation: str) -> dict[str, Any]:
    """Runs attention on a shape in the emulator, and counts."""
    simulations: list[Simulation] = []

    def launch(name: str, result: jax.ShapeDtypeStruct, arguments: tuple[Any, ...]) -> jax.Array:
        values = [np.asarray(value) if isinstance(value, jax.Array) else value for value in arguments]
        simulations.append(simulate(getattr(load_emulated(nki.KERNELS), name), *values, generation=generation))
        return jnp.asarray(simulations[-1].output)

    rng = np.random.default_rng(0)
    blocks_per_row = -(-shape.num_keys // shape.block_size)
    cache_shape = (1 + shape.rows * blocks_per_row, shape.block_size, 2 * shape.num_kv_heads, shape.head_dim)
    cache = jnp.asarray(rng.standard_normal(cache_shape, np.float32).astype(ml_dtypes.bfloat16))
    q_shape = (shape.rows, shape.width, shape.num_heads, shape.head_dim)
    q = jnp.asarray(rng.standard_normal(q_shape, np.float32).astype(ml_dtypes.bfloat16))
    tables = 1 + jnp.arange(shape.rows * blocks_per_row, dtype=jnp.int32).reshape(shape.rows, -1)
    lens = jnp.full((shape.rows,), shape.num_keys, jnp.int32)
    widths = jnp.full((shape.rows,), shape.width, jnp.int32)
    nki.paged_attention(q, cache, tables, lens, widths, scale=shape.head_dim**-0.5, launch=launch)
    return _per_row(shape, simulations)


def _per_row(shape: NkiShape, simulations: list[Simulation]) -> dict[str, Any]:
    costs = simulations[0].costs
    for other in simulations[1:]:
        costs.add(other.costs)
    generation = simulations[0].generation
    bound = shape.kv_bytes / generation.hbm_bytes_per_s
    row: dict[str, Any] = {
        "shape": asdict(shape),
        "generation": generation.name,
        "dma_bytes": costs.dma_bytes // shape.rows,
        "dma_descriptors": costs.dma_descriptors // shape.rows,
        **{f"{engine}_cycles": costs.cycles[engine] // shape.rows for engine in ENGINES},
        "bytes_over_kv": round(costs.dma_bytes / (shape.rows * shape.kv_bytes), 3),
        "bound_us": round(bound * 1e6, 2),
    }
    if generation.clocks is not None:
        least = costs.least_seconds(generation.clocks, generation.hbm_bytes_per_s) / shape.rows
        most = costs.most_seconds(generation.clocks, generation.hbm_bytes_per_s) / shape.rows
        row |= {
            "least_us": round(least * 1e6, 2),
            "most_us": round(most * 1e6, 2),
            "least_over_bound": round(least / bound, 2),
        }
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """The numbers for people, per row of the shape."""
    columns = (
        "dma_bytes",
        "bytes_over_kv",
        *(f"{engine}_cycles" for engine in ENGINES),
        "bound_us",
        "least_us",
        "most_us",
    )
    lines = [f"{'per row':26}" + "".join(f"{column:>17}" for column in (*columns, "least_over_bound"))]
    for row in rows:
        cells = "".join(
            f"{'-' if row.get(column) is None else row[column]:>17}" for column in (*columns, "least_over_bound")
        )
        lines.append(f"{row['shape']['name']:26}{cells}")
    return "\n".join(lines)


def run(generation: str, wanted: tuple[str, ...]) -> int:
    """Runs every shape whose name begins with one of `wanted`, prints the lines, then the table."""
    only_cpu()
    shapes = [shape for shape in SHAPES if shape.name.startswith(wanted)]
    rows = [measure(shape, generation) for shape in tqdm(shapes, disable=not sys.stderr.isatty(), leave=False)]
    for row in rows:
        print(json.dumps(row))
    print(table(rows), file=sys.stderr)
    return 0
