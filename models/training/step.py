"""One training step of the pair: the target on the text, the draft on the text and on the target's distribution.

Letters: B rows, S tokens of a row, T = B * S, D hidden, N query heads, K key/value heads, G = N / K, H head dim, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
import optax  # type: ignore[import-untyped]

from quire.models.config import ModelConfig
from quire.models.decoder import compute_logits, forward

Params = Any  # a parameter pytree of quire.models.params
_QUERY_CHUNK = 256
_MASKED = -1e9

MUON_LEARNING_RATE = 0.02
ADAM_LEARNING_RATE = 0.004
SOFT_LABEL_SHARE = 0.5
"""How much of the draft's loss is the divergence from the target; the rest is the text itself."""


def dense_attend(num_rows: int, scale: float) -> Callable[..., tuple[jax.Array, None]]:
    """Causal attention within each of `num_rows` equal rows of a flat [T] axis, a chunk of queries at a time to skip what is masked."""

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, kv_cache: None, layer: object) -> tuple[jax.Array, None]:
        num_tokens, num_heads, head_dim = q.shape
        num_kv_heads, length = k.shape[1], num_tokens // num_rows
        q = q.reshape(num_rows, length, num_kv_heads, num_heads // num_kv_heads, head_dim)  # [B, S, K, G, H]
        k, v = (x.reshape(num_rows, length, num_kv_heads, head_dim) for x in (k, v))
        chunks = []
        for start in range(0, length, _QUERY_CHUNK):
            end = min(start + _QUERY_CHUNK, length)
            scores = jnp.einsum("bskgh,btkh->bkgst", q[:, start:end], k[:, :end]) * scale
            visible = jnp.arange(start, end)[:, None] >= jnp.arange(end)[None, :]
            weights = jax.nn.softmax(jnp.where(visible[None, None, None], scores, _MASKED), axis=-1)
            chunks.append(jnp.einsum("bkgst,btkh->bskgh", weights, v[:, :end]))
        return jnp.concatenate(chunks, axis=1).reshape(num_tokens, num_heads, head_dim), None

    return attend


def log_probs(params: Params, config: ModelConfig, ids: jax.Array) -> jax.Array:
    """Log-probabilities of the next token, [B * S, V] float32, for rows `ids` [B, S] int32."""
    num_rows, length = ids.shape
    positions = jnp.tile(jnp.arange(length, dtype=jnp.int32), num_rows)
    hidden, _, _ = forward(
        params, config, ids.reshape(-1), positions, None, dense_attend(num_rows, config.attention_scale)
    )
    return jax.nn.log_softmax(compute_logits(params, config, hidden), axis=-1)


def token_losses(log_p: jax.Array, labels: jax.Array) -> jax.Array:
    """Negative log-likelihood of each label, [T] float32."""
    return -jnp.take_along_axis(log_p, labels.reshape(-1)[:, None], axis=-1)[:, 0]


Item = TypeVar("Item")
Other = TypeVar("Other")


@dataclass(frozen=True)
class Pair(Generic[Item]):
    """A thing for the target and the same for the draft."""

    target: Item
    draft: Item

    def map(self, function: Callable[[Item], Other]) -> "Pair[Other]":
        """Applies a function to both."""
        return Pair(function(self.target), function(self.draft))

    def zip(self, others: "Pair[Other]") -> "Pair[tuple[Item, Other]]":
        """Pairs of pairs."""
        return Pair((self.target, others.target), (self.draft, others.draft))


def make_optimizer(params: Params) -> optax.GradientTransformation:
    """Muon (Jordan 2024) for the matrices inside the layers, Adam for embeddings and norms; the schedule is a factor on the updates."""
    labels = jax.tree.map(lambda leaf: "adam", params)
    labels["layers"] = jax.tree.map(lambda leaf: "muon" if leaf.ndim == 2 else "adam", params["layers"])
    return optax.multi_transform(
        {
            "muon": optax.contrib.muon(MUON_LEARNING_RATE, weight_decay=0.01),
            "adam": optax.adam(ADAM_LEARNING_RATE, b1=0.9, b2=0.95),
        },
        labels,
    )


TrainState = tuple[Params, Any]  # parameters, optimizer state
StepResult = tuple[TrainState, TrainState, jax.Array, jax.Array]


def make_train_step(
    configs: Pair[ModelConfig], optimizers: Pair[optax.GradientTransformation]
) -> Callable[..., StepResult]:
    """Compiles `step(target_state, draft_state, rows [B, S + 1] int32, learning_rate_factor) -> (states, target loss, draft loss)`."""

    def target_loss(params: Params, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        log_p = log_probs(params, configs.target, rows[:, :-1])
        return jnp.mean(token_losses(log_p, rows[:, 1:])), log_p

    def draft_loss(params: Params, rows: jax.Array, teacher: jax.Array) -> tuple[jax.Array, jax.Array]:
        log_p = log_probs(params, configs.draft, rows[:, :-1])
        text = jnp.mean(token_losses(log_p, rows[:, 1:]))
        soft = jnp.mean(jnp.sum(jnp.exp(teacher) * (teacher - log_p), axis=-1))
        return (1.0 - SOFT_LABEL_SHARE) * text + SOFT_LABEL_SHARE * soft, text

    def step(target: TrainState, draft: TrainState, rows: jax.Array, factor: jax.Array) -> StepResult:
        (loss, teacher), gradients = jax.value_and_grad(target_loss, has_aux=True)(target[0], rows)
        target = updated(optimizers.target, target, gradients, factor)
        teacher = jax.lax.stop_gradient(teacher)
        (_, text_loss), gradients = jax.value_and_grad(draft_loss, has_aux=True)(draft[0], rows, teacher)
        return target, updated(optimizers.draft, draft, gradients, factor), loss, text_loss

    return jax.jit(step, donate_argnums=(0, 1))


def updated(
    optimizer: optax.GradientTransformation, state: TrainState, gradients: Params, factor: jax.Array
) -> TrainState:
    """The state after one update; `factor` is the schedule's."""
    params, optimizer_state = state
    updates, optimizer_state = optimizer.update(gradients, optimizer_state, params)
    return optax.apply_updates(params, jax.tree.map(lambda update: update * factor, updates)), optimizer_state
