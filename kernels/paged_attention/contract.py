"""The contracts of paged attention: writing into a KV cache kept in blocks, and attending to it through block tables.

T tokens of a step, R rows, W queries per row, N query heads, K key/value heads, H head_dim, M blocks per row.

A step writes the keys and values of *all* its tokens first and attends afterwards, once per rectangle of rows. So two rows may
be neighbouring pieces of one request (same block table): this is how a long prompt is spread over the tiles of a prefill
rectangle. That writing and attending are two ops, each seeing the cache once, is also what lets XLA update it in place: written
once per rectangle, with the rectangles' reads in between, it was copied twice per layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class RowsOfTokens:
    """One rectangle of a step: R rows of W tokens each, which lie one after the other in [T]."""

    block_tables: Any  # [R, M] int32
    seq_lens: Any  # [R] int32, tokens of the row's request up to and including this row's last real one
    query_lens: Any  # [R] int32, real tokens of this row
    width: int = flax.struct.field(pytree_node=False)  # type: ignore[no-untyped-call]


@flax.struct.dataclass
class StepPlaces:
    """Where the tokens of a step belong in the cache, said twice: token by token and row by row. The same for every layer."""

    write_blocks: Any  # [T] int32; padding goes to the null block, any number of tokens to one place of it
    write_offsets: Any  # [T] int32, within the block; no two real tokens share a place
    rectangles: Sequence[RowsOfTokens]

    def shifted(self, first_block: int | jax.Array) -> StepPlaces:
        """The same places in the blocks from `first_block` on: those of one layer where all share an array."""
        rectangles = [rows.replace(block_tables=rows.block_tables + first_block) for rows in self.rectangles]  # type: ignore[attr-defined]
        return StepPlaces(self.write_blocks + first_block, self.write_offsets, rectangles)


class CacheFormat(Protocol):
    """How one array holds the keys and values of blocks. Who writes, attends and allocates must mean the same one."""

    @property
    def heads_axis(self) -> int:
        """The axis along which key/value heads lie, key and value of one together: where devices that share a model cut it."""
        ...

    def shape(self, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int) -> tuple[int, ...]:
        """Blocks come first, so that the blocks of several layers can lie one after the other."""
        ...

    def allocate(self, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        """An array of the given shape; what it holds is without meaning, since nothing is read that was not written before."""
        ...


class WriteKV(Protocol):
    """`kv_cache` is donated by the caller's program and must be updated in place."""

    def __call__(self, kv_cache: jax.Array, k_new: jax.Array, v_new: jax.Array, places: StepPlaces) -> jax.Array:
        """The cache with the keys and values of a step's tokens in it.

        Args:
            kv_cache: in the implementation's `CacheFormat`; the plain one is `TokenMajor`. Its dtype is that of the keys, or
                uint16 holding the bits of a bfloat16 (XLA:CPU copies a bfloat16 cache when it is written, and updates a
                uint16 one in place).
            k_new, v_new: [T, K, H].
            places: where each of the T tokens goes.
        """
        ...


class PagedAttention(Protocol):
    """Causal attention of each row to everything its request has in the cache."""

    def __call__(
        self,
        q: jax.Array,
        kv_cache: jax.Array,
        block_tables: jax.Array,
        seq_lens: jax.Array,
        query_lens: jax.Array,
        *,
        scale: float,
        sliding_window: int | jax.Array | None = None,
        soft_cap: float | None = None,
    ) -> jax.Array:
        """Attends: the query at position p sees keys 0 ... p of its row, the last `sliding_window` of them where given.

        Args:
            q: [R, W, N, H], rotated, not scaled; a row is a run of consecutive tokens of one request, then padding.
            kv_cache: as `WriteKV` gives it.
            block_tables: [R, M] int32, padded with a null block, which is never read unmasked. What lies in places that a row
                does not see, NaN included, has no influence on it.
            seq_lens: [R] int32, tokens of the row's request up to and including this row's last real token.
            query_lens: [R] int32, real tokens of this row, at most W. A row with 0 is padding; what comes out for
                padding is finite and without meaning.
            scale: multiplies the scores.
            sliding_window: how many keys a query sees, itself included; a scalar array where it differs between scanned layers.
            soft_cap: scores become soft_cap * tanh(scores / soft_cap).

        Returns: [R, W, N, H] in q's dtype.
        """
        ...


class TokenMajor:
    """[num_blocks, block_size, 2 * K, H]: heads interleaved as k0, v0, k1, v1, ... so that a slice of the axis holds whole heads."""

    heads_axis = 2

    def shape(self, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int) -> tuple[int, ...]:
        """See `CacheFormat`."""
        return (num_blocks, block_size, 2 * num_kv_heads, head_dim)

    def allocate(self, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        """Zeros."""
        return jnp.zeros(shape, dtype)
