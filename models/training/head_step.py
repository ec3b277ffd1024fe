"""One training step of an EAGLE-3 head: unrolled on its own hidden states, as it drafts, towards the target's distribution.

Letters: B rows, L tokens of a row, J drafts ("unrolled"), P = L - J chains of a row, T = B * P, D hidden, Dt of the target,
N query heads, K key/value heads, G = N / K, H head dim, V vocabulary of the target, Vd of the head.

Chain p of a row is what the head does after the target computed token p: draft j (from 0) is its entry at position p + j, which reads
token p + j + 1 and is scored against the target's distribution of token p + j + 2. Its feature is the target's for j = 0, else the
head's own output of draft j - 1. It attends to the entries of the target's features up to p, which all chains share, and to its own
chain's. Source: the training-time test of Li et al. 2025 (EAGLE-3). The tokens read are the row's, also where the head drafted others.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax  # type: ignore[import-untyped]

from quire.kernels.linear.contract import matmul
from quire.models.config import ModelConfig
from quire.models.decoder import compute_logits, forward, norm
from quire.models.eagle import EagleConfig, embed_for_head, fuse_features, head_forward
from quire.models.params import Params
from quire.models.training.step import TrainState, dense_attend, updated

NUM_UNROLLED = 4
LOSS_DECAY = 0.8
"""What the loss of a draft weighs beside that of the draft before it."""
MUON_LEARNING_RATE = 0.02
ADAM_LEARNING_RATE = 0.002
WEIGHT_DECAY = 0.01
_MASKED = -1e9

Chain = tuple[tuple[jax.Array, jax.Array], ...]  # keys and values of the drafts so far, two [T, K, H] each
Attend = Callable[..., tuple[jax.Array, Chain]]


@dataclass(frozen=True)
class Teacher:
    """The target: its weights, layers as a tuple, and the ids int64 [Vd] of the tokens that the head has."""

    config: ModelConfig
    params: Params
    target_ids: np.ndarray


def chain_attend(num_rows: int, scale: float) -> Attend:
    """Attention for `head_forward` of all chains of `num_rows` rows at once; the cache is what earlier drafts left, None at first."""

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, cache: Chain | None, layer: object) -> tuple[jax.Array, Chain]:
        num_tokens, num_heads, head_dim = q.shape
        num_kv_heads, length = k.shape[1], num_tokens // num_rows
        q = q.reshape(num_rows, length, num_kv_heads, num_heads // num_kv_heads, head_dim)  # [B, P, K, G, H]
        chain: Chain = (*(cache or ()), (k, v))
        (keys, values), *own = [tuple(x.reshape(num_rows, length, num_kv_heads, head_dim) for x in kv) for kv in chain]
        scores = jnp.einsum("bskgh,btkh->bkgst", q, keys)
        visible = jnp.arange(length)[:, None] >= jnp.arange(length)[None, :]
        scores = jnp.where(visible[None, None, None], scores, _MASKED)
        own_scores = [jnp.einsum("bskgh,bskh->bkgs", q, own_keys)[..., None] for own_keys, _ in own]
        weights = jax.nn.softmax(jnp.concatenate([scores, *own_scores], axis=-1) * scale, axis=-1)
        out = jnp.einsum("bkgst,btkh->bskgh", weights[..., :length], values)
        for idx, (_, own_values) in enumerate(own):
            out = out + jnp.einsum("bkgs,bskh->bskgh", weights[..., length + idx], own_values)
        return out.reshape(num_tokens, num_heads, head_dim), chain

    return attend


def teach(teacher: Teacher, head: EagleConfig, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The target over rows int32 [B, L]: captured hidden states [B, L, n * Dt], log-probabilities of the next token [B, L, V]."""
    num_rows, length = rows.shape
    config, positions = teacher.config, jnp.tile(jnp.arange(length, dtype=jnp.int32), num_rows)
    attend = dense_attend(num_rows, config.attention_scale)
    hidden, _, captured = forward(
        teacher.params, config, rows.reshape(-1), positions, None, attend, captured_layers=head.captured_layers
    )
    assert captured is not None
    log_p = jax.nn.log_softmax(compute_logits(teacher.params, config, hidden), axis=-1)
    return captured.reshape(num_rows, length, -1), log_p.reshape(num_rows, length, -1)


