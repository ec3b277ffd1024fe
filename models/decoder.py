"""The decoder: one function for every Llama-like family, told apart by `ModelConfig` alone.

Legend: T tokens of a step laid end to end, R rows whose logits are wanted, D hidden size, N query heads, K key and
value heads, H head dimension, V vocabulary, L layers.

The model knows nothing of requests, rows or blocks. Everything but attention acts on single tokens; attention is the
caller's `attend`, which also owns the KV cache (any pytree, passed through unseen).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import quire.kernels.experts.reference as experts_reference
from quire.kernels.decoder_layer.contract import LayerSpec
from quire.kernels.experts.contract import RunExperts
from quire.kernels.linear.contract import Weight, matmul
from quire.models.config import ModelConfig
from quire.models.layers import gated_mlp, linear, linear_of_parts, rms_norm, soft_cap
from quire.models.moe import moe_mlp
from quire.models.parallel import ALONE, Parallel
from quire.models.params import Layer, Params
from quire.models.rope import apply_rope, rope_tables

NO_WINDOW = 2**23
"""The window of a layer without one, where layers with and without share a scanned program; an exact float32 too."""


@dataclass(frozen=True)
class LayerInfo:
    """Which layer `attend` is called for. Under a scan both fields may be traced scalars."""

    layer_idx: int | Array
    sliding_window: int | Array | None
    """None: no window. An int: the same for every layer, or this layer's when unrolled. An int32 scalar: this layer's
    under a scan over layers that differ, `NO_WINDOW` for those without."""


KVCache = Any
Attend = Callable[[Array, Array, Array, KVCache, LayerInfo], tuple[Array, KVCache]]
"""(q [T, N, H], k [T, K, H], v [T, K, H], kv_cache, layer info) -> (out [T, N, H], kv_cache).

