"""Held-out loss of a model of the pair, and what it writes after a prompt."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from quire.models.config import ModelConfig
from quire.models.training.step import Params, log_probs, token_losses

_ROWS_PER_CALL = 8


@dataclass(frozen=True)
class Loss:
    """Summed over the tokens of some text; `bits_per_byte` does not depend on the tokenizer."""

    nats: float
    num_tokens: int
    num_bytes: float

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.num_tokens

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2.0) / self.num_bytes

    def __add__(self, other: "Loss") -> "Loss":
        return Loss(self.nats + other.nats, self.num_tokens + other.num_tokens, self.num_bytes + other.num_bytes)


Scores = Callable[[Params, jax.Array], tuple[jax.Array, jax.Array]]


def make_token_scores(config: ModelConfig) -> Scores:
    """Compiles `(params, rows [B, S + 1]) -> (loss of each token, most likely token)`, both [B * S]."""

    def scores(params: Params, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        log_p = log_probs(params, config, rows[:, :-1])
        return token_losses(log_p, rows[:, 1:]), jnp.argmax(log_p, axis=-1)

    return jax.jit(scores)


def score(
    scores: Scores, params: Params, rows: NDArray[np.int32], byte_lengths: NDArray[np.float64]
) -> tuple[Loss, NDArray[np.int32]]:
    """The loss over `rows` [B, S + 1] and the most likely token at each place, [B * S]."""
    loss, best = Loss(0.0, 0, 0.0), []
    for start in range(0, len(rows), _ROWS_PER_CALL):
        part = rows[start : start + _ROWS_PER_CALL]
        padded = np.concatenate([part, np.repeat(part[:1], _ROWS_PER_CALL - len(part), axis=0)])
        losses, tokens = (np.asarray(x)[: part[:, 1:].size] for x in scores(params, jnp.asarray(padded)))
        loss += Loss(float(losses.sum()), losses.size, float(byte_lengths[part[:, 1:]].sum()))
        best.append(tokens)
    return loss, np.concatenate(best)


def make_sampler(config: ModelConfig, tokenizer: Tokenizer, context: int = 128) -> Callable[..., str]:
    """Compiles `(params, prompt, num_tokens, temperature, seed) -> text`; a plain loop that runs the whole context for each token."""

    @jax.jit
    def next_log_probs(params: Params, ids: jax.Array, last: jax.Array) -> jax.Array:
        return log_probs(params, config, ids)[last]

    def sample(
        params: Params, prompt: str, num_tokens: int, temperature: float, seed: int, stop: Sequence[int] = ()
    ) -> str:
        rng, ids = np.random.default_rng(seed), tokenizer.encode(prompt).ids
        ids = ids[-(context - 1) :]
        while len(ids) < context and num_tokens > 0:
            padded = jnp.asarray([ids + [0] * (context - len(ids))], jnp.int32)
            log_p = np.asarray(next_log_probs(params, padded, jnp.int32(len(ids) - 1)), np.float64)
            noise = rng.gumbel(size=log_p.shape) if temperature > 0 else 0.0
            token = int(np.argmax(log_p / (temperature or 1.0) + noise))
            if token in stop:
                break
            ids.append(token)
            num_tokens -= 1
        return tokenizer.decode(ids, skip_special_tokens=False)

    return sample
