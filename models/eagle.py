"""EAGLE-3 heads: one small layer that drafts tokens from what the target model's own layers computed.

Legend: T tokens, R rows, D hidden size of the head, Dt of the target, n captured layers (three in published heads), N query heads,
K key and value heads, H head dimension, V vocabulary of the target, Vd of the head (often a part of it).

A head reads a token together with the *feature* of the token before it. The feature is what `fuse_features` makes of the target's
hidden states there, or, while drafting, where the target has not been yet, the head's own output there:

    feature of position t ─┐
                           ├─► head_forward at position t ─► hidden ─► head_logits: the token at t + 2
    token at t + 1 ────────┘                                   └─────► feature of position t + 1

So the entry (feature of t, token of t + 1) is computed, and its key rotated, at position t: a sequence of S tokens has S - 1 entries. The
published code numbers them so too. Source: Li et al. 2025 (EAGLE-3), and the layout of its published checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from quire.kernels.draft_head.contract import HeadSpec
from quire.kernels.linear.contract import matmul
from quire.kernels.sampling.logits import MASKED
from quire.models.config import ModelConfig
from quire.models.decoder import Attend, KVCache, LayerInfo, attention, embed, keys_values, norm
from quire.models.layers import gated_mlp, linear
from quire.models.parallel import ALONE, Parallel
from quire.models.params import Params, ParamSpec, Place, as_array, draw
from quire.models.rope import rope_tables

DRAFT_COLUMNS = "draft_columns"
"""The parameter int32 [V] that says which column of the head's logits is a target's token; -1 where none is."""


@dataclass(frozen=True, kw_only=True)
class EagleConfig:
    """One EAGLE-3 head, and what of its target it was made for."""

    model: ModelConfig
    """The head as a decoder of one layer. Its `vocab_size` is the target's, V; its embeddings are not scaled, whatever the target does."""
    target_hidden_size: int
    captured_layers: tuple[int, ...]
    """The layers of the target whose inputs make the feature, in ascending order: `captured_layers` of `quire.models.decoder.forward`."""
    draft_vocab_size: int
    """How many tokens the head can propose. As many as the target has: all of them, under the same ids."""
    has_embedding: bool = False
    """Whether the head has an embedding of its own; otherwise it reads the target's."""
    norm_before_residual: bool = False
    """Whether the layer adds its results to the feature after its norm instead of before it."""
    layer_prefix: str = "midlayer."
    """What a checkpoint calls the layer's tensors; "layers.0." is the other way."""

    def __post_init__(self) -> None:
        if self.model.num_layers != 1 or self.model.moe is not None:
            raise ValueError("an EAGLE-3 head is one layer without experts")
        if not 1 <= self.draft_vocab_size <= self.model.vocab_size:
            raise ValueError(
                f"draft_vocab_size must lie in [1, {self.model.vocab_size}] (vocab_size), not {self.draft_vocab_size}"
            )
        layers = self.captured_layers
        if not layers or layers[0] < 0 or any(a >= b for a, b in pairwise(layers)):
            raise ValueError(f"captured_layers must be layers of the target in ascending order, not {layers}")
        if not self.has_embedding and self.target_hidden_size != self.model.hidden_size:
            raise ValueError(
                f"a head of hidden_size {self.model.hidden_size} cannot read the embedding of a target of hidden_size "
                f"{self.target_hidden_size}: it needs one of its own"
            )

    @property
    def drafts_all_tokens(self) -> bool:
        """Whether the head's vocabulary is the target's."""
        return self.draft_vocab_size == self.model.vocab_size


