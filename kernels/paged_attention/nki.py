"""Paged attention by NKI kernels: what XLA computes around them, and how they are launched.

XLA expands block tables to the place of every key, so that one gather fetches token rows whatever the block size is, and gives each
query the bounds of what it sees, so that windows may differ from layer to layer without another kernel. The kernels are in
nki_kernels.py, and how a call is cut for them in nki_plan.py.

Nothing here has run on a device, so the kernels refuse unless `OpContext.nki_self_test` says that they agreed with the reference there;
the self-test itself, which a backend is to run at start, is still missing.

Several devices' heads need nothing more: `launch` is called under the step's shard_map as it is.

R rows, W queries per row, N query heads, K key/value heads, G = N / K, H head_dim, M blocks per row, T tokens; S keys, padded to whole
gathers; E, P and Q as in nki_kernels.py.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from quire.kernels.errors import KernelUnavailableError
from quire.kernels.nki import load_emulated, official_nki, simulate
from quire.kernels.op import OpContext
from quire.kernels.paged_attention.contract import StepPlaces
from quire.kernels.paged_attention.nki_plan import KEYS_PER_GATHER, Model, Plan, plan_for, round_up

KERNELS = "quire.kernels.paged_attention.nki_kernels"
DTYPES = ("bfloat16", "float16", "float32")
MAX_HEAD_DIM = 512  # of an output in one bank of PSUM
MAX_CONTEXT = 2**18  # keys of a row that room is kept for when a model is judged before its context is known
MAX_EXACT = 2**24  # XLA's sums and products of integers may pass through float32 on a NeuronCore

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


def refuses(context: OpContext) -> str | None:
    """Why the kernels cannot be launched on the device of a context, or None; last of all, what their self-test said."""
    if context.platform != "neuron":
        return "needs a NeuronCore"
    package, reason = official_nki()
    if package is None:
        return reason
    return refuses_model(context) or context.nki_self_test


def refuses_model(context: OpContext) -> str | None:
    """Why the kernels cannot serve a model, wherever they run, or None."""
    if context.dtype not in DTYPES:
        return f"the cache is {context.dtype} and TensorE multiplies floats"
    if context.num_heads % context.num_kv_heads:
        return f"{context.num_heads} query heads are no multiple of the {context.num_kv_heads} key/value heads"
    model = Model(context.num_heads, context.num_kv_heads, context.head_dim, jnp.dtype(context.dtype).itemsize)
    if context.head_dim > MAX_HEAD_DIM or context.head_dim % model.num_parts:
        return f"head_dim {context.head_dim} is no multiple of {model.num_parts} parts, or above {MAX_HEAD_DIM}"
    if plan_for(model, width=1, num_keys=MAX_CONTEXT) is None:
        return f"one query per row and two gathers of {model.token_bytes} B per token do not fit into SBUF"
    return None


def write_kv(
    kv_cache: jax.Array, k_new: jax.Array, v_new: jax.Array, places: StepPlaces, *, launch: Launch = on_device
) -> jax.Array:
    """See `contract.WriteKV`, for a `TokenMajor` cache; padding is not written at all.

    Raises KernelUnavailableError where slots cannot be counted exactly, see `_slots_in`.
    """
    if kv_cache.dtype == jnp.uint16:
        return _as_bits(write_kv(_as_floats(kv_cache), k_new, v_new, places, launch=launch))
    num_tokens = k_new.shape[0]
    num_blocks, block_size = kv_cache.shape[:2]
    kv_new = jnp.stack([k_new, v_new], axis=2).reshape(num_tokens, -1).astype(kv_cache.dtype)  # [T, 2K * H]
    # Padding shares places of the null block, and which of several rows a scatter leaves in one place is not documented.
    is_real = jnp.concatenate(
        [(jnp.arange(rows.width)[None, :] < rows.query_lens[:, None]).reshape(-1) for rows in places.rectangles]
    )
    slots = _slots_in(places.write_blocks, places.write_offsets, num_blocks, block_size)
    slots = jnp.where(is_real, slots, num_blocks * block_size).astype(jnp.int32)
    return launch("write_kv", jax.ShapeDtypeStruct(kv_cache.shape, kv_cache.dtype), (kv_cache, kv_new, slots))


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
    """See `contract.PagedAttention`, for a `TokenMajor` cache of q's dtype or of its bits.

    Raises KernelUnavailableError where not even one query per row fits into SBUF, and as `_slots_in` does.
    """
    if kv_cache.dtype == jnp.uint16:
        kv_cache = _as_floats(kv_cache)
    num_rows, width, num_heads, head_dim = q.shape
    model = Model(num_heads, kv_cache.shape[2] // 2, head_dim, q.dtype.itemsize)
    num_keys = round_up(block_tables.shape[1] * kv_cache.shape[1], KEYS_PER_GATHER)
    plan = plan_for(model, width, num_keys)
    if plan is None:
        raise KernelUnavailableError(
            f"attention to {num_keys} keys of {model.token_bytes} B by NKI does not fit into SBUF; lower max_model_len, "
            "or take paged_attention=reference"
        )
    q, seq_lens, query_lens = _in_pieces(q, seq_lens, query_lens, plan)
    block_tables = jnp.repeat(block_tables, plan.num_pieces, axis=0)
    first, end = _bounds(plan.width, seq_lens, query_lens, sliding_window)  # [R, W] each
    slots = _slots(block_tables, kv_cache.shape, num_keys, first.min(axis=1), end.max(axis=1))
    bounds = jnp.stack([_on_lanes(bound, plan) for bound in (first, end)], axis=2)  # [R, P, 2]
    result = jax.ShapeDtypeStruct((q.shape[0], plan.num_lots * plan.lane, head_dim), q.dtype)
    constants = (float(scale), float(soft_cap or 0.0), sliding_window is not None, plan.gathers_per_tile)
    out = launch("attention", result, (_to_lots(q, plan), kv_cache, slots, bounds, *constants))
    out = _from_lots(out, plan)
    return out.reshape(num_rows, plan.num_pieces * plan.width, num_heads, head_dim)[:, :width]


def _as_floats(kv_cache: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(kv_cache, jnp.bfloat16)


def _as_bits(kv_cache: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(kv_cache, jnp.uint16)


def _in_pieces(
    q: jax.Array, seq_lens: jax.Array, query_lens: jax.Array, plan: Plan
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rows cut into pieces, as if they were so many tiles of their request; pieces without a token are padding."""
    padded = jnp.pad(q, ((0, 0), (0, plan.num_pieces * plan.width - q.shape[1]), (0, 0), (0, 0)))
    before = plan.width * jnp.arange(plan.num_pieces, dtype=jnp.int32)[None, :]
    own = jnp.clip(query_lens[:, None] - before, 0, plan.width)
    ends = jnp.where(own > 0, (seq_lens - query_lens)[:, None] + before + own, 0)
    return padded.reshape(-1, plan.width, *q.shape[2:]), ends.reshape(-1), own.reshape(-1)


