"""The sampling op in plain jnp: everything between logits and a token, without sort, cumulative sum or variadic reduce.

The order of operations is that of vLLM's V1 sampler: raw logprobs; allowed tokens, bad words and min_tokens;
logit_bias; repetition, frequency and presence penalties; temperature; min_p; top_k; top_p over what those left; the
largest of logits / temperature + Gumbel noise. Rows with temperature 0 stop before the temperature and take the largest
logit.

Shapes: R rows of logits, V tokens of the vocabulary, k logprobs asked for.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from quire.kernels.sampling.logits import MASKED, process_logits
from quire.kernels.sampling.noise import gumbel, position_key
from quire.kernels.sampling.rows import Logprobs, SampleOutput, SamplingMode, SamplingRows
from quire.kernels.sampling.threshold import top_k_threshold, top_p_threshold

# Keeps logits / temperature finite. vLLM takes temperatures below this for greedy ones.
_MIN_TEMPERATURE = np.float32(1e-5)
# Where min_p is off its logarithm is not used, and must only be finite; the threshold is then below every logit.
_MIN_MIN_P = np.float32(1e-30)
_LOWEST = np.finfo(np.float32).min
# Values whose maximum is taken first when the index of a row's largest value is looked for.
_GROUP = 128


def sample(
    logits: jax.Array,
    rows: SamplingRows | None,
    *,
    mode: SamplingMode,
    num_logprobs: int,
    is_used: jax.Array | None = None,
) -> SampleOutput:
    """Sample one token per row, used or not: logits [R, V] float32 -> token ids [R] int32 in [0, V).

    `mode` and `num_logprobs` are static. `rows` may be None in GREEDY, and must hold every field in FULL. Logprobs are
    computed only in FULL with `num_logprobs` above 0, from the logits as they came in.
    """
    if mode < SamplingMode.FULL:
        return SampleOutput(token_ids=first_argmax(_plain_scores(logits, rows, mode, 0)))
    assert rows is not None, "full sampling needs rows"
    token_ids = first_argmax(_add_noise(filter_logits(logits, rows), rows))
    return SampleOutput(token_ids, compute_logprobs(logits, token_ids, num_logprobs) if num_logprobs > 0 else None)


def best_of_part(
    logits: jax.Array, rows: SamplingRows | None, *, mode: SamplingMode, first_token: jax.Array | int, vocab_size: int
) -> tuple[jax.Array, jax.Array]:
    """What `sample`, GREEDY or RANDOM, prefers among some of the tokens.

    logits [R, n] float32 are those of the tokens from `first_token` on, and padding from `vocab_size` on -> (score [R]
    float32, token id [R] int32). The best of all parts' bests, the first of equals, is the token that `sample` gives.
    """
    scores = _plain_scores(logits, rows, mode, first_token)
    ids = first_token + jnp.arange(logits.shape[1], dtype=jnp.int32)
    scores = jnp.where((ids < vocab_size)[None, :], scores, _LOWEST)
    best = first_argmax(scores)
    return jnp.take_along_axis(scores, best[:, None], axis=1)[:, 0], first_token + best


def _plain_scores(
    logits: jax.Array, rows: SamplingRows | None, mode: SamplingMode, first_token: jax.Array | int
) -> jax.Array:
    """What the drawn token is the largest of, where nothing but temperature and noise is asked for; [R, n] like logits."""
    if mode == SamplingMode.GREEDY:
        return logits
    assert rows is not None, "random sampling needs rows"
    return _add_noise(logits / _temperature(rows)[:, None], rows, first_token)


def filter_logits(logits: jax.Array, rows: SamplingRows) -> jax.Array:
    """The logits whose softmax a FULL row is drawn from: [R, V] float32, `MASKED` or lower where a token cannot be drawn.

    Greedy rows stop after masks, bias and penalties. A row that bans every token has no token to prefer and gives the
    first.
    """
    scaled = process_logits(logits, rows) / _temperature(rows)[:, None]
    return jnp.where(_kept(scaled, rows), scaled, MASKED)


def first_argmax(x: jax.Array) -> jax.Array:
    """The index of the largest value of each row, the first of equals: x [R, V] float32 -> [R] int32.

    A row with a NaN, which equals nothing, gives V - 1, so that the index is always one of the row.
    """
    num_rows, num_values = x.shape
    if num_values % _GROUP:
        return _first_equal(x, jnp.max(x, axis=1))
    # One pass over the row finds the largest value of every group; the rest looks at one group only.
    groups = x.reshape(num_rows, num_values // _GROUP, _GROUP)
    group_max = jnp.max(groups, axis=2)  # [R, V / _GROUP]
    largest = jnp.max(group_max, axis=1)
    group_idx = _first_equal(group_max, largest)
    group = jnp.take_along_axis(groups, group_idx[:, None, None], axis=1)[:, 0]  # [R, _GROUP]
    return group_idx * np.int32(_GROUP) + _first_equal(group, largest)


def _first_equal(x: jax.Array, value: jax.Array) -> jax.Array:
    """The first index at which a row of x [R, N] equals its value [R], or N - 1: [R] int32."""
    num_values = x.shape[1]
    idx = lax.broadcasted_iota(jnp.int32, x.shape, 1).astype(jnp.float32)
    # XLA:CPU reduces floats in half the time of integers; indices are exact in both.
    first = jnp.min(jnp.where(x == value[:, None], idx, np.float32(num_values - 1)), axis=1)
    return first.astype(jnp.int32)


def compute_logprobs(logits: jax.Array, token_ids: jax.Array, k: int) -> Logprobs:
    """Log-probabilities of the given tokens and of the k likeliest: logits [R, V] float32, token_ids [R] int32 in
    [0, V), k static. Both kinds are the same difference of the same floats, so equal tokens have equal bits."""
    largest = jnp.max(logits, axis=1, keepdims=True)
    log_sum = jnp.log(jnp.sum(jnp.exp(logits - largest), axis=1, keepdims=True))
    chosen = jnp.take_along_axis(logits, jnp.clip(token_ids, 0, logits.shape[1] - 1)[:, None], axis=1)  # [R, 1]
    num_larger = jnp.sum((logits > chosen).astype(jnp.float32), axis=1)
    top_logits, top_ids = lax.top_k(logits, k)  # [R, k]
    return Logprobs(
        token_logprobs=(chosen - largest - log_sum)[:, 0],
        token_ranks=num_larger.astype(jnp.int32) + np.int32(1),
        top_ids=top_ids,
        top_logprobs=top_logits - largest - log_sum,
    )


def _is_random(rows: SamplingRows) -> jax.Array:
    return rows.temperature > 0


def _temperature(rows: SamplingRows) -> jax.Array:
    """The divisor of each row's logits: 1 for greedy rows, never so small that a quotient overflows. [R] float32."""
    return jnp.where(_is_random(rows), jnp.maximum(rows.temperature, _MIN_TEMPERATURE), np.float32(1))


