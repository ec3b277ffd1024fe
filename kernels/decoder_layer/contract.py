"""The contract of a fused decoder layer: what `quire.models.decoder` makes of the other ops, as one op.

T tokens of a step, D hidden size, N query heads, K key/value heads, H head_dim, R rows of a rectangle, W queries per row, M blocks per
row, P rotated dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import jax

from quire.kernels.paged_attention.contract import StepPlaces


@dataclass(frozen=True)
class LayerSpec:
    """What is static about a layer; the meaning of each is that of the field of the same name in `quire.models.config`."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    activation: str
    attention_scale: float
    attention_soft_cap: float | None
    sliding_window: int | None
    norm_eps: float
    norm_unit_offset: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    post_norms: bool
    num_experts: int
    """0: a plain MLP; otherwise `intermediate_size` is the width of one expert."""
    num_experts_per_tok: int
    norm_topk_prob: bool


class DecoderLayer(Protocol):
    """`kv_cache` is donated by the caller's program and must be updated in place."""

    def __call__(
        self,
        weights: Mapping[str, Any],
        x: jax.Array,
        rope: tuple[jax.Array, jax.Array],
        kv_cache: jax.Array,
        places: StepPlaces,
        spec: LayerSpec,
    ) -> tuple[jax.Array, jax.Array]:
        """The layer's output [T, D] in x's dtype, and the cache with the step's keys and values in it.

        Args:
            weights: the layer's parameters by their names in `quire.models.params`; matrices as the linear op prepared them.
            x: [T, D], the layer's input.
            rope: cosines and sines, float32 [T, P / 2].
            kv_cache: this layer's, `TokenMajor` as `quire.kernels.paged_attention.contract` has it.
        """
        ...
