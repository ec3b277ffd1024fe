"""How the TPU kernels hold keys and values, and the numbers that follow from it.

K key/value heads, H head_dim, Hp lanes of a key, B = block_size.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

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


def parts_of_rows(num_rows: int, blocks_per_row: int) -> list[slice]:
    """The rows in parts whose block tables fit their share of scalar memory; one part nearly always.

    Scalar memory is 1 MiB and a block table must be there before its first block can be fetched. 64 rows of 128k tokens in blocks of
    16 are 2 MiB of tables, hence 4 calls of a kernel. Streaming tables through a pipeline of their own would save the start of 3
    calls, microseconds beside the milliseconds that so long rows take, and have every call wait for two copies instead of one.
    """
    rows = max(MAX_TABLE_BYTES // (4 * blocks_per_row), 1)
    return [slice(first, min(first + rows, num_rows)) for first in range(0, num_rows, rows)]


class HeadMajor:
    """[num_blocks, K, B, 2 * Hp]: one row per head and token, its key in the first half of the lanes and its value in the second.

        head_dim <= 64:   |key 0 ... 63|value 64 ... 127|                    one register wide
        head_dim 65..128: |key 0 ......................... 127|value 128 ......................... 255|

    A block of all heads is one contiguous piece of memory, so one copy fetches it. The keys of one head are a matrix
    [tokens, lanes] as the matrix unit takes it; with heads next to each other ([tokens, heads, lanes]) each would have to be picked out
    of every register first. Small heads share a row instead of being padded to one each: a query with zeros in the lanes of the
    value finds its scores, and weights times rows leave the output in the lanes of the value, so neither is ever moved apart.
    Lanes beyond head_dim hold zeros.
    """

    heads_axis = 1

    def shape(self, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int) -> tuple[int, ...]:
        """See `contract.CacheFormat`."""
        return (num_blocks, num_kv_heads, block_size, 2 * key_lanes(head_dim))

    def allocate(self, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        """Zeros."""
        return jnp.zeros(shape, dtype)