def unrolled_log_probs(
    params: Params, head: EagleConfig, target_params: Params, rows: jax.Array, captured: jax.Array, num_unrolled: int
) -> list[jax.Array]:
    """For each draft its log-probabilities [B, P, Vd] of the head's own tokens, that of chain p for token p + draft + 2."""
    num_rows, length = rows.shape
    num_chains = length - num_unrolled
    chains = jnp.tile(jnp.arange(num_chains, dtype=jnp.int32), num_rows)
    hidden = fuse_features(params, captured[:, :num_chains].reshape(num_rows * num_chains, -1))
    attend, cache = chain_attend(num_rows, head.model.attention_scale), None
    results = []
    for draft in range(num_unrolled):
        ids = rows[:, draft + 1 : draft + 1 + num_chains].reshape(-1)
        embeddings = embed_for_head(params, head, target_params, ids)
        hidden, cache = head_forward(params, head, embeddings, hidden, chains + draft, cache, attend)
        # Over the head's own tokens; `head_logits` would spread them over the target's.
        logits = matmul(norm(hidden, params["norm"], head.model), params["lm_head"])
        results.append(jax.nn.log_softmax(logits, axis=-1).reshape(num_rows, num_chains, -1))
    return results


def unrolled_losses(
    params: Params, head: EagleConfig, teacher: Teacher, rows: jax.Array, num_unrolled: int = NUM_UNROLLED
) -> jax.Array:
    """Mean cross-entropy of each draft [J] against the target's distribution over the head's tokens; rows int32 [B, L].

    That distribution is not scaled up to one, so that a place weighs as much as is likely to be drafted there.
    """
    captured, log_p = teach(teacher, head, rows)
    p = jnp.exp(log_p[..., jnp.asarray(teacher.target_ids)])  # [B, L, Vd]
    log_q = unrolled_log_probs(params, head, teacher.params, rows, captured, num_unrolled)
    num_chains = rows.shape[1] - num_unrolled
    parts = [p[:, draft + 1 : draft + 1 + num_chains] for draft in range(num_unrolled)]
    losses = [-jnp.mean(jnp.sum(part * log, axis=-1)) for part, log in zip(parts, log_q, strict=True)]
    return jnp.stack(losses)


def make_head_optimizer(params: Params) -> optax.GradientTransformation:
    """Muon (Jordan 2024) for the matrices of the layer, AdamW for the output matrix and the norms."""
    labels = {name: "muon" if leaf.ndim == 2 and name != "lm_head" else "adam" for name, leaf in params.items()}
    return optax.multi_transform(
        {
            "muon": optax.contrib.muon(MUON_LEARNING_RATE, weight_decay=WEIGHT_DECAY),
            "adam": optax.adamw(ADAM_LEARNING_RATE, b1=0.9, b2=0.95, weight_decay=WEIGHT_DECAY),
        },
        labels,
    )


HeadStep = Callable[[TrainState, Params, jax.Array, jax.Array], tuple[TrainState, jax.Array]]


def make_head_step(head: EagleConfig, teacher: Teacher, optimizer: optax.GradientTransformation) -> HeadStep:
    """Compiles `step(state, target_params, rows int32 [B, L], learning_rate_factor) -> (state, losses [J])`."""

    def step(
        state: TrainState, target_params: Params, rows: jax.Array, factor: jax.Array
    ) -> tuple[TrainState, jax.Array]:
        given = Teacher(teacher.config, target_params, teacher.target_ids)

        def loss(params: Params) -> tuple[jax.Array, jax.Array]:
            losses = unrolled_losses(params, head, given, rows)
            weights = LOSS_DECAY ** np.arange(len(losses), dtype=np.float32)
            return jnp.sum(losses * weights) / weights.sum(), losses

        gradients, losses = jax.grad(loss, has_aux=True)(state[0])
        return updated(optimizer, state, gradients, factor), losses

    return jax.jit(step, donate_argnums=0)


Agreement = Callable[[Params, Params, jax.Array], jax.Array]


def make_agreement(head: EagleConfig, teacher: Teacher, num_unrolled: int = NUM_UNROLLED) -> Agreement:
    """Compiles `(params, target_params, rows int32 [B, L]) -> bool [J, B, P]`: whether a draft's best token is the target's."""

    def agreement(params: Params, target_params: Params, rows: jax.Array) -> jax.Array:
        captured, log_p = teach(Teacher(teacher.config, target_params, teacher.target_ids), head, rows)
        best = jnp.argmax(log_p, axis=-1)
        num_chains = rows.shape[1] - num_unrolled
        log_q = unrolled_log_probs(params, head, target_params, rows, captured, num_unrolled)
        ids = jnp.asarray(teacher.target_ids)
        return jnp.stack(
            [
                ids[jnp.argmax(log, axis=-1)] == best[:, draft + 1 : draft + 1 + num_chains]
                for draft, log in enumerate(log_q)
            ]
        )

    return jax.jit(agreement)


def fresh_head(config: EagleConfig, teacher: Teacher, params: Params) -> Params:
    """Random `params` of a head with the target's output matrix and final norm in the place of its own, where sizes allow."""
    if config.target_hidden_size != config.model.hidden_size:
        return params
    target: Any = teacher.params
    output = target["lm_head"] if "lm_head" in target else target["embed_tokens"].T  # [D, V]
    return params | {"lm_head": output[:, jnp.asarray(teacher.target_ids)], "norm": jnp.array(target["norm"])}
