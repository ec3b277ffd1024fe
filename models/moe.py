"""Mixture of experts in place of the MLP: the router, and what it hands to the experts op.

Legend: T tokens, D hidden size, E experts, k experts per token.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from quire.kernels.experts.contract import RunExperts
from quire.kernels.linear.contract import matmul
from quire.models.config import MoeConfig
from quire.models.layers import activate
from quire.models.parallel import Parallel


def moe_mlp(
    x: Array,
    layer: Mapping[str, Any],
    moe: MoeConfig,
    activation: str,
    run_experts: RunExperts,
    parallel: Parallel,
) -> Array:
    """The experts' MLPs of x [T, D], mixed by the router; x's dtype out.

    Each device holds some of the experts, or a part of every expert's width where they cannot be shared out evenly.
    """
    ids, weights = route(matmul(x, layer["router"]), moe)
    experts = (layer["experts_gate_proj"], layer["experts_up_proj"], layer["experts_down_proj"])
    num_held = jax.tree.leaves(experts[0])[0].shape[0]
    if num_held < moe.num_experts:
        ids = ids - parallel.offset(num_held)
    total = run_experts(x, ids, weights, experts, activate=partial(activate, activation=activation))
    return parallel.sum(total.astype(x.dtype))


def route(router_logits: Array, moe: MoeConfig) -> tuple[Array, Array]:
    """The k experts of each token and how much each counts: router logits [T, E] -> (ids [T, k] int32, weights [T, k] float32).

    Those with the largest softmax probabilities, in that order; of equal ones the lower index comes first. A token's weights
    sum to 1 under `norm_topk_prob`.
    """
    probs = jax.nn.softmax(router_logits.astype(jnp.float32), axis=-1)
    expert_ids = jax.lax.broadcasted_iota(jnp.int32, probs.shape, 1)
    # k rounds of "largest, then first index reaching it": no sort and no reduction over pairs, which Neuron lacks.
    left, ids, weights = probs, [], []
    for _ in range(moe.num_experts_per_tok):
        largest = jnp.max(left, axis=-1, keepdims=True)
        first = jnp.min(jnp.where(left == largest, expert_ids, moe.num_experts), axis=-1, keepdims=True)
        left = jnp.where(expert_ids == first, jnp.float32(-1), left)
        ids.append(first)
        weights.append(largest)
    chosen, kept = jnp.concatenate(ids, axis=1), jnp.concatenate(weights, axis=1)
    if moe.norm_topk_prob:
        kept = kept / jnp.sum(kept, axis=-1, keepdims=True)
    return chosen, kept
