"""What the target itself writes after the beginnings of texts: what a head meets when it drafts.

Letters: B rows, L tokens of a row, N query heads, K key/value heads, H head dimension, V vocabulary.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from quire.models.config import ModelConfig
from quire.models.decoder import LayerInfo, compute_logits, forward
from quire.models.params import Params
from quire.models.training.batches import Ids, Stream

TEMPERATURES = (0.0, 0.7, 1.0)
"""Each for an equal share of the rows."""
SHORTEST_PROMPT, LONGEST_PROMPT = 8, 64
_MASKED = -1e9

Layers = tuple[tuple[jax.Array, jax.Array], ...]  # keys and values of each layer, two [B, L, K, H]
Continue = Callable[[Params, jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


def make_continue_rows(config: ModelConfig) -> Continue:
    """Compiles `(params, rows int32 [B, L], num_given int32 [B], temperatures float32 [B], key) -> int32 [B, L]`.

    The first `num_given` tokens of a row stay, the others are sampled, greedily where the temperature is 0. The layers of
    `params` are a tuple.
    """

    def continue_rows(
        params: Params, rows: jax.Array, num_given: jax.Array, temperatures: jax.Array, key: jax.Array
    ) -> jax.Array:
        num_rows, length = rows.shape
        shape = (num_rows, length, config.num_kv_heads, config.head_dim)
        empty = tuple((jnp.zeros(shape), jnp.zeros(shape)) for _ in range(config.num_layers))

        def step(carry: tuple[jax.Array, Layers], position: jax.Array) -> tuple[tuple[jax.Array, Layers], jax.Array]:
            ids, cache = carry
            attend = _attend_at(position, config.attention_scale)
            hidden, cache, _ = forward(params, config, ids, jnp.full_like(ids, position), cache, attend)
            logits = compute_logits(params, config, hidden)  # [B, V]
            noise = jax.random.gumbel(jax.random.fold_in(key, position), logits.shape)
            sampled = jnp.argmax(logits + temperatures[:, None] * noise, axis=-1).astype(jnp.int32)
            following = jax.lax.dynamic_index_in_dim(rows, position + 1, axis=1, keepdims=False)
            ids = jnp.where(position + 1 < num_given, following, sampled)
            return (ids, cache), ids

        _, ids = jax.lax.scan(step, (rows[:, 0], empty), jnp.arange(length - 1, dtype=jnp.int32))
        return jnp.concatenate([rows[:, :1], ids.T], axis=1)

    return jax.jit(continue_rows)


def continuations(
    continue_rows: Continue, params: Params, prompts: Ids, length: int, seed: int, rows_per_call: int = 64
) -> Ids:
    """Rows [B, length] that begin as `prompts` [B, P] do, for a part of random length, and go on as the target does."""
    rng = np.random.default_rng(seed)
    num_rows, longest = prompts.shape
    given = rng.integers(min(SHORTEST_PROMPT, longest), longest, num_rows, dtype=np.int32, endpoint=True)
    temperatures = np.resize(np.asarray(TEMPERATURES, np.float32), num_rows)
    rows = np.zeros((num_rows, length), np.int32)
    rows[:, :longest] = prompts
    for start in range(0, num_rows, rows_per_call):
        part = slice(start, start + rows_per_call)
        key = jax.random.fold_in(jax.random.key(seed), start)
        # The last rows are filled up with copies of the first, so that one program serves every call.
        filled = [np.resize(x[part], (rows_per_call, *x.shape[1:])) for x in (rows, given, temperatures)]
        ids, counts, heats = map(jnp.asarray, filled)
        rows[part] = np.asarray(continue_rows(params, ids, counts, heats, key))[: len(rows[part])]
    return rows


def as_stream(rows: Ids) -> Stream:
    """The rows [B, L] end to end; a training row begins where one of them does."""
    return Stream(rows.reshape(-1), np.arange(len(rows), dtype=np.int64) * rows.shape[1])


def frequent_tokens(ids: Ids, count: int, vocab_size: int) -> tuple[np.ndarray, float]:
    """The `count` most frequent of `ids`, int64 in ascending order, the lower id first among equals; and their share of `ids`."""
    counts = np.bincount(ids.reshape(-1), minlength=vocab_size)
    chosen = np.sort(np.argsort(-counts, kind="stable")[:count])
    return chosen, float(counts[chosen].sum() / counts.sum())


def _attend_at(position: jax.Array, scale: float) -> Callable[..., tuple[jax.Array, Layers]]:
    """Attention of one new token per row, at `position`, to the row's earlier ones and itself."""

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, cache: Layers, layer: LayerInfo) -> tuple[jax.Array, Layers]:
        assert isinstance(layer.layer_idx, int)
        keys, values = (
            jax.lax.dynamic_update_slice_in_dim(whole, new[:, None], position, axis=1)
            for whole, new in zip(cache[layer.layer_idx], (k, v), strict=True)
        )
        num_rows, num_heads, head_dim = q.shape
        q = q.reshape(num_rows, keys.shape[2], num_heads // keys.shape[2], head_dim)  # [B, K, G, H]
        scores = jnp.einsum("bkgh,btkh->bkgt", q, keys) * scale
        visible = jnp.arange(keys.shape[1], dtype=jnp.int32) <= position
        weights = jax.nn.softmax(jnp.where(visible[None, None, None], scores, _MASKED), axis=-1)
        out = jnp.einsum("bkgt,btkh->bkgh", weights, values).reshape(num_rows, num_heads, head_dim)
        return out, (*cache[: layer.layer_idx], (keys, values), *cache[layer.layer_idx + 1 :])

    return attend
