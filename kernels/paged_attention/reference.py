"""Paged attention by gathering whole blocks: plain jnp, runs on every device, defines what the others must give.

R rows, W queries per row, N query heads, K key/value heads, G = N / K, H head_dim, M blocks per row, S = M x block_size.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from quire.kernels.paged_attention.contract import StepPlaces

# Added to the scores a query may not see. Finite, since on some devices transposes go through matrix products and 0 * inf is NaN.
MASKED = -1.0e30


def write_kv(kv_cache: jax.Array, k_new: jax.Array, v_new: jax.Array, places: StepPlaces) -> jax.Array:
    """The reference of `contract.WriteKV`, on a `TokenMajor` cache: one scatter of whole token rows."""
    # Clipped, as on some devices an index out of range is not ignored but fails.
    blocks = jnp.clip(places.write_blocks, 0, kv_cache.shape[0] - 1)
    offsets = jnp.clip(places.write_offsets, 0, kv_cache.shape[1] - 1)
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
    num_keys = block_tables.shape[1] * kv_cache.shape[1]
    is_own = _visible_to_any(seq_lens, query_lens, num_keys, sliding_window)  # [R, S]
    visible = _visible(positions, num_keys, sliding_window) & is_own[:, None, :]  # [R, W, S]
    kv = _gather(kv_cache, block_tables, q.dtype)  # [R, S, 2K * H]
    # A weight of 0 does not silence a value that is no number: what another request left there must not be multiplied at all.
    kv = jnp.where(is_own[:, :, None], kv, jnp.zeros_like(kv))
    attend = _attend_one if q.shape[1] == 1 else _attend_many
    return attend(q, kv, visible, scale, soft_cap)


def _gather(kv_cache: jax.Array, block_tables: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """[R, S, 2K * H]: the keys and values of every block in the tables."""
    num_blocks, _, num_heads_twice, head_dim = kv_cache.shape
    # Whole blocks as rows of a matrix: XLA:CPU then copies them, where with more axes it computes an index per element.
    block_ids = jnp.clip(block_tables.reshape(-1), 0, num_blocks - 1)
    rows = kv_cache.reshape(num_blocks, -1).at[block_ids].get(mode="promise_in_bounds")
    kv = rows.reshape(block_tables.shape[0], -1, num_heads_twice * head_dim)
    if kv.dtype == jnp.uint16:
        kv = jax.lax.bitcast_convert_type(kv, jnp.bfloat16)
    return kv.astype(dtype)


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


def _attend_many(q: jax.Array, kv: jax.Array, visible: jax.Array, scale: float, soft_cap: float | None) -> jax.Array:
    """Attention of W queries per row: one product per key/value head."""
    rows, width, num_heads, head_dim = q.shape
    num_kv_heads = kv.shape[2] // (2 * head_dim)
    heads = kv.reshape(rows, -1, num_kv_heads, 2, head_dim)  # [R, S, K, 2, H]
    grouped = q.reshape(rows, width, num_kv_heads, num_heads // num_kv_heads, head_dim)
    scores = jnp.einsum("rwkgh,rskh->rkgws", grouped, heads[:, :, :, 0], preferred_element_type=jnp.float32)
    weights, total = _softmax(scores, visible[:, None, None, :, :], scale, soft_cap)  # [R, K, G, W, S], [R, K, G, W]
    values = heads[:, :, :, 1]
    out = jnp.einsum("rkgws,rskh->rwkgh", weights.astype(q.dtype), values, preferred_element_type=jnp.float32)
    out = out / jnp.moveaxis(total, 3, 1)[..., None]
    return out.reshape(rows, width, num_heads, head_dim).astype(q.dtype)


def _attend_one(q: jax.Array, kv: jax.Array, visible: jax.Array, scale: float, soft_cap: float | None) -> jax.Array:
    """Attention of one query per row, as two products with the gathered rows as they lie.

    Each query is widened to a whole row of the cache with zeros for the other heads, and of each result only the query's own
    head is kept. With one query the time goes into reading the rows; picking heads out of them first made XLA:CPU gather them
    element by element.
    """
    rows, _, num_heads, head_dim = q.shape
    num_kv_heads = kv.shape[2] // (2 * head_dim)
    group = num_heads // num_kv_heads
    own_head = jnp.repeat(jnp.eye(num_kv_heads, dtype=q.dtype), group, axis=0)  # [N, K]
    of_keys = own_head[:, :, None] * jnp.array([[[1, 0]]], q.dtype)  # [N, K, 2]
    wide = (q[:, 0, :, None, None, :] * of_keys[None, :, :, :, None]).reshape(rows, num_heads, -1)  # [R, N, 2K * H]
    scores = jnp.einsum("rnd,rsd->rns", wide, kv, preferred_element_type=jnp.float32)
    weights, total = _softmax(scores, visible, scale, soft_cap)  # [R, N, S], [R, N]
    out = jnp.einsum("rns,rsd->rnd", weights.astype(q.dtype), kv, preferred_element_type=jnp.float32)
    values = out.reshape(rows, num_heads, num_kv_heads, 2, head_dim)[:, :, :, 1]  # [R, N, K, H]
    out = jnp.sum(values * own_head.astype(jnp.float32)[None, :, :, None], axis=2) / total[..., None]
    return out[:, None].astype(q.dtype)


def _softmax(
    scores: jax.Array, visible: jax.Array, scale: float, soft_cap: float | None
) -> tuple[jax.Array, jax.Array]:
    """Weights over the last axis, not yet divided by their sum, and that sum; float32."""
    scores = scores * scale
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    scores = jnp.where(visible, scores, MASKED)
    # A row of padding sees no key at all; the maximum is then MASKED and the weights are uniform, but finite.
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    return weights, jnp.sum(weights, axis=-1)


def _to_bits(values: jax.Array, dtype: jnp.dtype) -> jax.Array:
    if dtype == jnp.uint16:
        return jax.lax.bitcast_convert_type(values.astype(jnp.bfloat16), jnp.uint16)
    return values.astype(dtype)
