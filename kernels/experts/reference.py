"""Every expert computes every token, weighted by zero where it was not chosen.

Dense on purpose: all shapes are static, there is no sort, no gather by expert and no loop over tokens, and a batch of any size touches
every expert's weights anyway once T x k exceeds a few times E.

T tokens, D hidden size, E experts, F width of one expert, G experts computed at once, k experts per token.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from quire.kernels.linear.contract import matmul_each

MAX_INTERMEDIATE_ELEMENTS = 2**23
"""Experts are computed in groups so that the [G, T, F] intermediate stays near this many elements."""


def run_experts(
    x: jax.Array, ids: jax.Array, weights: jax.Array, matrices: tuple[Any, ...], *, activate: Any
) -> jax.Array:
    """The reference of `contract.RunExperts`."""
    num_experts, _, width = jax.tree.leaves(matrices[0])[0].shape
    dense = _dense_weights(ids, weights, num_experts).astype(x.dtype)  # [T, E]
    group_size = _group_size(x.shape[0], num_experts, width)
    if group_size == num_experts:
        return _group(x, dense, matrices, activate)
    num_groups = num_experts // group_size
    grouped_weights = dense.reshape(-1, num_groups, group_size).transpose(1, 0, 2)  # [E/G, T, G]
    grouped = jax.tree.map(lambda leaf: leaf.reshape(num_groups, group_size, *leaf.shape[1:]), matrices)

    def body(total: jax.Array, group: tuple[jax.Array, tuple[Any, ...]]) -> tuple[jax.Array, None]:
        return total + _group(x, *group, activate), None

    total, _ = jax.lax.scan(body, jnp.zeros(x.shape, jnp.float32), (grouped_weights, grouped))
    return total


def _dense_weights(ids: jax.Array, weights: jax.Array, num_experts: int) -> jax.Array:
    """[T, E] float32: a token's weight for every expert, zero for those not chosen."""
    experts = jnp.arange(num_experts, dtype=jnp.int32)
    is_chosen = ids[:, :, None] == experts[None, None, :]  # [T, k, E]
    return jnp.sum(jnp.where(is_chosen, weights[:, :, None], jnp.float32(0)), axis=1)


def _group(x: jax.Array, weights: jax.Array, matrices: tuple[Any, ...], activate: Any) -> jax.Array:
    """Sum over G experts weighted by [T, G], float32 [T, D]; matrices are gate, up [G, D, F] and down [G, F, D]."""
    gate_proj, up_proj, down_proj = matrices
    gate, up = matmul_each(x, gate_proj), matmul_each(x, up_proj)
    h = activate(gate) * up * weights.T.astype(jnp.float32)[:, :, None]  # [G, T, F]
    return jnp.sum(matmul_each(h.astype(x.dtype), down_proj), axis=0)


def _group_size(num_tokens: int, num_experts: int, width: int) -> int:
    """The largest divisor of the number of experts that keeps the intermediate small enough; at least 1."""
    fitting = max(1, MAX_INTERMEDIATE_ELEMENTS // (num_tokens * width))
    return max(size for size in range(1, min(fitting, num_experts) + 1) if num_experts % size == 0)