def default_captured_layers(num_layers: int) -> tuple[int, ...]:
    """Those of a target of `num_layers` that a head reads whose config.json does not say: the third one, the middle, the third last."""
    return (2, num_layers // 2, num_layers - 3)


def head_spec(config: EagleConfig) -> HeadSpec:
    """What an op that makes the head's entries must know of it."""
    model = config.model
    assert not model.qk_norm, "a head has no norms of queries and keys"
    return HeadSpec(
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        norm_eps=model.norm_eps,
        norm_unit_offset=model.norm_unit_offset,
        qkv_bias=model.qkv_bias,
    )


def eagle_specs(config: EagleConfig) -> dict[str, ParamSpec]:
    """Every parameter of the head, by name. None is per layer; those of its layer have the decoder's names for them.

    Axes have the target's names where they are cut alike; "inputs", "features" and "target_vocab" are whole on every device.
    """
    model, layer = config.model, config.layer_prefix
    width, heads, kv_heads = model.hidden_size, model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    mlp = model.intermediate_size
    specs: dict[str, ParamSpec] = {}

    def add(name: str, hf_name: str, **sizes: int) -> None:
        specs[name] = _spec(name, hf_name, sizes)

    if config.has_embedding:
        add("embed_tokens", "embed_tokens.weight", vocab=model.vocab_size, embed=width)
    add("fc", "fc.weight", features=len(config.captured_layers) * config.target_hidden_size, embed=width)
    add("input_norm", f"{layer}input_layernorm.weight", embed=width)
    add("hidden_norm", f"{layer}hidden_norm.weight", embed=width)
    for letter, axis, size in (("q", "heads", heads), ("k", "kv_heads", kv_heads), ("v", "kv_heads", kv_heads)):
        add(f"{letter}_proj", f"{layer}self_attn.{letter}_proj.weight", **{"inputs": 2 * width, axis: size})
        if model.qkv_bias:
            add(f"{letter}_bias", f"{layer}self_attn.{letter}_proj.bias", **{axis: size})
    add("o_proj", f"{layer}self_attn.o_proj.weight", heads=heads, embed=width)
    if model.o_bias:
        add("o_bias", f"{layer}self_attn.o_proj.bias", embed=width)
    add("pre_mlp_norm", f"{layer}post_attention_layernorm.weight", embed=width)
    for part in ("gate", "up"):
        add(f"{part}_proj", f"{layer}mlp.{part}_proj.weight", embed=width, mlp=mlp)
        if model.mlp_bias:
            add(f"{part}_bias", f"{layer}mlp.{part}_proj.bias", mlp=mlp)
    add("down_proj", f"{layer}mlp.down_proj.weight", mlp=mlp, embed=width)
    if model.mlp_bias:
        add("down_bias", f"{layer}mlp.down_proj.bias", embed=width)
    add("norm", "norm.weight", embed=width)
    add("lm_head", "lm_head.weight", embed=width, vocab=config.draft_vocab_size)
    if not config.drafts_all_tokens:
        add(DRAFT_COLUMNS, "d2t", target_vocab=model.vocab_size)
    return specs


def _spec(name: str, hf_name: str, sizes: dict[str, int]) -> ParamSpec:
    axes, shape = tuple(sizes), tuple(sizes.values())
    is_matrix = len(shape) == 2
    fan_in = shape[-1] if name == "embed_tokens" else shape[0]
    # What is added to the feature, twice, is kept small beside it.
    fan_in *= 2 if name in ("o_proj", "down_proj") else 1
    return ParamSpec(
        name=name,
        shape=shape,
        axes=axes,
        hf_name=hf_name,
        transpose=is_matrix and name != "embed_tokens",
        rows=None,
        init_std=1 / math.sqrt(fan_in) if is_matrix else 0.0,
        init_constant=1.0 if name.endswith("norm") else 0.0,
    )


def build_eagle_params(config: EagleConfig, make: Callable[[ParamSpec, None], Any]) -> Params:
    """The head's parameters, a flat dict, with `make(spec, None)` at every leaf: `quire.models.params.build_params` for a head."""
    return {spec.key: make(spec, None) for spec in eagle_specs(config).values()}


def eagle_param_dtype(spec: ParamSpec, dtype: Any) -> np.dtype:
    """The dtype of a parameter of a head that is held in `dtype`: what numbers columns is an integer."""
    return np.dtype(np.int32 if spec.name == DRAFT_COLUMNS else dtype)


def draft_columns(target_ids: np.ndarray, vocab_size: int) -> np.ndarray:
    """`DRAFT_COLUMNS` for a head whose token i is the target's target_ids[i]; [Vd] of distinct ids in [0, V)."""
    columns = np.full(vocab_size, -1, np.int32)
    columns[target_ids] = np.arange(len(target_ids), dtype=np.int32)
    return columns


def init_eagle_params(config: EagleConfig, seed: int, dtype: Any, *, place: Place = as_array) -> Params:
    """Random parameters, as `quire.models.params.init_params` draws them; a smaller vocabulary is spread over the target's."""

    def make(spec: ParamSpec, _: None) -> Any:
        if spec.name == DRAFT_COLUMNS:
            ids = np.arange(config.draft_vocab_size) * config.model.vocab_size // config.draft_vocab_size
            return place(spec, draft_columns(ids, config.model.vocab_size))
        return place(spec, draw(spec, seed, 0, dtype))

    return build_eagle_params(config, make)


def abstract_eagle_params(config: EagleConfig, dtype: Any) -> Params:
    """The same tree as `init_eagle_params` gives, of jax.ShapeDtypeStruct: for lowering without weights."""
    return build_eagle_params(config, lambda spec, _: jax.ShapeDtypeStruct(spec.shape, eagle_param_dtype(spec, dtype)))


def embed_for_head(
    params: Params, config: EagleConfig, target_params: Params, token_ids: Array, parallel: Parallel = ALONE
) -> Array:
    """Embeddings [T, D] of token_ids int32 [T], clipped to [0, V): from the head's own table, or from the target's, not scaled."""
    table = params["embed_tokens"] if config.has_embedding else target_params["embed_tokens"]
    return embed(table, config.model, token_ids, params["norm"].dtype, parallel)


def fuse_features(params: Params, captured: Array, is_used: Array | None = None) -> Array:
    """Features [T, D] of the target's hidden states [T, n * Dt], as `forward` captures them; in their dtype.

    Those of tokens that `is_used` [T] bool leaves out may hold anything.
    """
    return linear(captured, params["fc"], is_used=is_used)


def head_forward(
    params: Params,
    config: EagleConfig,
    embeddings: Array,
    features: Array,
    positions: Array,
    kv_cache: KVCache,
    attend: Attend,
    parallel: Parallel = ALONE,
) -> tuple[Array, KVCache]:
    """The head's layer: hidden states [T, D] in the features' dtype, and the cache as `attend` left it.

    Args:
        embeddings: [T, D] in the features' dtype, of the token *after* each feature's.
        features: [T, D], of `fuse_features` or of an earlier call of this.
        positions: int32 [T], those of the features.
        kv_cache: of one layer; `attend` is called with layer 0.

    A result is the feature of the next position while drafting, and goes to `head_logits` for the token after the embedded one.
    """
    model = config.model
    inputs, residual = _layer_inputs(params, config, embeddings, features)
    info = LayerInfo(0, model.sliding_windows[0])
    h, kv_cache = attention(params, model, inputs, head_rope(config, positions), kv_cache, attend, info, parallel)
    x = residual + h
    return x + gated_mlp(norm(x, params["pre_mlp_norm"], model), params, model.activation, parallel), kv_cache


def head_keys_values(
    params: Params,
    config: EagleConfig,
    embeddings: Array,
    features: Array,
    positions: Array,
    is_used: Array | None = None,
) -> tuple[Array, Array]:
    """The keys, rotated, and values that `head_forward` calls `attend` with, two [T, K, H]: for entries whose result nobody needs.

    Those of tokens that `is_used` [T] bool leaves out may hold anything.
    """
    inputs, _ = _layer_inputs(params, config, embeddings, features)
    return keys_values(params, config.model, inputs, head_rope(config, positions), is_used)


def head_logits(
    params: Params, config: EagleConfig, hidden: Array, parallel: Parallel = ALONE, is_used: Array | None = None
) -> Array:
    """Logits float32 [R, V] of `head_forward`'s hidden states [R, D], `MASKED` for tokens that the head cannot propose.

    Rows that `is_used` [R] bool leaves out may hold anything.
    """
    logits = matmul(norm(hidden, params["norm"], config.model), params["lm_head"], is_used)
    logits = parallel.gather(logits, axis=1)[:, : config.draft_vocab_size]  # [R, Vd], a padded vocabulary cut off
    if config.drafts_all_tokens:
        return logits
    columns = params[DRAFT_COLUMNS]
    # A gather over the target's tokens: a scatter of the head's would need a place for none.
    spread = jnp.take(logits, jnp.clip(columns, 0, config.draft_vocab_size - 1), axis=1, mode="clip")
    return jnp.where(columns[None, :] >= 0, spread, MASKED)


def _layer_inputs(params: Params, config: EagleConfig, embeddings: Array, features: Array) -> tuple[Array, Array]:
    """What is projected, [T, 2 D], and what the layer's results are added to, [T, D]."""
    normed = norm(features, params["hidden_norm"], config.model)
    inputs = jnp.concatenate([norm(embeddings, params["input_norm"], config.model), normed], axis=-1)
    return inputs, normed if config.norm_before_residual else features


def head_rope(config: EagleConfig, positions: Array) -> tuple[Array, Array]:
    """Cosines and sines, float32 [T, P / 2], by which the head's keys at positions [T] int32 are rotated."""
    cos, sin = rope_tables(config.model, positions)
    return cos[0], sin[0]
