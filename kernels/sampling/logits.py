"""What requests do to their logits before the draw: masks, bias and penalties.

Scatters send whatever does not count to a column V of its own, never out of range.

Shapes: R rows of logits, V tokens of the vocabulary, L places of history, B biased tokens, NS stop tokens,
NB bad words of at most LB tokens.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from quire.kernels.sampling.rows import SamplingRows

# Finite stand-in for minus infinity: far below any logit, and still finite when divided by a temperature of 1e-5.
MASKED = np.float32(-1e30)


def process_logits(logits: jax.Array, rows: SamplingRows) -> jax.Array:
    """Logits [R, V] float32 after masks, bias and penalties; banned tokens hold `MASKED`. `rows` holds every field."""
    num_tokens_in_vocab = logits.shape[1]
    added = _bias_and_bans(rows, num_tokens_in_vocab)
    banned = (added < MASKED * np.float32(0.5)) | ~_unpack_mask(rows.allowed_mask, num_tokens_in_vocab)
    return jnp.where(banned, MASKED, _penalize(jnp.maximum(logits, MASKED) + added, rows))


def _bias_and_bans(rows: SamplingRows, vocab_size: int) -> jax.Array:
    """What is added to each logit: the bias, and `MASKED` for every reason to ban it. [R, V] float32."""
    stops, words = _banned_stops(rows), _banned_words(rows)
    token_ids = jnp.concatenate([rows.bias_ids, stops, words], axis=1)  # [R, B + NS + NB]
    bans = jnp.full((stops.shape[0], stops.shape[1] + words.shape[1]), MASKED, jnp.float32)
    values = jnp.concatenate([rows.bias_values, bans], axis=1)
    row_idx = _row_idx(token_ids)
    added = jnp.zeros((token_ids.shape[0], vocab_size + 1), jnp.float32)
    return added.at[row_idx, _sink(token_ids, vocab_size)].add(values)[:, :vocab_size]


def _banned_stops(rows: SamplingRows) -> jax.Array:
    """Stop tokens that would end a row too early, -1 for the others: [R, NS] int32."""
    too_early = rows.num_tokens - rows.prompt_len < rows.min_tokens
    return jnp.where(too_early[:, None], rows.stop_ids, np.int32(-1))


def _banned_words(rows: SamplingRows) -> jax.Array:
    """The last token of each bad word that the row's output is one token short of, else -1: [R, NB] int32.

    As in vLLM, a word's beginning is looked for in the output only: one that began in the prompt may be completed.
    """
    num_prefix = rows.bad_words.shape[2] - 1
    if num_prefix == 0:
        return rows.bad_words[:, :, 0]
    offsets = jnp.arange(-num_prefix, 0, dtype=jnp.int32)[None, :]
    places = rows.num_tokens[:, None] + offsets  # [R, LB - 1]
    latest = jnp.take_along_axis(rows.history, jnp.clip(places, 0, rows.history.shape[1] - 1), axis=1)
    in_output = places >= rows.prompt_len[:, None]
    prefix = rows.bad_words[:, :, :-1]  # [R, NB, LB - 1]
    matches = (prefix < 0) | ((prefix == latest[:, None, :]) & in_output[:, None, :])
    return jnp.where(jnp.all(matches, axis=2), rows.bad_words[:, :, -1], np.int32(-1))


def _penalize(logits: jax.Array, rows: SamplingRows) -> jax.Array:
    """Repetition penalty over prompt and output, frequency and presence penalties over the output."""
    in_prompt, num_in_output = _counts(rows, logits.shape[1])
    seen = (in_prompt > 0) | (num_in_output > 0)
    repetition = jnp.where(seen, rows.repetition_penalty[:, None], np.float32(1))
    logits = jnp.where(logits > 0, logits / repetition, logits * repetition)
    for part in _parts(rows.frequency_penalty):
        logits = logits - part[:, None] * num_in_output
    return logits - rows.presence_penalty[:, None] * (num_in_output > 0).astype(jnp.float32)


def _parts(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Three floats of 8 significant bits each, whose sum is x [R] float32 exactly.

    Their products with whole numbers below 2**16 are exact, so it does not matter whether a compiler multiplies and subtracts in one
    rounding or in two. It may do both, where it computes the same logits for several users: then the largest of them could lie below
    its own threshold, and nothing would be kept.
    """
    high = _leading_bits(x)
    middle = _leading_bits(x - high)
    return high, middle, x - high - middle


def _leading_bits(x: jax.Array) -> jax.Array:
    """x without the last 16 bits of its mantissa."""
    bits = lax.bitcast_convert_type(x, jnp.uint32) & np.uint32(0xFFFF0000)
    return lax.bitcast_convert_type(bits, jnp.float32)


def _counts(rows: SamplingRows, vocab_size: int) -> tuple[jax.Array, jax.Array]:
    """How often each token stands in the prompt and in the output, both [R, V] float32 (whole numbers)."""
    num_rows, max_len = rows.history.shape
    places = jnp.arange(max_len, dtype=jnp.int32)[None, :]
    token_ids = jnp.where(places < rows.num_tokens[:, None], rows.history, np.int32(-1))
    in_output = (places >= rows.prompt_len[:, None]).astype(jnp.int32)  # [R, L]
    counts = jnp.zeros((num_rows, 2, vocab_size + 1), jnp.float32)
    # One scatter for both: a place belongs either to the prompt or to the output.
    counts = counts.at[_row_idx(token_ids), in_output, _sink(token_ids, vocab_size)].add(np.float32(1))
    return counts[:, 0, :vocab_size], counts[:, 1, :vocab_size]


def _unpack_mask(mask: jax.Array | None, vocab_size: int) -> jax.Array:
    """The bits of [R, ceil(V / 32)] uint32 as [R, V] bool."""
    assert mask is not None
    bits = (mask[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)[None, None, :]) & np.uint32(1)
    return bits.reshape(mask.shape[0], -1)[:, :vocab_size] != 0


def _sink(token_ids: jax.Array, vocab_size: int) -> jax.Array:
    """Token ids outside the vocabulary, -1 among them, sent to column V."""
    # Read as unsigned, negative ones are the largest of all.
    unsigned = lax.bitcast_convert_type(token_ids, jnp.uint32)
    return jnp.minimum(unsigned, np.uint32(vocab_size)).astype(jnp.int32)


def _row_idx(like: jax.Array) -> jax.Array:
    return lax.broadcasted_iota(jnp.int32, like.shape, 0)
