"""Sampling: everything between logits and a token, on the device, for every row of a mixed batch."""

from quire.kernels.sampling.noise import gumbel, position_key, seed_key
from quire.kernels.sampling.reference import compute_logprobs, first_argmax, sample
from quire.kernels.sampling.rows import Logprobs, SampleOutput, SamplingMode, SamplingRows

__all__ = [
    "Logprobs",
    "SampleOutput",
    "SamplingMode",
    "SamplingRows",
    "compute_logprobs",
    "first_argmax",
    "gumbel",
    "position_key",
    "sample",
    "seed_key",
]
