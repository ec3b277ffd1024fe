"""Paged attention by NKI kernels: what XLA computes around them, and how they are launched.

XLA expands block tables to the place of every key, so that one gather fetches token rows whatever the block size is, and makes the additive
mask, so that windows may differ from layer to layer without another kernel. The kernels are in nki_kernels.py.

Missing before it can be registered in `kernels/ops.py`: a Neuron backend to choose it for, its self-test at start (the
kernel against the reference on random data, as nothing here has run on a device), and a launch over several devices' heads, for
which `launch` is called under the step's shard_map as it is.

R rows, W queries per row, N query heads, K key/value heads, G = N / K, H head_dim, M blocks per row, T tokens; S keys, padded to whole
gathers.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from quire.kernels.nki import load_emulated, simulate
from quire.kernels.op import OpContext
from quire.kernels.paged_attention.contract import StepPlaces

KERNELS = "quire.kernels.paged_attention.nki_kernels"
KEYS_PER_GATHER = 128
MAX_QUERIES = 128  # per key/value head: they lie on partitions
MAX_HEAD_DIM = 512  # of an output in one bank of PSUM
# Finite, since a transpose on NeuronCore-v2 multiplies by zeros. It absorbs any score it is added to.
MASKED = -1.0e30

Launch = Callable[[str, jax.ShapeDtypeStruct, tuple[Any, ...]], jax.Array]
"""Runs a kernel of nki_kernels.py by name: the result's shape and dtype, and the kernel's arguments."""


def on_device(name: str, result: jax.ShapeDtypeStruct, arguments: tuple[Any, ...]) -> jax.Array:
    """Launches by AWS's package, inside a step that is being traced. Raises ImportError where it is not installed."""
    nki = importlib.import_module("nki")
    return nki.jit(getattr(importlib.import_module(KERNELS), name))(*arguments)


def on_emulator(generation: str) -> Launch:
    """Launches by the emulator, which the step calls back to."""

    def launch(name: str, result: jax.ShapeDtypeStruct, arguments: tuple[Any, ...]) -> jax.Array:
        arrays = [argument for argument in arguments if isinstance(argument, jax.Array)]
        constants = arguments[len(arrays) :]

        def run(*values: Any) -> np.ndarray:
            kernel = getattr(load_emulated(KERNELS), name)
            return simulate(kernel, *map(np.asarray, values), *constants, generation=generation).output

        return jax.pure_callback(run, result, *arrays)

    return launch


def refuses(context: OpContext, width: int = 1) -> str | None:
    """Why the kernels cannot serve a model with `width` queries per row, or None."""
    queries = context.num_heads // context.num_kv_heads * width
    if context.dtype not in ("bfloat16", "float16", "float32"):
        return f"the cache is {context.dtype} and TensorE multiplies floats"
    if queries > MAX_QUERIES:
        return f"{queries} queries per key/value head, and {MAX_QUERIES} partitions"
    parts = -(-context.head_dim // KEYS_PER_GATHER)
    if context.head_dim > MAX_HEAD_DIM or context.head_dim % parts:
        return f"head_dim {context.head_dim} is no multiple of {parts} parts, or above {MAX_HEAD_DIM}"
    return None


def write_kv(
    kv_cache: jax.Array, k_new: jax.Array, v_new: jax.Array, places: StepPlaces, *, launch: Launch = on_device
) -> jax.Array:
    """See `contract.WriteKV`, for a `TokenMajor` cache; padding is not written at all."""
    num_tokens = k_new.shape[0]
    num_blocks, block_size = kv_cache.shape[:2]
    kv_new = jnp.stack([k_new, v_new], axis=2).reshape(num_tokens, -1).astype(kv_cache.dtype)  # [T, 2K * H]
    # Padding shares places of the null block, and which of several rows a scatter leaves in one place is not documented.
    is_real = jnp.concatenate(
        [(jnp.arange(rows.width)[None, :] < rows.query_lens[:, None]).reshape(-1) for rows in places.rectangles]
    )
    slots = jnp.where(is_real, places.write_blocks * block_size + places.write_offsets, num_blocks * block_size)
    result = jax.ShapeDtypeStruct(kv_cache.shape, kv_cache.dtype)
    return launch("write_kv", result, (kv_cache, kv_new, slots.astype(jnp.int32)))


def paged_attention(
    q: jax.Array,
    kv_cache: jax.Array,
    block_tables: jax.Array,
    seq_lens: jax.Array,
    query_lens: jax.Array,
    *,
    scale: float,
    sliding_window: int | jax.Array | None = None,
    soft_cap: float | None = None,
    launch: Launch = on_device,
) -> jax.Array:
    """See `contract.PagedAttention`, for a `TokenMajor` cache of q's dtype."""
    rows, width, num_heads, head_dim = q.shape
    num_blocks, block_size, num_heads_twice, _ = kv_cache.shape
    num_kv_heads = num_heads_twice // 2
    group = num_heads // num_kv_heads
    seen = _seen(width, block_tables.shape[1] * block_size, seq_lens, query_lens, sliding_window)  # [R, W, S]
    slots = _slots(block_tables, block_size, seen.any(axis=1), num_blocks * block_size)  # [R, S]
    mask = jnp.where(seen, 0.0, MASKED).astype(jnp.float32)
    grouped = q.reshape(rows, width, num_kv_heads, group, head_dim).transpose(0, 2, 4, 3, 1)  # [R, K, H, G, W]
    grouped = grouped.reshape(rows, num_kv_heads, head_dim, group * width)
    result = jax.ShapeDtypeStruct((rows, num_kv_heads, group * width, head_dim), q.dtype)
    out = launch("decode_attention", result, (grouped, kv_cache, slots, mask, float(scale), float(soft_cap or 0.0)))
    out = out.reshape(rows, num_kv_heads, group, width, head_dim).transpose(0, 3, 1, 2, 4)  # [R, W, K, G, H]
    return out.reshape(rows, width, num_heads, head_dim)


def _seen(
    width: int, num_keys: int, seq_lens: jax.Array, query_lens: jax.Array, sliding_window: int | jax.Array | None
) -> jax.Array:
    """[R, W, S]: which keys each query sees; S is `num_keys` rounded up to whole gathers."""
    num_keys = -(-num_keys // KEYS_PER_GATHER) * KEYS_PER_GATHER
    key_idx = jnp.arange(num_keys, dtype=jnp.int32)[None, None, :]
    positions = (seq_lens - query_lens)[:, None] + jnp.arange(width, dtype=jnp.int32)[None, :]  # [R, W]
    distance = positions[:, :, None] - key_idx
    seen = (distance >= 0) & (key_idx < seq_lens[:, None, None])
    return seen if sliding_window is None else seen & (distance < sliding_window)


def _slots(block_tables: jax.Array, block_size: int, is_seen: jax.Array, outside: int) -> jax.Array:
    """[R, S] int32: the place of each key that is seen, `outside` for the others."""
    slots = block_tables[:, :, None] * block_size + jnp.arange(block_size, dtype=jnp.int32)[None, None, :]
    slots = slots.reshape(block_tables.shape[0], -1)
    slots = jnp.pad(slots, ((0, 0), (0, is_seen.shape[1] - slots.shape[1])), constant_values=outside)
    return jnp.where(is_seen, slots, outside).astype(jnp.int32)
