"""Mixture of experts: every expert computes every token, weighted by the router (zero for those not chosen).

Legend: T tokens, D hidden size, E experts, F width of one expert, G experts computed at once, k experts per token.

Dense on purpose: all shapes are static, there is no sort, no gather by expert and no loop over tokens, and a batch of
any size touches every expert's weights anyway once T·k exceeds a few times E.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from quire.kernels.linear.contract import matmul, matmul_each
from quire.models.config import MoeConfig
from quire.models.layers import activate
from quire.models.parallel import Parallel

MAX_INTERMEDIATE_ELEMENTS = 2**23
"""Experts are computed in groups so that the [G, T, F] intermediate stays near this many elements."""


def moe_mlp(x: Array, layer: Mapping[str, Any], moe: MoeConfig, activation: str, parallel: Parallel) -> Array:
    """The experts' MLPs of x [T, D], mixed by the router; x's dtype out. Each device holds a part of every expert's width."""
    router_logits = matmul(x, layer["router"])  # [T, E]
    weights = routing_weights(router_logits, moe).astype(x.dtype)
    experts = (layer["experts_gate_proj"], layer["experts_up_proj"], layer["experts_down_proj"])
    group_size = _group_size(x.shape[0], moe)
    if group_size == moe.num_experts:
        return parallel.sum(_experts(x, weights, experts, activation).astype(x.dtype))

    num_groups = moe.num_experts // group_size
    grouped_weights = weights.reshape(-1, num_groups, group_size).transpose(1, 0, 2)  # [E/G, T, G]
    grouped_experts = jax.tree.map(lambda leaf: leaf.reshape(num_groups, group_size, *leaf.shape[1:]), experts)

    def body(total: Array, group: tuple[Array, tuple[Any, ...]]) -> tuple[Array, None]:
        group_weights, group_experts = group
        return total + _experts(x, group_weights, group_experts, activation), None

    total, _ = jax.lax.scan(body, jnp.zeros(x.shape, jnp.float32), (grouped_weights, grouped_experts))
    return parallel.sum(total.astype(x.dtype))


def routing_weights(router_logits: Array, moe: MoeConfig) -> Array:
    """How much each expert counts for each token, float32 [T, E]: k entries a row above zero, the others zero.

    The k largest softmax probabilities; of equal ones the lower index wins. Rows sum to 1 under `norm_topk_prob`.
    """
    probs = jax.nn.softmax(router_logits.astype(jnp.float32), axis=-1)
    expert_ids = jax.lax.broadcasted_iota(jnp.int32, probs.shape, 1)
    # k rounds of "largest, then first index reaching it": no sort and no reduction over pairs, which Neuron lacks.
    left, chosen = probs, jnp.zeros(probs.shape, jnp.bool_)
    for _ in range(moe.num_experts_per_tok):
        is_max = left == jnp.max(left, axis=-1, keepdims=True)
        first = jnp.min(jnp.where(is_max, expert_ids, moe.num_experts), axis=-1, keepdims=True)
        chosen = chosen | (expert_ids == first)
        left = jnp.where(chosen, jnp.float32(-1), probs)
    kept = jnp.where(chosen, probs, jnp.float32(0))
    if moe.norm_topk_prob:
        kept = kept / jnp.sum(kept, axis=-1, keepdims=True)
    return kept


def _experts(x: Array, weights: Array, experts: tuple[Any, ...], activation: str) -> Array:
    """Sum over G experts weighted by [T, G], float32 [T, D]; experts are gate, up [G, D, F] and down [G, F, D]."""
    gate_proj, up_proj, down_proj = experts
    gate, up = matmul_each(x, gate_proj), matmul_each(x, up_proj)
    h = activate(gate, activation) * up * weights.T.astype(jnp.float32)[:, :, None]  # [G, T, F]
    return jnp.sum(matmul_each(h.astype(x.dtype), down_proj), axis=0)


def _group_size(num_tokens: int, moe: MoeConfig) -> int:
    """The largest divisor of the number of experts that keeps the intermediate small enough; at least 1."""
    fitting = max(1, MAX_INTERMEDIATE_ELEMENTS // (num_tokens * moe.intermediate_size))
    return max(size for size in range(1, min(fitting, moe.num_experts) + 1) if moe.num_experts % size == 0)
