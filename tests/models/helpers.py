"""A dense causal `attend`, and logits by quire and by transformers for the same ids."""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import Array
from transformers import AutoModelForCausalLM

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

    @quick_jit
    def run(params: Params, token_ids: Array) -> Array:
        positions = jnp.arange(token_ids.shape[0], dtype=jnp.int32)
        hidden, _ = forward(params, config, token_ids, positions, None, dense_attend(config))
        return jax.nn.log_softmax(compute_logits(params, config, hidden), axis=-1)

    return np.asarray(run(params, jnp.asarray(token_ids, jnp.int32)))


def load_in_transformers(folder: Path) -> Any:
    """The checkpoint as a torch module in float32, with plain attention (other kinds leave out soft caps) and plain
    experts (others want strides that are multiples of 16 bytes)."""
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )


def transformers_logprobs(folder: Path, token_ids: np.ndarray) -> np.ndarray:
    """The same from transformers, in float32."""
    model = load_in_transformers(folder)
    with torch.no_grad():
        logits = model(torch.from_numpy(token_ids.astype(np.int64))[None]).logits[0]
    return np.asarray(torch.log_softmax(logits.float(), dim=-1).numpy())


def random_ids(vocab_size: int, num_tokens: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocab_size, num_tokens, dtype=np.int32)
