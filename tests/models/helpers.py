"""A dense causal `attend` and what runs on it. Needs no torch; what does is in `tiny`."""

from collections.abc import Callable
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from quire.models.config import ModelConfig
from quire.models.decoder import Attend, KVCache, LayerInfo, compute_logits, forward
from quire.models.params import Params

quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
"""Compiling is what these tests spend their time on, and tiny models need no optimized code."""


def dense_attend(config: ModelConfig) -> Attend:
    """Causal attention of one sequence to itself, without a cache: what every paged implementation must equal."""

    def attend(q: Array, k: Array, v: Array, kv_cache: KVCache, info: LayerInfo) -> tuple[Array, KVCache]:
        num_tokens, num_heads, head_dim = q.shape
        grouped = q.reshape(num_tokens, config.num_kv_heads, num_heads // config.num_kv_heads, head_dim)
        scores = jnp.einsum("tkgh,skh->kgts", grouped, k, preferred_element_type=jnp.float32)
        scores = scores * jnp.float32(config.attention_scale)
        if config.attention_soft_cap is not None:
            scores = config.attention_soft_cap * jnp.tanh(scores / config.attention_soft_cap)
        idx = jnp.arange(num_tokens, dtype=jnp.int32)
        distance = idx[:, None] - idx[None, :]
        seen = distance >= 0
        if info.sliding_window is not None:
            seen = seen & (distance < info.sliding_window)
        probs = jax.nn.softmax(jnp.where(seen[None, None], scores, jnp.float32(-1e30)), axis=-1)
        out = jnp.einsum("kgts,skh->tkgh", probs.astype(v.dtype), v)
        return out.reshape(num_tokens, num_heads, head_dim), kv_cache

    return attend


def all_logprobs(params: Params, config: ModelConfig, token_ids: np.ndarray) -> np.ndarray:
    """Log-probabilities float32 [T, V] after every token of one sequence."""
    return np.asarray(_compiled(config)(params, jnp.asarray(token_ids, jnp.int32)))


@cache
def _compiled(config: ModelConfig) -> Callable[[Params, Array], Array]:
    def run(params: Params, token_ids: Array) -> Array:
        positions = jnp.arange(token_ids.shape[0], dtype=jnp.int32)
        hidden, _, _ = forward(params, config, token_ids, positions, None, dense_attend(config))
        return jax.nn.log_softmax(compute_logits(params, config, hidden), axis=-1)

    return quick_jit(run)


def random_ids(vocab_size: int, num_tokens: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocab_size, num_tokens, dtype=np.int32)
