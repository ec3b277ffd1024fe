"""The contract of paged attention, and the shape of the cache it works on.

R rows, W queries per row, N query heads, K key/value heads, H head_dim, M blocks per row, S = M x block_size.

A row is a run of W consecutive tokens of one request, the last `W - query_lens` of them padding. Every implementation:

1. writes the row's new keys and values into the cache at positions `seq_lens - query_lens ... seq_lens - 1`, through the
   block table; padded tokens are written into block 0, the null block, which nothing ever reads unmasked;
2. *after the new keys and values of every row are written*, attends: the query at position p sees keys 0 ... p of its row,
   the last `sliding_window` of them where that is given.

Because of "every row", two rows may be neighbouring pieces of one request (same block table): this is how a long
prompt is spread over the tiles of a prefill rectangle. Rows must never write the same position of the same block.
A row with `query_lens == 0` is padding: its table points at block 0 and its output is finite and without meaning.
"""

from __future__ import annotations

from typing import Protocol

import jax


class PagedAttention(Protocol):
    """See the module's docstring; `kv_cache` is donated by the caller's program and must be updated in place."""

    def __call__(
        self,
        q: jax.Array,
        k_new: jax.Array,
        v_new: jax.Array,
        kv_cache: jax.Array,
        block_tables: jax.Array,
        seq_lens: jax.Array,
        query_lens: jax.Array,
        *,
        scale: float,
        sliding_window: int | jax.Array | None = None,
        soft_cap: float | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Writes and attends.

        Args:
            q: [R, W, N, H], rotated, not scaled.
            k_new, v_new: [R, W, K, H], in q's dtype.
            kv_cache: [num_blocks, block_size, 2 * K, H]; heads interleaved as k0, v0, k1, v1, ... so that a slice of the
                axis holds whole heads. Its dtype is q's, or uint16 holding the bits of a bfloat16 (XLA:CPU copies a
                bfloat16 cache when it is written, and updates a uint16 one in place).
            block_tables: [R, M] int32, padded with a null block.
            seq_lens: [R] int32, tokens of the row's request up to and including this row's last real token.
            query_lens: [R] int32, real tokens of this row, at most W.
            scale: multiplies the scores.
            sliding_window: how many keys a query sees, itself included; a scalar array where it differs between scanned layers.
            soft_cap: scores become soft_cap * tanh(scores / soft_cap).

        Returns: out [R, W, N, H] in q's dtype, and the updated cache.
        """
        ...


def cache_shape(num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int) -> tuple[int, int, int, int]:
    """Shape of one layer's cache; see `PagedAttention` for the meaning of each axis."""
    return (num_blocks, block_size, 2 * num_kv_heads, head_dim)
