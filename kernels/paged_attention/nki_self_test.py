"""Whether the NKI kernels do on this very device what the reference does: asked at start, before they serve anybody.

The emulator models what is documented; a device has the last word. Both paths run compiled on jax's default device, on random data, for a
decode step and for a tile of a prompt, and are compared.
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from quire.kernels.op import OpContext
from quire.kernels.paged_attention import nki, reference
from quire.kernels.paged_attention.contract import RowsOfTokens, StepPlaces, TokenMajor

LARGEST_ERROR = {"bfloat16": 2e-2, "float16": 5e-3, "float32": 1e-4}
"""Of an element, relative to the largest of its row: each path rounds its weights once, and in another order."""
_NUM_BLOCKS = 12
_MAX_MESSAGE = 600


def self_test(context: OpContext, tile_size: int, launch: nki.Launch = nki.on_device) -> str | None:
    """Why the kernels are not to be used for a model, or None where they agree with the reference.

    Whatever goes wrong is the reason: a kernel that does not compile, one that fails, another result.
    """
    begin = time.perf_counter()
    for width, lens in ((1, (1, 2 * context.block_size + 3, 0)), (tile_size, (5, tile_size + context.block_size, 0))):
        try:
            reason = _compare(context, width, lens, launch)
        except Exception as error:  # compilers and runtimes raise what they like, and none of it may end the start
            said = " ".join(f"{type(error).__name__}: {error}".split())
            reason = f"they fail: {said[:_MAX_MESSAGE]}"
        if reason is not None:
            seconds = time.perf_counter() - begin
            return f"their self-test with {width} tokens a row found after {seconds:.1f} s that {reason}"
    return None


def _compare(context: OpContext, width: int, lens: tuple[int, ...], launch: nki.Launch) -> str | None:
    rng = np.random.default_rng(0)
    dtype = jnp.dtype(context.dtype)
    num_blocks = max(_NUM_BLOCKS, 1 + sum(-(-length // context.block_size) for length in lens))
    cache_shape = TokenMajor().shape(num_blocks, context.block_size, context.num_kv_heads, context.head_dim)
    cache = jnp.asarray(rng.standard_normal(cache_shape, np.float32), dtype)
    num_tokens = len(lens) * width
    q, k, v = (
        jnp.asarray(rng.standard_normal((num_tokens, heads, context.head_dim), np.float32), dtype)
        for heads in (context.num_heads, context.num_kv_heads, context.num_kv_heads)
    )
    places = _places(context.block_size, num_blocks, width, lens)
    outputs = []
    for write, attend in (
        (reference.write_kv, reference.paged_attention),
        (partial(nki.write_kv, launch=launch), partial(nki.paged_attention, launch=launch)),
    ):
        step: Any = jax.jit(partial(_step, write, attend, scale=context.head_dim**-0.5))
        outputs.append([np.asarray(x, np.float32) for x in step(cache, q, k, v, places)])
    (expected_cache, expected), (found_cache, found) = outputs
    # The null block holds what padding writes, which is without meaning.
    if not np.array_equal(expected_cache[1:], found_cache[1:]):
        wrong = np.argwhere((expected_cache[1:] != found_cache[1:]).any(axis=(2, 3)))
        return f"{len(wrong)} tokens of the cache differ, the first in block {wrong[0][0] + 1} at {wrong[0][1]}"
    for row, length in enumerate(lens):
        queries = min(length, width)
        error = np.abs(expected[row, :queries] - found[row, :queries]).max(initial=0)
        largest = np.abs(expected[row, :queries]).max(initial=0)
        if not error <= LARGEST_ERROR[context.dtype] * largest:
            return f"row {row} of {length} tokens differs by {error:.3g} where values reach {largest:.3g}"
    return None


def _step(write: Any, attend: Any, cache: Any, q: Any, k: Any, v: Any, places: StepPlaces, *, scale: float) -> Any:
    cache = write(cache, k, v, places)
    (rows,) = places.rectangles
    queries = q.reshape(-1, rows.width, *q.shape[1:])
    return cache, attend(queries, cache, rows.block_tables, rows.seq_lens, rows.query_lens, scale=scale)


def _places(block_size: int, num_blocks: int, width: int, lens: tuple[int, ...]) -> StepPlaces:
    """Each row's last tokens, up to `width`, are new; blocks are given out in a mixed order."""
    order = np.random.default_rng(1).permutation(np.arange(1, num_blocks, dtype=np.int32)).tolist()
    tables = np.zeros((len(lens), max(-(-length // block_size) for length in lens)), np.int32)
    blocks, offsets = np.zeros((2, len(lens), width), np.int32)
    for row, length in enumerate(lens):
        count = -(-length // block_size)
        tables[row, :count] = [order.pop() for _ in range(count)]
        new = np.arange(length - min(length, width), length)
        blocks[row, : len(new)] = tables[row, new // block_size]
        offsets[row, : len(new)] = new % block_size
    seq_lens = np.array(lens, np.int32)
    rows = RowsOfTokens(
        jnp.asarray(tables), jnp.asarray(seq_lens), jnp.asarray(np.minimum(seq_lens, width)), width=width
    )
    return StepPlaces(jnp.asarray(blocks.reshape(-1)), jnp.asarray(offsets.reshape(-1)), [rows])
