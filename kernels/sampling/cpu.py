"""The sampling op in C++, through jax.ffi: one call from logits to tokens, and to their logprobs.

The tokens are those of the reference, but where rounding decides: see `cpu.cc`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from quire.kernels.native.library import as_mask, load_library
from quire.kernels.sampling.rows import Logprobs, SampleOutput, SamplingMode, SamplingRows


def sample(
    instruction_set: str,
    logits: jax.Array,
    rows: SamplingRows | None,
    *,
    mode: SamplingMode,
    num_logprobs: int,
    is_used: jax.Array | None = None,
) -> SampleOutput:
    """`contract.Sample`; rows that are not used get token 0, and cost nothing."""
    used = as_mask(is_used)
    library = load_library(instruction_set)
    num_rows = logits.shape[0]
    token_ids = jax.ShapeDtypeStruct((num_rows,), jnp.int32)
    if mode == SamplingMode.GREEDY:
        return SampleOutput(jax.ffi.ffi_call(library.target("quire_argmax"), token_ids)(logits, used))
    assert rows is not None, f"{mode.name} sampling needs rows"
    if mode == SamplingMode.RANDOM:
        draw = jax.ffi.ffi_call(library.target("quire_draw"), token_ids)
        return SampleOutput(draw(logits, used, rows.temperature, rows.key, rows.position))
    num_top = min(num_logprobs, logits.shape[1])
    values = jax.ShapeDtypeStruct((num_rows,), jnp.float32)
    top_ids = jax.ShapeDtypeStruct((num_rows, num_top), jnp.int32)
    top_values = jax.ShapeDtypeStruct((num_rows, num_top), jnp.float32)
    with_logprobs = (token_ids, values, token_ids, top_ids, top_values)
    call = jax.ffi.ffi_call(library.target("quire_sample"), with_logprobs if num_top > 0 else (token_ids,))
    found = call(
        used,
        logits,
        rows.temperature,
        rows.key,
        rows.position,
        rows.top_k,
        rows.top_p,
        rows.min_p,
        rows.repetition_penalty,
        rows.presence_penalty,
        rows.frequency_penalty,
        rows.history,
        rows.prompt_len,
        rows.num_tokens,
        rows.bias_ids,
        rows.bias_values,
        rows.allowed_mask,
        rows.min_tokens,
        rows.stop_ids,
        rows.bad_words,
        num_logprobs=np.int64(num_top),
    )
    return SampleOutput(found[0], Logprobs(*found[1:]) if num_top > 0 else None)
