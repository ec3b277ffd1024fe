"""The ops of `contract` in C++, through jax.ffi: blocks are read where they lie, and written in place."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from quire.kernels.native.library import load_library
from quire.kernels.paged_attention.contract import StepPlaces, TokenMajor


@dataclass(frozen=True)
class NativeCache(TokenMajor):
    """`TokenMajor` in memory that takes no room before it is used, in huge pages."""

    instruction_set: str

    def allocate(self, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        """See `contract.CacheFormat`."""
        cache: jax.Array = _allocation(self.instruction_set, shape, dtype)()
        return cache


@functools.cache
def _allocation(instruction_set: str, shape: tuple[int, ...], dtype: Any) -> Callable[[], jax.Array]:
    """The program that allocates one layer's cache; all layers share it. Its side effect keeps it from being run just once."""
    target = load_library(instruction_set).target("quire_new_cache")
    return jax.jit(jax.ffi.ffi_call(target, jax.ShapeDtypeStruct(shape, dtype), has_side_effect=True))


def write_kv(
    instruction_set: str,
    kv_cache: jax.Array,
    k_new: jax.Array,
    v_new: jax.Array,
    places: StepPlaces,
) -> jax.Array:
    """`contract.WriteKV`."""
    call = jax.ffi.ffi_call(
        load_library(instruction_set).target("quire_write_kv"),
        jax.ShapeDtypeStruct(kv_cache.shape, kv_cache.dtype),
        input_output_aliases={0: 0},
    )
    written: jax.Array = call(kv_cache, k_new, v_new, places.write_blocks, places.write_offsets)
    return written


def paged_attention(
    instruction_set: str,
    q: jax.Array,
    kv_cache: jax.Array,
    block_tables: jax.Array,
    seq_lens: jax.Array,
    query_lens: jax.Array,
    *,
    scale: float,
    sliding_window: int | jax.Array | None = None,
    soft_cap: float | None = None,
) -> jax.Array:
    """`contract.PagedAttention`, with a window known when the program is traced."""
    assert not isinstance(sliding_window, jax.Array), "windows differ between scanned layers only, which are not native"
    call = jax.ffi.ffi_call(
        load_library(instruction_set).target("quire_paged_attention"), jax.ShapeDtypeStruct(q.shape, q.dtype)
    )
    out: jax.Array = call(
        q,
        kv_cache,
        block_tables,
        seq_lens,
        query_lens,
        scale=np.float32(scale),
        soft_cap=np.float32(soft_cap or 0.0),
        sliding_window=np.int64(sliding_window or 0),
    )
    return out
