"""Paged attention by gathering whole blocks: plain jnp, runs on every device, defines what the others must give.

R rows, W queries per row, N query heads, K key/value heads, G = N / K, H head_dim, M blocks per row, S = M x block_size.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

# Added to the scores a query may not see. Finite, since on some devices transposes go through matrix products and 0 * inf is NaN.
MASKED = -1.0e30


def paged_attention(
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
    """The reference of `contract.PagedAttention`: scatter the new tokens, gather each row's blocks, mask, softmax in float32."""
    width = q.shape[1]
    offsets = jnp.arange(width, dtype=jnp.int32)[None, :]  # [1, W]
    positions = (seq_lens - query_lens)[:, None] + offsets  # [R, W]
    is_real = offsets < query_lens[:, None]  # [R, W]
    kv_cache = write_kv(kv_cache, k_new, v_new, block_tables, positions, is_real)
    keys, values = _gather(kv_cache, block_tables, q.dtype)  # [R, S, K, H] each
    visible = _visible(positions, keys.shape[1], sliding_window)  # [R, W, S]
    return _attend(q, keys, values, visible, scale, soft_cap), kv_cache


def write_kv(
    kv_cache: jax.Array,
    k_new: jax.Array,
    v_new: jax.Array,
    block_tables: jax.Array,
    positions: jax.Array,
    is_real: jax.Array,
) -> jax.Array:
    """Scatters new keys and values [R, W, K, H] to `positions` [R, W] of their rows; tokens that are not real go to block 0."""
    block_size = kv_cache.shape[1]
    rows, width, num_kv_heads, head_dim = k_new.shape
    block_idx = jnp.clip(positions // block_size, 0, block_tables.shape[1] - 1)
    blocks = jnp.where(is_real, jnp.take_along_axis(block_tables, block_idx, axis=1), 0)  # [R, W]
    slots = jnp.where(is_real, positions % block_size, 0)
    kv_new = jnp.stack([k_new, v_new], axis=3).reshape(rows * width, 2 * num_kv_heads, head_dim)
    kv_new = _to_bits(kv_new, kv_cache.dtype)
    return kv_cache.at[blocks.reshape(-1), slots.reshape(-1)].set(kv_new, mode="promise_in_bounds")


def _gather(kv_cache: jax.Array, block_tables: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """Keys and values [R, S, K, H] of every block in the tables."""
    rows, num_blocks_per_row = block_tables.shape
    _, block_size, num_heads_twice, head_dim = kv_cache.shape
    blocks = kv_cache.at[block_tables].get(mode="promise_in_bounds")  # [R, M, block_size, 2K, H]
    kv = blocks.reshape(rows, num_blocks_per_row * block_size, num_heads_twice // 2, 2, head_dim)
    if kv.dtype == jnp.uint16:
        kv = jax.lax.bitcast_convert_type(kv, jnp.bfloat16)
    kv = kv.astype(dtype)
    return kv[:, :, :, 0], kv[:, :, :, 1]


def _visible(positions: jax.Array, num_keys: int, sliding_window: int | jax.Array | None) -> jax.Array:
    """[R, W, S]: whether the query at each position sees each key. Keys after the row's end lie after every query."""
    distance = positions[:, :, None] - jnp.arange(num_keys, dtype=jnp.int32)[None, None, :]
    visible = distance >= 0
    if sliding_window is not None:
        visible &= distance < sliding_window
    return visible


def _attend(
    q: jax.Array, keys: jax.Array, values: jax.Array, visible: jax.Array, scale: float, soft_cap: float | None
) -> jax.Array:
    rows, width, num_heads, head_dim = q.shape
    num_kv_heads = keys.shape[2]
    grouped = q.reshape(rows, width, num_kv_heads, num_heads // num_kv_heads, head_dim)
    scores = jnp.einsum("rwkgh,rskh->rkgws", grouped, keys, preferred_element_type=jnp.float32) * scale
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    scores = jnp.where(visible[:, None, None, :, :], scores, MASKED)
    # A padded query sees no key when its position is negative; the maximum is then MASKED and the weights are uniform, but finite.
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    total = jnp.sum(weights, axis=-1)  # [R, K, G, W]
    out = jnp.einsum("rkgws,rskh->rwkgh", weights.astype(q.dtype), values, preferred_element_type=jnp.float32)
    out = out / jnp.moveaxis(total, 3, 1)[..., None]
    return out.reshape(rows, width, num_heads, head_dim).astype(q.dtype)


def _to_bits(values: jax.Array, dtype: jnp.dtype) -> jax.Array:
    if dtype == jnp.uint16:
        return jax.lax.bitcast_convert_type(values.astype(jnp.bfloat16), jnp.uint16)
    return values.astype(dtype)