q and k are rotated, q is not scaled: `attend` applies `config.attention_scale`, `config.attention_soft_cap` and the
layer's window. out has q's dtype."""


RunLayer = Callable[[Layer, Array, tuple[Array, Array], KVCache, LayerInfo], tuple[Array, KVCache]]
"""A whole layer in one op: (layer, x [T, D], cos and sin [T, R/2], kv_cache, layer info) -> (x [T, D], kv_cache)."""


class ForwardOutput(NamedTuple):
    """What `forward` gives."""

    hidden: Array
    """[T, D], after the final norm."""
    kv_cache: KVCache
    """As `attend` left it."""
    captured: Array | None
    """[T, n * D]: the hidden states that entered the n captured layers, side by side; None where n is 0."""


def forward(
    params: Params,
    config: ModelConfig,
    token_ids: Array,
    positions: Array,
    kv_cache: KVCache,
    attend: Attend,
    run_layer: RunLayer | None = None,
    parallel: Parallel = ALONE,
    run_experts: RunExperts = experts_reference.run_experts,
    captured_layers: tuple[int, ...] = (),
) -> ForwardOutput:
    """Runs every layer. token_ids and positions are int32 [T]; ids out of range are clipped.

    Hidden states are in the parameters' dtype. `captured_layers` are those whose input comes back beside the result: the
    residual stream before layer i, i from 0 to L, where L is what leaves the last layer, before the final norm. They may
    stand in any order. Layers given as a tuple run as an unrolled loop, stacked ones as one scan with the cache in its
    carry. With `run_layer`, which needs a tuple, that op takes the place of the composition of a layer here, `attend`
    included. Under `parallel` the parameters, the cache and what `attend` is called with are one device's part; hidden
    states are whole.
    """
    assert all(0 <= i <= config.num_layers for i in captured_layers), f"{captured_layers} of {config.num_layers} layers"
    x = embed(params["embed_tokens"], config, token_ids, params["norm"].dtype, parallel)
    tables = rope_tables(config, positions)
    layers, wanted = params["layers"], frozenset(captured_layers)
    if isinstance(layers, tuple):
        x, kv_cache, entered = _unrolled(
            layers, config, x, tables, kv_cache, attend, run_layer, parallel, run_experts, wanted
        )
    else:
        assert run_layer is None, "stacked layers are scanned, not fused"
        x, kv_cache, entered = _scanned(layers, config, x, tables, kv_cache, attend, parallel, run_experts, wanted)
    entered[config.num_layers] = x
    captured = jnp.concatenate([entered[i] for i in captured_layers], axis=-1) if captured_layers else None
    return ForwardOutput(norm(x, params["norm"], config), kv_cache, captured)


def layer_spec(config: ModelConfig, sliding_window: int | None) -> LayerSpec:
    """What a fused layer must know of the model, for a layer with this window."""
    return LayerSpec(
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        intermediate_size=config.intermediate_size if config.moe is None else config.moe.intermediate_size,
        activation=config.activation,
        attention_scale=config.attention_scale,
        attention_soft_cap=config.attention_soft_cap,
        sliding_window=sliding_window,
        norm_eps=config.norm_eps,
        norm_unit_offset=config.norm_unit_offset,
        qkv_bias=config.qkv_bias,
        o_bias=config.o_bias,
        mlp_bias=config.mlp_bias,
        qk_norm=config.qk_norm,
        post_norms=config.post_norms,
        num_experts=0 if config.moe is None else config.moe.num_experts,
        num_experts_per_tok=1 if config.moe is None else config.moe.num_experts_per_tok,
        norm_topk_prob=config.moe is not None and config.moe.norm_topk_prob,
    )


def compute_logits(
    params: Params,
    config: ModelConfig,
    hidden: Array,
    parallel: Parallel = ALONE,
    is_used: Array | None = None,
) -> Array:
    """Logits float32 [R, V] of hidden states [R, D] as `forward` returns them, soft-capped where the model asks.

    Rows that `is_used` [R] bool leaves out may hold anything.
    """
    logits = logits_of_part(params, config, hidden, is_used)
    return parallel.gather(logits, axis=1)[:, : config.vocab_size] if parallel.size > 1 else logits


def logits_of_part(params: Params, config: ModelConfig, hidden: Array, is_used: Array | None = None) -> Array:
    """The logits [R, n] of the tokens whose part of the vocabulary this device holds, padding among them: n is V padded, over devices."""
    if "lm_head" in params:
        logits = matmul(hidden, params["lm_head"], is_used)
    elif isinstance(params["embed_tokens"], Array):
        logits = jnp.einsum("rd,vd->rv", hidden, params["embed_tokens"], preferred_element_type=jnp.float32)
    else:
        logits = matmul(hidden, params["embed_tokens"], is_used)
    return soft_cap(logits, config.final_soft_cap)


def embed(table: Array | Weight, config: ModelConfig, token_ids: Array, dtype: jnp.dtype, parallel: Parallel) -> Array:
    """Rows [T, D] of the embedding `table` [V, D] for token_ids int32 [T], clipped to [0, V), times `config.embedding_scale`.

    `dtype` is that of the rows where the table is not an array but in a form of the linear op.
    """
    num_rows = -(-config.vocab_size // parallel.size)  # of the table, on this device
    ids = jnp.clip(token_ids, 0, config.vocab_size - 1) - parallel.offset(num_rows)
    if isinstance(table, Array):
        x = jnp.take(table, jnp.clip(ids, 0, num_rows - 1), axis=0, mode="clip")  # [T, D]
    else:  # a tied embedding that was prepared as the head it also is
        x = table.columns(ids, dtype)
    if parallel.size > 1:  # one device has the token's row, the others add zeros
        is_here = (ids >= 0) & (ids < num_rows)
        x = parallel.sum(jnp.where(is_here[:, None], x, jnp.zeros_like(x)))
    if config.embedding_scale is None:
        return x
    return x * jnp.asarray(config.embedding_scale, x.dtype)


def _unrolled(
    layers: tuple[Layer, ...],
    config: ModelConfig,
    x: Array,
    tables: tuple[Array, Array],
    kv_cache: KVCache,
    attend: Attend,
    run_layer: RunLayer | None,
    parallel: Parallel,
    run_experts: RunExperts,
    wanted: frozenset[int],
) -> tuple[Array, KVCache, dict[int, Array]]:
    entered = {}
    for layer_idx, layer in enumerate(layers):
        if layer_idx in wanted:
            entered[layer_idx] = x
        rope_idx = config.rope_indices[layer_idx]
        rope = (tables[0][rope_idx], tables[1][rope_idx])
        info = LayerInfo(layer_idx, config.sliding_windows[layer_idx])
        if run_layer is None:
            x, kv_cache = _layer(layer, config, x, rope, kv_cache, attend, info, parallel, run_experts)
        else:
            x, kv_cache = run_layer(layer, x, rope, kv_cache, info)
    return x, kv_cache, entered


def _scanned(
    layers: Layer,
    config: ModelConfig,
    x: Array,
    tables: tuple[Array, Array],
    kv_cache: KVCache,
    attend: Attend,
    parallel: Parallel,
    run_experts: RunExperts,
    wanted: frozenset[int],
) -> tuple[Array, KVCache, dict[int, Array]]:
    # What is the same for all layers stays static, so that a model without windows compiles no window.
    one_window = len(set(config.sliding_windows)) == 1
    one_rope = len(set(config.rope_indices)) == 1
    windows = np.asarray([NO_WINDOW if w is None else w for w in config.sliding_windows], np.int32)
    ropes = np.asarray(config.rope_indices, np.int32)
    layer_indices = np.arange(config.num_layers, dtype=np.int32)

    Carry = tuple[Array, KVCache, dict[int, Array]]

    def body(carry: Carry, xs: tuple[Any, ...]) -> tuple[Carry, None]:
        x, kv_cache, entered = carry
        layer, layer_idx, window, rope = xs
        # Chosen by the index: every layer's hidden states would be L times what is wanted.
        entered = {i: jnp.where(layer_idx == i, x, kept) for i, kept in entered.items()}
        info = LayerInfo(layer_idx, config.sliding_windows[0] if one_window else window)
        rope_idx = config.rope_indices[0] if one_rope else rope
        cos, sin = (jax.lax.dynamic_index_in_dim(table, rope_idx, 0, keepdims=False) for table in tables)
        x, kv_cache = _layer(layer, config, x, (cos, sin), kv_cache, attend, info, parallel, run_experts)
        return (x, kv_cache, entered), None

    xs = (layers, jnp.asarray(layer_indices), jnp.asarray(windows), jnp.asarray(ropes))
    entered = {i: x for i in sorted(wanted) if i < config.num_layers}
    carry, _ = jax.lax.scan(body, (x, kv_cache, entered), xs)
    return carry


def _layer(
    layer: Mapping[str, Array],
    config: ModelConfig,
    x: Array,
    rope: tuple[Array, Array],
    kv_cache: KVCache,
    attend: Attend,
    info: LayerInfo,
    parallel: Parallel,
    run_experts: RunExperts,
) -> tuple[Array, KVCache]:
    h, kv_cache = attention(layer, config, norm(x, layer["input_norm"], config), rope, kv_cache, attend, info, parallel)
    if config.post_norms:
        h = norm(h, layer["post_attention_norm"], config)
    x = x + h
    h = norm(x, layer["pre_mlp_norm"], config)
    if config.moe is not None:
        h = moe_mlp(h, layer, config.moe, config.activation, run_experts, parallel)
    else:
        h = gated_mlp(h, layer, config.activation, parallel)
    if config.post_norms:
        h = norm(h, layer["post_mlp_norm"], config)
    return x + h, kv_cache


def attention(
    layer: Mapping[str, Any],
    config: ModelConfig,
    x: Array,
    rope: tuple[Array, Array],
    kv_cache: KVCache,
    attend: Attend,
    info: LayerInfo,
    parallel: Parallel,
) -> tuple[Array, KVCache]:
    """A layer's attention to x [T, I], normed already: [T, D], and the cache as `attend` left it.

    I is what the layer's projections take; `rope` is the layer's cosines and sines, [T, R/2].
    """
    num_tokens = x.shape[0]
    q = linear(x, layer["q_proj"], layer.get("q_bias")).reshape(num_tokens, -1, config.head_dim)  # [T, N, H]
    if config.qk_norm:
        q = norm(q, layer["q_norm"], config)
    q = apply_rope(q, *rope)
    k, v = keys_values(layer, config, x, rope)
    out, kv_cache = attend(q, k, v, kv_cache, info)
    return linear_of_parts(out.reshape(num_tokens, -1), layer["o_proj"], layer.get("o_bias"), parallel), kv_cache


def keys_values(
    layer: Mapping[str, Any], config: ModelConfig, x: Array, rope: tuple[Array, Array], is_used: Array | None = None
) -> tuple[Array, Array]:
    """A layer's keys, rotated, and values for x [T, I], normed already: two [T, K, H]. Those that `is_used` [T] bool leaves out may be
    anything."""
    num_tokens = x.shape[0]
    k = linear(x, layer["k_proj"], layer.get("k_bias"), is_used).reshape(num_tokens, -1, config.head_dim)  # [T, K, H]
    v = linear(x, layer["v_proj"], layer.get("v_bias"), is_used).reshape(num_tokens, -1, config.head_dim)
    if config.qk_norm:
        k = norm(k, layer["k_norm"], config)
    return apply_rope(k, *rope), v


def norm(x: Array, weight: Array, config: ModelConfig) -> Array:
    """The RMS norm of the model over the last axis of x [..., D]."""
    return rms_norm(x, weight, eps=config.norm_eps, unit_offset=config.norm_unit_offset)
