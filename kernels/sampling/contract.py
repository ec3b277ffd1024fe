"""The contract of the sampling op: logits in, one token per row out, on the device."""

from __future__ import annotations

from typing import Protocol

import jax

from quire.kernels.sampling.rows import SampleOutput, SamplingMode, SamplingRows


class Sample(Protocol):
    """Every implementation gives the same tokens for the same logits and rows, see `reference.sample`; they may differ where
    the rounding of a logarithm, an exponential or a sum decides, about once in a million draws."""

    def __call__(
        self,
        logits: jax.Array,
        rows: SamplingRows | None,
        *,
        mode: SamplingMode,
        num_logprobs: int,
        is_used: jax.Array | None = None,
    ) -> SampleOutput:
        """Samples one token per row of `logits` [R, V] float32; `mode` and `num_logprobs` are static.

        A row that `is_used` [R] bool leaves out, whose logits may be anything, gets any token in [0, V) and any logprobs.
        """
        ...