def _to_lots(q: jax.Array, plan: Plan) -> jax.Array:
    """[R, h, H / h, K * E, Q] of q [R, W, N, H]: what one partition holds of a row lies together."""
    model, num_rows = plan.model, q.shape[0]
    part = model.head_dim // model.num_parts
    grouped = q.reshape(num_rows, plan.width, model.num_kv_heads, model.group, model.num_parts, part)
    grouped = grouped.transpose(0, 5, 4, 2, 3, 1)  # [R, h, H / h, K, G, W]
    heads = plan.lots_per_head * plan.heads_per_lot - model.group
    grouped = jnp.pad(grouped, ((0, 0), (0, 0), (0, 0), (0, 0), (0, heads), (0, 0)))
    lots = grouped.reshape(num_rows, part, model.num_parts, plan.num_lots, plan.heads_per_lot * plan.width)
    return jnp.pad(lots, ((0, 0), (0, 0), (0, 0), (0, 0), (0, plan.lane - lots.shape[4])))


def _from_lots(out: jax.Array, plan: Plan) -> jax.Array:
    """[R, W, N, H] of what the kernel gives, [R, K * E * Q, H]."""
    model, num_rows = plan.model, out.shape[0]
    out = out.reshape(num_rows, plan.num_lots, plan.lane, model.head_dim)[:, :, : plan.heads_per_lot * plan.width]
    out = out.reshape(num_rows, model.num_kv_heads, -1, plan.width, model.head_dim)[:, :, : model.group]
    return out.transpose(0, 3, 1, 2, 4).reshape(num_rows, plan.width, model.num_heads, model.head_dim)


def _bounds(
    width: int, seq_lens: jax.Array, query_lens: jax.Array, sliding_window: int | jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """[R, W] int32: the first key that each query sees, and the one after the last. Padding sees what the last token does."""
    positions = (seq_lens - query_lens)[:, None] + jnp.arange(width, dtype=jnp.int32)[None, :]
    positions = jnp.minimum(positions, seq_lens[:, None] - 1)
    first = jnp.zeros_like(positions)
    return first if sliding_window is None else jnp.maximum(positions - sliding_window + 1, 0), positions + 1


def _slots(
    block_tables: jax.Array, cache_shape: tuple[int, ...], num_keys: int, first: jax.Array, end: jax.Array
) -> jax.Array:
    """[R, 128, S / 128] int32: the place of each key from `first` up to `end` [R], the number of places for the others."""
    num_blocks, block_size = cache_shape[:2]
    offsets = jnp.arange(block_size, dtype=jnp.int32)[None, None, :]
    slots = _slots_in(block_tables[:, :, None], offsets, num_blocks, block_size).reshape(block_tables.shape[0], -1)
    slots = jnp.pad(slots, ((0, 0), (0, num_keys - slots.shape[1])))
    key_idx = jnp.arange(num_keys, dtype=jnp.int32)[None, :]
    is_seen = (key_idx >= first[:, None]) & (key_idx < end[:, None])
    slots = jnp.where(is_seen, slots, num_blocks * block_size).astype(jnp.int32)
    return slots.reshape(slots.shape[0], -1, KEYS_PER_GATHER).transpose(0, 2, 1)


def _slots_in(blocks: jax.Array, offsets: jax.Array, num_blocks: int, block_size: int) -> jax.Array:
    """block * block_size + offset, by shifts where the block size allows, as those are exact for all numbers.

    Raises KernelUnavailableError where they do not and the cache has so many slots that float32 does not count them.
    """
    if block_size & (block_size - 1) == 0:
        return jnp.left_shift(blocks, block_size.bit_length() - 1) | offsets
    if num_blocks * block_size > MAX_EXACT:
        raise KernelUnavailableError(
            f"a cache of {num_blocks} blocks of {block_size} has more than {MAX_EXACT} slots; for the NKI kernels take "
            "a block_size that is a power of two"
        )
    return blocks * block_size + offsets


def _on_lanes(bound: jax.Array, plan: Plan) -> jax.Array:
    """[R, P] float32 of a bound [R, W]: for each query head of a lot, padded to Q, for each head of a group. Exact below 2^24."""
    of_lot = jnp.tile(bound, (1, plan.heads_per_lot))
    padded = jnp.pad(of_lot, ((0, 0), (0, plan.lane - of_lot.shape[1])))
    return jnp.tile(padded, (1, plan.kv_heads_per_group)).astype(jnp.float32)
