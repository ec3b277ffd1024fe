"""What the sampling op takes and gives: one entry per row of logits.

Shapes: R rows of logits, V tokens of the vocabulary, L places of history, B biased tokens, NS stop tokens,
NB bad words of at most LB tokens, k logprobs asked for.
"""

import enum
from typing import Any

import flax.struct
import jax

# The fields that only FULL reads are None below it; their type says what FULL sees.
_ABSENT: Any = None


class SamplingMode(enum.IntEnum):
    """Variants of the sampling program; each covers what the ones before it do, at a higher cost."""

    GREEDY = 0
    """The largest logit of every row, the first of equals."""
    RANDOM = 1
    """Temperature and noise where `temperature` is above 0, the largest logit elsewhere; nothing else."""
    FULL = 2
    """Every parameter, and logprobs."""


@flax.struct.dataclass
class SamplingRows:
    """The sampling parameters and the state of each row. GREEDY needs none, RANDOM the first three fields, FULL all.

    A place of a list that is not used holds -1. `num_tokens` counts the prompt and what was generated, without the
    token being sampled.
    """

    temperature: jax.Array  # [R] float32; 0 samples the largest logit
    key: jax.Array  # [R, 2] uint32; `seed_key` of the request's seed
    position: jax.Array  # [R] int32; index in the sequence of the token being sampled

    top_k: jax.Array = _ABSENT  # [R] int32; V or more, or 0 or less, keeps every token
    top_p: jax.Array = _ABSENT  # [R] float32; 1 keeps every token
    min_p: jax.Array = _ABSENT  # [R] float32; 0 keeps every token
    repetition_penalty: jax.Array = _ABSENT  # [R] float32; 1 is off; prompt and output tokens
    presence_penalty: jax.Array = _ABSENT  # [R] float32; 0 is off; output tokens
    frequency_penalty: jax.Array = _ABSENT  # [R] float32; 0 is off; output tokens
    history: jax.Array = _ABSENT  # [R, L] int32; prompt then output; anything from num_tokens on
    prompt_len: jax.Array = _ABSENT  # [R] int32
    num_tokens: jax.Array = _ABSENT  # [R] int32
    bias_ids: jax.Array = _ABSENT  # [R, B] int32
    bias_values: jax.Array = _ABSENT  # [R, B] float32
    allowed_mask: jax.Array = _ABSENT  # [R, ceil(V / 32)] uint32; bit i of word w allows token 32 w + i
    min_tokens: jax.Array = _ABSENT  # [R] int32; stop_ids are banned until so many tokens were generated
    stop_ids: jax.Array = _ABSENT  # [R, NS] int32
    bad_words: jax.Array = _ABSENT  # [R, NB, LB] int32; right-aligned, -1 on the left


@flax.struct.dataclass
class Logprobs:
    """Log-probabilities of the model's own distribution, before any sampling parameter."""

    token_logprobs: jax.Array  # [R] float32; of the chosen token
    token_ranks: jax.Array  # [R] int32; 1 + the number of tokens with a larger logit
    top_ids: jax.Array  # [R, k] int32; largest first, the smaller id first among equals
    top_logprobs: jax.Array  # [R, k] float32


@flax.struct.dataclass
class SampleOutput:
    """What a step sampled, and the log-probabilities where they were asked for."""

    token_ids: jax.Array  # [R] int32
    logprobs: Logprobs | None = None
