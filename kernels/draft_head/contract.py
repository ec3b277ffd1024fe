"""The contract of a head's entries: what `quire.models.eagle` makes of the other ops for tokens whose result nobody needs, as one op.

T tokens of a step, C width of the captured hidden states side by side, D hidden size of the head, K key/value heads, H head_dim, P rotated
dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import jax

from quire.kernels.paged_attention.contract import StepPlaces


@dataclass(frozen=True)
class HeadSpec:
    """What is static about a head; the meaning of each is that of the field of the same name in `quire.models.config`."""

    num_kv_heads: int
    head_dim: int
    norm_eps: float
    norm_unit_offset: bool
    qkv_bias: bool


class HeadEntries(Protocol):
    """`kv_cache` is donated by the caller's program and must be updated in place."""

    def __call__(
        self,
        weights: Mapping[str, Any],
        captured: jax.Array,
        embeddings: jax.Array,
        rope: tuple[jax.Array, jax.Array],
        kv_cache: jax.Array,
        places: StepPlaces,
        is_used: jax.Array,
        spec: HeadSpec,
    ) -> tuple[jax.Array, jax.Array]:
        """Features [T, D] in the embeddings' dtype, and the cache with the entries' keys and values in it.

        Args:
            weights: the head's parameters by their names in `quire.models.eagle`; matrices as the linear op prepared them.
            captured: [T, C], of the target's layers.
            embeddings: [T, D], of the token after each feature's.
            rope: cosines and sines, float32 [T, P / 2].
            kv_cache: the head's only layer, `TokenMajor` as `quire.kernels.paged_attention.contract` has it.
            places: where each entry goes.
            is_used: [T] bool; the features of others may be anything, and nothing is written of them.
        """
        ...
