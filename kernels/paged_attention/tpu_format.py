"""How the TPU kernels hold keys and values, and the numbers that follow from it.

K key/value heads, H head_dim, Hp lanes of a key, B = block_size, P = K * `planes_per_head` planes of 128 lanes.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

LANES = 128
"""Numbers in a row of a vector register."""
SUBLANES = 8
"""Rows of a vector register."""
GROUP = SUBLANES
"""Tokens whose rows share a tile of memory, the fewest that one copy can move; 8 for bfloat16 too, where XLA tiles by (8, 128)(2, 1)."""
MAX_TABLE_BYTES = 512 * 1024
"""Of scalar memory, for the block tables of one call."""


def key_lanes(head_dim: int) -> int:
    """Hp: lanes given to a key, and as many to its value. Half a register's row where both fit into one."""
    return LANES // 2 if head_dim <= LANES // 2 else -(-head_dim // LANES) * LANES


def planes_per_head(head_dim: int) -> int:
    """How many rows of a register a key and its value take together."""
    return 2 * key_lanes(head_dim) // LANES


def rows_of_tokens(k: jax.Array, v: jax.Array) -> jax.Array:
    """[..., K, H] twice to [..., P, 128]: each head's key, then its value, with zeros beyond head_dim."""
    *leading, num_kv_heads, head_dim = k.shape
    padding = [(0, 0)] * (k.ndim - 1) + [(0, key_lanes(head_dim) - head_dim)]
    rows = jnp.concatenate([jnp.pad(k, padding), jnp.pad(v, padding)], axis=-1)
    return rows.reshape(*leading, num_kv_heads * planes_per_head(head_dim), LANES)


def parts_of_rows(num_rows: int, blocks_per_row: int) -> list[slice]:
    """The rows in parts whose block tables fit their share of scalar memory; one part nearly always.

    Scalar memory is 1 MiB and a block table must be there before its first block can be fetched. 64 rows of 128k tokens in blocks of
    16 are 2 MiB of tables, hence 4 calls of a kernel. Streaming tables through a pipeline of their own would save the start of 3
    calls, microseconds beside the milliseconds that so long rows take, and have every call wait for two copies instead of one.
    """
    rows = max(MAX_TABLE_BYTES // (4 * blocks_per_row), 1)
    return [slice(first, min(first + rows, num_rows)) for first in range(0, num_rows, rows)]


def quotient(dividend: Any, divisor: int) -> Any:
    """Within a kernel, of traced integers that are not negative. `//` would round down by their signs, whose code depends on the chip."""
    return lax.div(dividend, lax.full_like(dividend, divisor))


def quotient_up(dividend: Any, divisor: int) -> Any:
    """The same, rounded up; 0 or less for negative ones."""
    return quotient(dividend + (divisor - 1), divisor)


class HeadMajor:
    """[num_blocks, P, B, 128]: one row per plane and token; a head's key, then its value, in planes that follow each other.

        head_dim <= 64:   one plane     |key 0 ... 63|value 64 ... 127|
        head_dim 65..128: two planes    |key 0 ................... 127|  |value 0 ................. 127|
        head_dim 129..256: four planes  |key 0 ... 127|  |key 128 ... 255|  |value 0 ... 127|  |value 128 ... 255|

    A block of all heads is one contiguous piece of memory, so one copy fetches it. A plane's rows of a tile are a matrix as the
    matrix unit takes it, register by register; with heads next to each other ([tokens, heads, lanes]) each would have to be picked out of
    every register, and with rows of 256 lanes the halves of every register, since two tiles of bfloat16 that share one would lie side by
    side. Small heads share a row instead of being padded to one each: a query with zeros in the lanes of the value finds its scores,
    and weights times rows leave the output in the lanes of the value, so neither is ever moved apart. Lanes beyond head_dim hold zeros.
    """

    heads_axis = 1

    def shape(self, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int) -> tuple[int, ...]:
        """See `CacheFormat`."""
        return (num_blocks, num_kv_heads * planes_per_head(head_dim), block_size, LANES)

    def allocate(self, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        """Zeros."""
        return jnp.zeros(shape, dtype)
