"""Paged attention by NKI kernels: what XLA computes around them, and how they are launched.

XLA expands block tables to the place of every key, so that one gather fetches token rows whatever the block size is, and gives each
query the bounds of what it sees, so that windows may differ from layer to layer without another kernel. The kernels are in
nki_kernels.py.

Missing before it can be registered in `kernels/ops.py`: a Neuron backend to choose it for, its self-test at start (the
kernel against the reference on random data, as nothing here has run on a device), and a launch over several devices' heads, for
which `launch` is called under the step's shard_map as it is.

R rows, W queries per row, N query heads, K key/value heads, G = N / K, H head_dim, M blocks per row, T tokens; S keys, padded to whole
gathers; Q and P as in nki_kernels.py.
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
MAX_GATHERS = 4  # of a tile: 512 float32 scores are a bank of PSUM
SBUF_FOR_KEYS = 128 * 1024  # of the 192 KiB per partition that NeuronCore-v2 has

Launch = Callable[[str, jax.ShapeDtypeStruct, tuple[Any, ...]], jax.Array]
"""Runs a kernel of nki_kernels.py by name: the result's shape and dtype, and the kernel's arguments."""


def on_device(name: str, result: jax.ShapeDtypeStruct, arguments: tuple[Any, ...]) -> jax.Array:
    """Launches by AWS's package, inside a step that is being traced. Raises ImportError where it is not installed."""
    nki = importlib.import_module("nki")
    return nki.jit(getattr(importlib.import_module(KERNELS), name))(*arguments)


def through_callback(simulator: Callable[..., np.ndarray]) -> Launch:
    """Launches by a simulator on the host, which the step calls back to: given a kernel's name, its arrays and its constants."""

    def launch(name: str, result: jax.ShapeDtypeStruct, arguments: tuple[Any, ...]) -> jax.Array:
        arrays = [argument for argument in arguments if isinstance(argument, jax.Array)]
        constants = arguments[len(arrays) :]
        return jax.pure_callback(lambda *values: simulator(name, *map(np.asarray, values), *constants), result, *arrays)

    return launch


def on_emulator(generation: str) -> Launch:
    """Launches by the emulator."""

    def simulator(name: str, *arguments: Any) -> np.ndarray:
        return simulate(getattr(load_emulated(KERNELS), name), *arguments, generation=generation).output

    return through_callback(simulator)


