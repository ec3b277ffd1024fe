"""Paged attention by gathering whole blocks: plain jnp, runs on every device, defines what the others must give.

R rows, W queries per row, N query heads, K key/value heads, G = N / K, H head_dim, M blocks per row, S = M x block_size.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

# Added to the scores a query may not see. Finite, since on some devices transposes go through matrix products and 0 * inf is NaN.
MASKED = -1.0e30


def write_kv(
    kv_cache: jax.Array, k_new: jax.Array, v_new: jax.Array, blocks: jax.Array, offsets: jax.Array
) -> jax.Array:
    """The reference of `contract.WriteKV`: one scatter of whole token rows."""
    num_tokens, num_kv_heads, head_dim = k_new.shape
    kv_new = jnp.stack([k_new, v_new], axis=2).reshape(num_tokens, 2 * num_kv_heads, head_dim)  # [T, 2K, H]
    kv_new = _to_bits(kv_new, kv_cache.dtype)
    if num_tokens == 1:
        # XLA turns a scatter of one row into a slice update, fuses that into the gather that follows, which then reads the
        # cache as it was, and keeps a copy of it for that. A second row, in the null block, keeps it a scatter.
        kv_new = jnp.concatenate([kv_new, jnp.zeros_like(kv_new)])
        blocks, offsets = (jnp.concatenate([idx, jnp.zeros_like(idx)]) for idx in (blocks, offsets))
    return kv_cache.at[blocks, offsets].set(kv_new, mode="promise_in_bounds")


def paged_attention(
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
    """The reference of `contract.PagedAttention`: gather each row's blocks, mask, softmax in float32."""
    positions = (seq_lens - query_lens)[:, None] + jnp.arange(q.shape[1], dtype=jnp.int32)[None, :]  # [R, W]
    keys, values = _gather(kv_cache, block_tables, q.dtype)  # [R, S, K, H] each
    is_own = _visible_to_any(seq_lens, query_lens, keys.shape[1], sliding_window)  # [R, S]
    visible = _visible(positions, keys.shape[1], sliding_window) & is_own[:, None, :]  # [R, W, S]
    # A weight of 0 does not silence a value that is no number: what another request left there must not be multiplied at all.
    values = jnp.where(is_own[:, :, None, None], values, jnp.zeros_like(values))
    return _attend(q, keys, values, visible, scale, soft_cap)


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
    """[R, W, S]: whether causality and the window let the query at each position see each key."""
    distance = positions[:, :, None] - jnp.arange(num_keys, dtype=jnp.int32)[None, None, :]
    visible = distance >= 0
    if sliding_window is not None:
        visible &= distance < sliding_window
    return visible


def _visible_to_any(
    seq_lens: jax.Array, query_lens: jax.Array, num_keys: int, sliding_window: int | jax.Array | None
) -> jax.Array:
    """[R, S]: whether some query of the row sees the key."""
    key_idx = jnp.arange(num_keys, dtype=jnp.int32)[None, :]
    is_own = key_idx < seq_lens[:, None]
    if sliding_window is not None:
        is_own &= key_idx > (seq_lens - query_lens)[:, None] - sliding_window
    return is_own


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
    # A row of padding sees no key at all; the maximum is then MASKED and the weights are uniform, but finite.
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    total = jnp.sum(weights, axis=-1)  # [R, K, G, W]
    out = jnp.einsum("rkgws,rskh->rwkgh", weights.astype(q.dtype), values, preferred_element_type=jnp.float32)
    out = out / jnp.moveaxis(total, 3, 1)[..., None]
    return out.reshape(rows, width, num_heads, head_dim).astype(q.dtype)


def _to_bits(values: jax.Array, dtype: jnp.dtype) -> jax.Array:
    if dtype == jnp.uint16:
        return jax.lax.bitcast_convert_type(values.astype(jnp.bfloat16), jnp.uint16)
    return values.astype(dtype)