def _add_noise(scaled: jax.Array, rows: SamplingRows, first_token: jax.Array | int = 0) -> jax.Array:
    """Gumbel noise on the rows that are sampled: the largest of the sums is a draw from softmax(scaled).

    Columns are the tokens from `first_token` on.
    """
    ids = first_token + jnp.arange(scaled.shape[1], dtype=jnp.int32)
    noise = gumbel(position_key(rows.key, rows.position), ids)
    return jnp.where(_is_random(rows)[:, None], scaled + noise, scaled)


def _kept(scaled: jax.Array, rows: SamplingRows) -> jax.Array:
    """Whether min_p, top_k and top_p leave a token in: scaled [R, V] float32 -> [R, V] bool. The largest always stays.

    All three keep the tokens from some value upwards, so min_p and top_k are one comparison with the higher value.
    """
    vocab_size = scaled.shape[1]
    largest = jnp.max(scaled, axis=1)
    min_p_threshold = jnp.where(rows.min_p > 0, largest + jnp.log(jnp.clip(rows.min_p, _MIN_MIN_P, 1)), _LOWEST)
    top_k = jnp.where(rows.top_k > 0, jnp.minimum(rows.top_k, vocab_size), np.int32(vocab_size))
    lowest = jnp.maximum(min_p_threshold, top_k_threshold(scaled, top_k))
    kept = scaled >= lowest[:, None]
    weights = jnp.where(kept, jnp.exp(scaled - largest[:, None]), np.float32(0))
    top_p = jnp.where(rows.top_p < 1, top_p_threshold(weights, rows.top_p), np.float32(0))
    return (kept & (weights >= top_p[:, None])) | ~_is_random(rows)[:, None]
