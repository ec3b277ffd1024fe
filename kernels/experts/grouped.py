"""Each expert computes its own tokens: rows sorted by expert, then `jax.lax.ragged_dot`, for which XLA has a kernel on TPUs.

T tokens, D hidden size, E experts held here, F width of one expert, k experts per token.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import quire.kernels.experts.reference as reference
from quire.kernels.op import OpContext

MIN_TOKENS = 256
"""With fewer, experts have a few tokens each, and the kernel, which multiplies at least 128 rows for every expert, gains nothing over all
experts computing all tokens: T x k + 128 x E rows against T x E."""


def refuses(context: OpContext) -> str | None:
    """Why it cannot serve a context, None when it can."""
    if context.platform != "tpu":
        return "needs a TPU"
    if context.quantization != "none":
        return f"ragged products of {context.quantization} weights are not there"
    return None


def run_experts(
    x: jax.Array, ids: jax.Array, weights: jax.Array, matrices: tuple[Any, ...], *, activate: Any
) -> jax.Array:
    """`contract.RunExperts`; below `MIN_TOKENS` it is the reference."""
    if x.shape[0] < MIN_TOKENS:
        return reference.run_experts(x, ids, weights, matrices, activate=activate)
    gate_proj, up_proj, down_proj = matrices
    num_experts, num_chosen = gate_proj.shape[0], ids.shape[1]
    experts = jnp.where((ids >= 0) & (ids < num_experts), ids, num_experts).reshape(-1)  # [T k]
    order = jnp.argsort(experts)  # those that are held elsewhere come last, behind all groups
    sizes = jnp.sum((experts[:, None] == jnp.arange(num_experts)[None, :]).astype(jnp.int32), axis=0)  # [E]

    def product(rows: jax.Array, matrix: jax.Array) -> jax.Array:
        return jax.lax.ragged_dot(rows, matrix, sizes, preferred_element_type=jnp.float32)

    rows = x[order // np.int32(num_chosen)]  # [T k, D]
    h = activate(product(rows, gate_proj)) * product(rows, up_proj)  # [T k, F]
    out = product(h.astype(x.dtype), down_proj) * weights.reshape(-1)[order][:, None]
    is_here = jnp.arange(order.shape[0]) < jnp.sum(sizes)
    out = jnp.where(is_here[:, None], out, jnp.float32(0)).astype(x.dtype)
    back = jnp.argsort(order)
    return jnp.sum(out[back].reshape(*ids.shape, -1).astype(jnp.float32), axis=1)
