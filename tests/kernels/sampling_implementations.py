"""The implementations of the sampling op that this machine can run, each compiled as the step compiles it."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from quire.backends.environment import cpu_flags
from quire.kernels.op import OpContext
from quire.kernels.ops import REFERENCE, SAMPLE

# The sampler looks at the platform and the processor alone.
CONTEXT = OpContext(
    platform=jax.default_backend(),
    device_kind="cpu",
    dtype="float32",
    num_heads=1,
    num_kv_heads=1,
    head_dim=1,
    block_size=1,
    instruction_sets=cpu_flags(),
)
AVAILABLE = {
    implementation.name: implementation.function
    for implementation in SAMPLE.implementations
    if implementation.refuses(CONTEXT) is None
}
NAMES = tuple(AVAILABLE)
NATIVE = tuple(name for name in NAMES if name != REFERENCE)


@functools.cache
def compiled(name: str) -> Callable[..., Any]:
    """The op `(logits, rows, *, mode, num_logprobs)` of one implementation."""
    return jax.jit(AVAILABLE[name], static_argnames=("mode", "num_logprobs"))