def refuses(context: OpContext, width: int = 1) -> str | None:
    """Why the kernels cannot serve a model with `width` queries per row, or None."""
    queries = context.num_heads // context.num_kv_heads * width
    if context.dtype not in ("bfloat16", "float16", "float32"):
        return f"the cache is {context.dtype} and TensorE multiplies floats"
    if queries > MAX_QUERIES:
        return f"{queries} queries per key/value head, and {MAX_QUERIES} partitions"
    parts = _parts(context.head_dim)
    if context.head_dim > MAX_HEAD_DIM or context.head_dim % parts:
        return f"head_dim {context.head_dim} is no multiple of {parts} parts, or above {MAX_HEAD_DIM}"
    token_bytes = 2 * context.num_kv_heads * context.head_dim * jnp.dtype(context.dtype).itemsize
    if not _gathers_per_tile(token_bytes):
        return f"two tiles of {token_bytes} B per token do not fit into the {SBUF_FOR_KEYS} B of SBUF that are for them"
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
    first, end = _bounds(width, seq_lens, query_lens, sliding_window)  # [R, W] each
    num_keys = _round_up(block_tables.shape[1] * block_size, KEYS_PER_GATHER)
    slots = _slots(block_tables, block_size, num_keys, num_blocks * block_size, first.min(axis=1), end.max(axis=1))
    lane = _lane(group * width)
    grouped = _queries(q, num_kv_heads, lane)  # [R, h, H / h, K, Q]
    heads_per_group = min(MAX_QUERIES // lane, num_kv_heads)
    bounds = jnp.stack([_on_lanes(bound, group, lane, heads_per_group) for bound in (first, end)], axis=2)  # [R, P, 2]
    token_bytes = num_heads_twice * head_dim * q.dtype.itemsize
    result = jax.ShapeDtypeStruct((rows, num_kv_heads * lane, head_dim), q.dtype)
    constants = (float(scale), float(soft_cap or 0.0), sliding_window is not None, _gathers_per_tile(token_bytes))
    out = launch("decode_attention", result, (grouped, kv_cache, slots, bounds, *constants))
    out = out.reshape(rows, num_kv_heads, lane, head_dim)[:, :, : group * width]
    out = out.reshape(rows, num_kv_heads, group, width, head_dim).transpose(0, 3, 1, 2, 4)  # [R, W, K, G, H]
    return out.reshape(rows, width, num_heads, head_dim)


def _queries(q: jax.Array, num_kv_heads: int, lane: int) -> jax.Array:
    """[R, h, H / h, K, Q] of q [R, W, N, H]: what one partition holds of a row lies together."""
    rows, width, num_heads, head_dim = q.shape
    group, parts = num_heads // num_kv_heads, _parts(head_dim)
    split = q.reshape(rows, width, num_kv_heads, group, parts, head_dim // parts).transpose(0, 5, 4, 2, 3, 1)
    split = split.reshape(rows, head_dim // parts, parts, num_kv_heads, group * width)
    return jnp.pad(split, ((0, 0), (0, 0), (0, 0), (0, 0), (0, lane - group * width)))


def _bounds(
    width: int, seq_lens: jax.Array, query_lens: jax.Array, sliding_window: int | jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """[R, W] int32: the first key that each query sees, and the one after the last. Padding sees what the last token does."""
    positions = (seq_lens - query_lens)[:, None] + jnp.arange(width, dtype=jnp.int32)[None, :]
    positions = jnp.minimum(positions, seq_lens[:, None] - 1)
    first = jnp.zeros_like(positions)
    return first if sliding_window is None else jnp.maximum(positions - sliding_window + 1, 0), positions + 1


def _slots(
    block_tables: jax.Array, block_size: int, num_keys: int, outside: int, first: jax.Array, end: jax.Array
) -> jax.Array:
    """[R, 128, S / 128] int32: the place of each key from `first` up to `end` [R], `outside` for the others."""
    slots = block_tables[:, :, None] * block_size + jnp.arange(block_size, dtype=jnp.int32)[None, None, :]
    slots = slots.reshape(block_tables.shape[0], -1)
    slots = jnp.pad(slots, ((0, 0), (0, num_keys - slots.shape[1])), constant_values=outside)
    key_idx = jnp.arange(num_keys, dtype=jnp.int32)[None, :]
    slots = jnp.where((key_idx >= first[:, None]) & (key_idx < end[:, None]), slots, outside).astype(jnp.int32)
    return slots.reshape(slots.shape[0], -1, KEYS_PER_GATHER).transpose(0, 2, 1)


def _on_lanes(bound: jax.Array, group: int, lane: int, heads_per_group: int) -> jax.Array:
    """[R, P] float32 of a bound [R, W]: for each of G heads, padded to Q, for each key/value head of a group. Exact below 2^24 keys."""
    of_head = jnp.tile(bound, (1, group))
    padded = jnp.pad(of_head, ((0, 0), (0, lane - of_head.shape[1])))
    return jnp.tile(padded, (1, heads_per_group)).astype(jnp.float32)


def _lane(num_queries: int) -> int:
    """Q: partitions that a key/value head's queries take, so that the next head's start where an instruction may."""
    return next(lane for lane in (32, 64, 128) if lane >= num_queries)


def _parts(head_dim: int) -> int:
    """In how many products a head_dim is contracted."""
    return -(-head_dim // 128)


def _gathers_per_tile(token_bytes: int) -> int:
    """As many as one bank of scores takes, or as two tiles of keys have room for; 0 where not even one has."""
    return min(MAX_GATHERS, SBUF_FOR_KEYS // (2 * token_bytes))


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
