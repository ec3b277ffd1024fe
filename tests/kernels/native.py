"""Which of the native kernels can run here, as parameters of tests. One that cannot is skipped, with the reason."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from quire.backends.environment import cpu_flags
from quire.kernels.native import library
from quire.kernels.op import OpContext

CONTEXT = OpContext(
    platform="cpu",
    device_kind="cpu",
    dtype="float32",
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    block_size=16,
    instruction_sets=cpu_flags(),
)
"""What every native kernel accepts, where its instruction set is there and its library is built."""


def needs(instruction_set: str) -> pytest.MarkDecorator:
    """Skips a test where the processor lacks the instruction set or its library is not built."""
    reason = library.refuses(instruction_set, CONTEXT)
    return pytest.mark.skipif(reason is not None, reason=f"{instruction_set}: {reason}")


EACH_INSTRUCTION_SET = [pytest.param(name, marks=needs(name)) for name in library.INSTRUCTION_SETS]


@contextmanager
def at_most_threads(instruction_set: str, count: int) -> Iterator[None]:
    """Ops use `count` threads at most, 0 for as many as there are, which is also what is left behind."""
    loaded = library.load_library(instruction_set)
    loaded.set_max_threads(count)
    try:
        yield
    finally:
        loaded.set_max_threads(0)
