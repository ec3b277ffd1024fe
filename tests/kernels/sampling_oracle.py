"""What the sampling parameters mean, in plain numpy with sorts and loops: the oracle of the sampling op.

Semantics of vLLM's V1 sampler, one row at a time, in float64.
"""

from dataclasses import dataclass, field

import jax.numpy as jnp
import numpy as np

from quire.kernels.sampling import SamplingRows, seed_key


@dataclass(frozen=True)
class Params:
    """The sampling parameters and the state of one row; the defaults change nothing."""

    temperature: float = 1.0
    seed: int = 0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    prompt: tuple[int, ...] = (0,)
    output: tuple[int, ...] = ()
    logit_bias: dict[int, float] = field(default_factory=dict)
    allowed: tuple[int, ...] | None = None
    min_tokens: int = 0
    stop_ids: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()


def processed_logits(logits: np.ndarray, params: Params) -> np.ndarray:
    """Logits [V] after masks, bias and penalties, float64, minus infinity where banned."""
    x = logits.astype(np.float64)
    if params.allowed is not None:
        x[[i for i in range(x.size) if i not in params.allowed]] = -np.inf
    for word in params.bad_words:
        prefix = word[:-1]
        if len(prefix) <= len(params.output) and params.output[len(params.output) - len(prefix) :] == prefix:
            x[word[-1]] = -np.inf
    if len(params.output) < params.min_tokens:
        x[list(params.stop_ids)] = -np.inf
    for token_id, bias in params.logit_bias.items():
        x[token_id] += bias
    for token_id in set(params.prompt) | set(params.output):
        penalty = params.repetition_penalty
        x[token_id] = x[token_id] / penalty if x[token_id] > 0 else x[token_id] * penalty
    for token_id in set(params.output):
        x[token_id] -= params.frequency_penalty * params.output.count(token_id) + params.presence_penalty
    return x


def kept(logits: np.ndarray, params: Params, slack: float = 0.0) -> np.ndarray:
    """Which tokens [V] of a random row can be drawn. `slack` widens every rule a little (narrows it if negative), to
    tell the tokens whose place is a matter of rounding."""
    scaled = processed_logits(logits, params) / params.temperature
    largest = scaled.max()
    keep = np.isfinite(scaled)
    if params.min_p > 0:
        keep &= (scaled >= largest + np.log(params.min_p) - slack) | (scaled == largest)
    if 0 < params.top_k < scaled.size:
        threshold = np.sort(scaled)[-params.top_k]
        keep &= (scaled >= threshold - slack) | (scaled == threshold)
    if params.top_p < 1:
        weights = np.where(keep, np.exp(scaled - largest), 0.0)
        # A token stays while the tokens that are likelier than it hold less than top_p.
        likelier = np.array([weights[scaled > value].sum() for value in scaled]) / weights.sum()
        keep &= (likelier < params.top_p + slack) | (scaled == largest)
    return keep


def probabilities(logits: np.ndarray, params: Params) -> np.ndarray:
    """The distribution [V] that a random row is drawn from."""
    scaled = np.where(kept(logits, params), processed_logits(logits, params) / params.temperature, -np.inf)
    weights = np.exp(scaled - scaled.max())
    return weights / weights.sum()


def pack(
    params: list[Params],
    vocab_size: int,
    *,
    positions: list[int] | None = None,
    max_len: int = 24,
    num_bias: int = 4,
    num_stops: int = 3,
    num_bad_words: int = 3,
    max_bad_word: int = 4,
    garbage: int = 7,
) -> SamplingRows:
    """The rows as the op takes them; the unused end of the history holds the token `garbage`."""
    num_rows = len(params)
    history = np.full((num_rows, max_len), garbage, np.int32)
    bias_ids, bias_values = np.full((num_rows, num_bias), -1, np.int32), np.zeros((num_rows, num_bias), np.float32)
    stop_ids = np.full((num_rows, num_stops), -1, np.int32)
    bad_words = np.full((num_rows, num_bad_words, max_bad_word), -1, np.int32)
    allowed = np.zeros((num_rows, -(-vocab_size // 32) * 32), bool)
    for row, p in enumerate(params):
        tokens = p.prompt + p.output
        history[row, : len(tokens)] = tokens
        bias_ids[row, : len(p.logit_bias)] = list(p.logit_bias)
        bias_values[row, : len(p.logit_bias)] = list(p.logit_bias.values())
        stop_ids[row, : len(p.stop_ids)] = p.stop_ids
        for word_idx, word in enumerate(p.bad_words):
            bad_words[row, word_idx, max_bad_word - len(word) :] = word
        allowed[row, list(range(vocab_size) if p.allowed is None else p.allowed)] = True
    mask = np.packbits(allowed.reshape(num_rows, -1, 32), axis=2, bitorder="little").view("<u4")[..., 0]

    def floats(name: str) -> jnp.ndarray:
        return jnp.asarray([getattr(p, name) for p in params], jnp.float32)

    def ints(values: list[int]) -> jnp.ndarray:
        return jnp.asarray(values, jnp.int32)

    prompt_len = [len(p.prompt) for p in params]
    num_tokens = [len(p.prompt) + len(p.output) for p in params]
    return SamplingRows(
        temperature=floats("temperature"),
        key=jnp.asarray(np.stack([seed_key(p.seed) for p in params])),
        position=ints(num_tokens if positions is None else positions),
        top_k=ints([p.top_k for p in params]),
        top_p=floats("top_p"),
        min_p=floats("min_p"),
        repetition_penalty=floats("repetition_penalty"),
        presence_penalty=floats("presence_penalty"),
        frequency_penalty=floats("frequency_penalty"),
        history=jnp.asarray(history),
        prompt_len=ints(prompt_len),
        num_tokens=ints(num_tokens),
        bias_ids=jnp.asarray(bias_ids),
        bias_values=jnp.asarray(bias_values),
        allowed_mask=jnp.asarray(mask, jnp.uint32),
        min_tokens=ints([p.min_tokens for p in params]),
        stop_ids=jnp.asarray(stop_ids),
        bad_words=jnp.asarray(bad_words),
    )
