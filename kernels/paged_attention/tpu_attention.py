"""Attention to a `HeadMajor` cache: blocks streamed from HBM by the block table, softmax as they pass.

R rows, W queries of a row, N query heads, K key/value heads, G = N / K, Q = W * G query vectors that share a key/value head, H head_dim,
P planes of the cache (`HeadMajor`), B = block_size, M blocks of a row, T keys of a tile.

The grid runs over rows. A row's keys are worked on in *tiles* of T keys at multiples of T, from the one that holds the first key that
any of its queries sees to the one that holds the last. The tiles of all rows form one sequence, and a *cursor* runs ahead of the work on
it: when a tile is begun, the copies of the tile `num_buffers - 1` further on are started, whichever row that belongs to. So memory
is never idle between rows, many short rows are fetched at once, and rows of padding cost nothing.

    fetched   |row 0: tile 0|tile 1|row 1: tile 0|row 2: tile 0|tile 1| ...
                     ▲ worked on           ▲ cursor

One copy per block brings its keys and values of all heads, and only blocks that the row has are copied: cost follows the true
lengths. Each head's tile is then a plain matrix [T, lanes] for the matrix unit. Tiles of which every key is seen by every query, all but
those at the ends, need no mask and run in a loop of their own.

Block tables and lengths are prefetched into scalar memory; rows whose tables do not fit there go into several calls (`parts_of_rows`).
"""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from quire.kernels.paged_attention.tpu_format import (
    LANES,
    SUBLANES,
    key_lanes,
    parts_of_rows,
    planes_per_head,
    quotient,
    quotient_up,
)

MASKED = -1.0e30
"""The score of a key that a query may not see. Finite, so that a query that has seen nothing yet has no NaN."""
LOG2_E = math.log2(math.e)

# Places of the cursor in scalar memory: the tile to be fetched next, and how many tiles were fetched and worked on.
ROW, TILE, NUM_FETCHED, NUM_TAKEN = range(4)


@dataclass(frozen=True)
class Tuning:
    """Numbers of one kind of chip, from tpu_tuning.json."""

    keys_per_tile: int
    buffer_mib: int
    """Fast memory for the tiles that are worked on and on their way; where heads are many, tiles are smaller."""
    max_buffers: int
    """How many tiles that may be. Few heads make small tiles, of which more must be on their way to keep memory busy."""
    queries_per_product: int
    """Query vectors of a head that are worked on together."""
    vmem_limit_mib: int


@functools.cache
def tunings() -> dict[str, Tuning]:
    """By device kind; "default" is for those not measured."""
    entries = json.loads((Path(__file__).parent / "tpu_tuning.json").read_text(encoding="utf-8"))
    return {kind: Tuning(**entry) for kind, entry in entries.items()}


def tuning_of(device_kind: str) -> Tuning:
    """That of a chip by the name that jax has for it."""
    return tunings().get(device_kind, tunings()["default"])


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
    tuning: Tuning | None = None,
    interpret: Any = False,
) -> jax.Array:
    """`contract.PagedAttention` on a `HeadMajor` cache. `interpret` is that of `pl.pallas_call`."""
    tuning = tuning or tunings()["default"]
    num_rows, width, num_heads, head_dim = q.shape
    num_kv_heads = kv_cache.shape[1] // planes_per_head(head_dim)
    vectors = _by_kv_head(q.astype(kv_cache.dtype), num_kv_heads)  # [R, K, Q, lanes]
    window = None if sliding_window is None else jnp.asarray(sliding_window, jnp.int32).reshape(1)
    call = partial(
        _attend,
        group=num_heads // num_kv_heads,
        score_scale=scale,
        soft_cap=soft_cap,
        tuning=tuning,
        interpret=interpret,
    )
    parts = [
        call(vectors[part], kv_cache, block_tables[part], seq_lens[part], query_lens[part], window)
        for part in parts_of_rows(*block_tables.shape)
    ]
    out = parts[0] if len(parts) == 1 else jnp.concatenate(parts)
    # Where key and value share a register's row, the output lies where values do.
    first_lane = key_lanes(head_dim) % LANES
    out = out[..., first_lane : first_lane + head_dim]
    by_token = out.reshape(num_rows, num_kv_heads, width, -1, head_dim).transpose(0, 2, 1, 3, 4)
    return by_token.reshape(q.shape).astype(q.dtype)


def _by_kv_head(q: jax.Array, num_kv_heads: int) -> jax.Array:
    """[R, W, N, H] to [R, K, Q, lanes]: the vectors that meet the same keys as one matrix, token by token."""
    num_rows, width, num_heads, head_dim = q.shape
    group = num_heads // num_kv_heads
    heads = q.reshape(num_rows, width, num_kv_heads, group, head_dim).transpose(0, 2, 1, 3, 4)
    vectors = heads.reshape(num_rows, num_kv_heads, width * group, head_dim)
    lanes = max(key_lanes(head_dim), LANES)
    return jnp.pad(vectors, ((0, 0), (0, 0), (0, 0), (0, lanes - head_dim)))


def _tiles(block_size: int, max_blocks: int, block_bytes: int, tuning: Tuning) -> tuple[int, int]:
    """Blocks of a tile, and how many tiles have room: whole registers of scores, and three tiles where they can be."""
    fewest = math.lcm(block_size, LANES) // block_size
    wanted = min(tuning.keys_per_tile // block_size, -(-max_blocks // fewest) * fewest)
    room = tuning.buffer_mib * 2**20 // block_bytes
    blocks_per_tile = max(min(wanted, room // 3) // fewest, 1) * fewest
    return blocks_per_tile, min(max(room // blocks_per_tile, 2), tuning.max_buffers)


def _queries_per_product(num_vectors: int, most: int) -> int:
    """The largest part of Q, in whole registers, that divides it and is at most `most`; all of it where Q is not in whole registers."""
    if num_vectors % SUBLANES:
        return num_vectors
    parts = range(SUBLANES, num_vectors + 1, SUBLANES)
    return max(part for part in parts if num_vectors % part == 0 and part <= max(most, SUBLANES))


def _attend(
    vectors: jax.Array,
    kv_cache: jax.Array,
    block_tables: jax.Array,
    seq_lens: jax.Array,
    query_lens: jax.Array,
    window: jax.Array | None,
    *,
    group: int,
    score_scale: float,
    soft_cap: float | None,
    tuning: Tuning,
    interpret: Any,
) -> jax.Array:
    """One call of the kernel: [R, K, Q, lanes] of queries to as many of output."""
    num_rows, num_kv_heads, num_vectors, lanes = vectors.shape
    _, num_planes, block_size, _ = kv_cache.shape
    block_bytes = num_planes * block_size * LANES * kv_cache.dtype.itemsize
    blocks_per_tile, num_buffers = _tiles(block_size, block_tables.shape[1], block_bytes, tuning)
    own_row = pl.BlockSpec((None, num_kv_heads, num_vectors, lanes), lambda row, *_: (row, 0, 0, 0))
    kernel = partial(
        _kernel,
        group=group,
        score_scale=score_scale,
        soft_cap=soft_cap,
        has_window=window is not None,
        vectors_per_product=_queries_per_product(num_vectors, tuning.queries_per_product),
    )
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(num_rows,),
            in_specs=[own_row, pl.BlockSpec(memory_space=pl.ANY)],
            out_specs=own_row,
            scratch_shapes=[
                pltpu.VMEM((num_buffers, num_planes, blocks_per_tile, block_size, LANES), kv_cache.dtype),
                pltpu.SemaphoreType.DMA((num_buffers,)),
                pltpu.SMEM((4,), jnp.int32),
                pltpu.VMEM((num_kv_heads, num_vectors, LANES), jnp.float32),
                pltpu.VMEM((num_kv_heads, num_vectors, LANES), jnp.float32),
                pltpu.VMEM((num_kv_heads, num_vectors, lanes), jnp.float32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(vectors.shape, vectors.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",),
            vmem_limit_bytes=tuning.vmem_limit_mib * 2**20,
            # Checking one takes 20 bundles where the copy itself takes 5. The tests' interpreter looks at every access.
            disable_bounds_checks=True,
        ),
        interpret=interpret,
        name="paged_attention",
    )(
        block_tables.reshape(-1),
        seq_lens,
        query_lens,
        jnp.zeros(1, jnp.int32) if window is None else window,
        vectors,
        kv_cache,
    )


def _kernel(
    tables: Any,  # [R * M] in scalar memory, as are the next three
    seq_lens: Any,  # [R]
    query_lens: Any,  # [R]
    window: Any,  # [1]
    vectors: Any,  # [K, Q, lanes], those of this row
    cache: Any,  # [num_blocks, P, B, 128] in HBM
    out: Any,  # [K, Q, lanes]
    buffers: Any,  # [num_buffers, P, T / B, B, 128]
    arrived: Any,  # [num_buffers] semaphores
    cursor: Any,  # [4] in scalar memory
    highest: Any,  # [K, Q, 128] the highest score so far, the same in all lanes
    total: Any,  # [K, Q, 128] the sum of weights so far, of each lane's keys by itself
    weighted: Any,  # [K, Q, lanes] the sum of weighted values so far
    *,
    group: int,
    score_scale: float,
    soft_cap: float | None,
    has_window: bool,
    vectors_per_product: int,
) -> None:
    row, num_rows = pl.program_id(0), seq_lens.shape[0]
    blocks_per_row = tables.shape[0] // num_rows
    num_buffers, num_planes, blocks_per_tile, block_size, _ = buffers.shape
    tile_size = blocks_per_tile * block_size
    num_kv_heads, num_vectors, _ = vectors.shape
    planes_per_head = num_planes // num_kv_heads

    # --- Which keys, blocks and tiles a row has -----------------------------------------------------------------------------

    def first_key(row: Any) -> Any:
        """The first key that any query of the row sees."""
        if not has_window:
            return jnp.int32(0)
        return jnp.maximum(seq_lens[row] - query_lens[row] + 1 - window[0], 0)

    def tiles_of(row: Any) -> tuple[Any, Any]:
        """The row's first tile and the one after its last; equal for padding."""
        begin = quotient(first_key(row), tile_size)
        return begin, jnp.where(query_lens[row] > 0, quotient_up(seq_lens[row], tile_size), begin)

    def blocks_of(row: Any, tile: Any) -> tuple[Any, Any]:
        """The first block of a tile that is needed, counted from the row's first, and the one after the last."""
        begin = jnp.maximum(tile * blocks_per_tile, quotient(first_key(row), block_size))
        return begin, jnp.minimum((tile + 1) * blocks_per_tile, quotient_up(seq_lens[row], block_size))

    # --- Fetching -----------------------------------------------------------------------------------------------------------

    def copy_of(row: Any, tile: Any, block: Any, slot: Any) -> Any:
        place = buffers.at[slot, :, block - tile * blocks_per_tile]
        return pltpu.make_async_copy(cache.at[tables[row * blocks_per_row + block]], place, arrived.at[slot])

    def move_to_row(row: Any) -> None:
        """Sets the cursor to the first tile of the first row from `row` on that has any, or beyond the last row."""

        def with_length(row: Any) -> tuple[Any, Any]:
            return row, query_lens[jnp.minimum(row, num_rows - 1)]

        row, _ = lax.while_loop(
            lambda at: (at[0] < num_rows) & (at[1] == 0), lambda at: with_length(at[0] + 1), with_length(row)
        )
        cursor[ROW] = row
        cursor[TILE] = tiles_of(jnp.minimum(row, num_rows - 1))[0]

    def fetch() -> None:
        """Starts the copies of the tile at the cursor, if there is one, and moves the cursor on."""
        row, tile = cursor[ROW], cursor[TILE]

        @pl.when(row < num_rows)
        def _() -> None:
            slot = lax.rem(cursor[NUM_FETCHED], num_buffers)

            begin, end = blocks_of(row, tile)
            is_whole = end - begin == blocks_per_tile

            @pl.when(is_whole)  # written out, copies take a quarter of the bundles that they take in a loop
            def _() -> None:
                for idx in range(blocks_per_tile):
                    copy_of(row, tile, begin + idx, slot).start()

            @pl.when(jnp.logical_not(is_whole))
            def _() -> None:
                lax.fori_loop(begin, end, lambda block, _: copy_of(row, tile, block, slot).start(), None)

            cursor[NUM_FETCHED] += 1
            is_last = tile + 1 == tiles_of(row)[1]

            @pl.when(is_last)
            def _() -> None:
                move_to_row(row + 1)

            @pl.when(jnp.logical_not(is_last))
            def _() -> None:
                cursor[TILE] = tile + 1

    def wait(tile: Any, slot: Any, is_whole: bool) -> None:
        """Until a tile of this row has arrived. A wait counts bytes, so one does for all blocks of a whole tile."""
        if is_whole:
            pltpu.make_async_copy(buffers.at[slot], buffers.at[slot], arrived.at[slot]).wait()
        else:
            lax.fori_loop(*blocks_of(row, tile), lambda block, _: copy_of(row, tile, block, slot).wait(), None)

    # --- Working on a tile --------------------------------------------------------------------------------------------------

    first_position = seq_lens[row] - query_lens[row]
    first_tile, end_tile = tiles_of(row)

    def scores_of(queries: jax.Array, keys: jax.Array) -> jax.Array:
        """[Q, T] float32 in units of log2, so that weights are powers of two."""
        scores = _product(queries, keys, transposed=True)
        if soft_cap is None:
            return scores * (score_scale * LOG2_E)
        return jnp.tanh(scores * (score_scale / soft_cap)) * (soft_cap * LOG2_E)

    def mask(scores: jax.Array, tile: Any, first_vector: Any) -> jax.Array:
        key = tile * tile_size + lax.broadcasted_iota(jnp.int32, scores.shape, 1)
        token = quotient(first_vector + lax.broadcasted_iota(jnp.int32, scores.shape, 0), group)
        distance = first_position + token - key
        visible = (distance >= 0) & (key < seq_lens[row])
        if has_window:
            visible &= distance < window[0]
        return jnp.where(visible, scores, MASKED)

    def only_own(rows: jax.Array, tile: Any) -> jax.Array:
        """Zeros instead of what others left in memory: a weight of 0 does not silence a value that is no number."""
        key = tile * tile_size + lax.broadcasted_iota(jnp.int32, rows.shape, 0)
        own = (key >= first_key(row)) & (key < seq_lens[row])
        return jnp.where(own, rows.astype(jnp.float32), 0.0).astype(rows.dtype)

    def attend_head(head: Any, part: Any, tile: Any, slot: Any, is_whole: bool) -> None:
        """Online softmax of one head's queries, or a part of them, over a tile."""
        first_vector = part * vectors_per_product
        if not isinstance(part, int):
            first_vector = pl.multiple_of(first_vector, vectors_per_product)
        here = (head, pl.ds(first_vector, vectors_per_product))
        planes = [
            buffers[slot, head * planes_per_head + plane].reshape(tile_size, LANES) for plane in range(planes_per_head)
        ]
        first_value = planes_per_head // 2  # the same plane as the key where there is but one
        if not is_whole:
            planes[first_value:] = [only_own(plane, tile) for plane in planes[first_value:]]
        keys = jnp.concatenate(planes[: max(first_value, 1)], axis=1)
        values = jnp.concatenate(planes[first_value:], axis=1)
        scores = scores_of(vectors[here], keys)
        if not is_whole:
            scores = mask(scores, tile, first_vector)
        before = highest[here]
        now = jnp.maximum(before, jnp.max(scores, axis=1, keepdims=True))
        weights = jnp.exp2(scores - _repeat(now, tile_size))
        shrink = jnp.exp2(before - now)
        highest[here] = now
        total[here] = total[here] * shrink + _sum_of_registers(weights)
        of_tile = _product(weights.astype(values.dtype), values)
        weighted[here] = weighted[here] * _repeat(shrink, of_tile.shape[1]) + of_tile

    def attend(is_whole: bool, tile: Any, carry: None) -> None:
        fetch()
        slot = lax.rem(cursor[NUM_TAKEN], num_buffers)
        cursor[NUM_TAKEN] += 1
        wait(tile, slot, is_whole)
        num_parts = num_vectors // vectors_per_product
        for_each(
            num_kv_heads, lambda head: for_each(num_parts, lambda part: attend_head(head, part, tile, slot, is_whole))
        )

    # --- The row ------------------------------------------------------------------------------------------------------------

    @pl.when(row == 0)
    def first_row() -> None:
        cursor[NUM_FETCHED] = cursor[NUM_TAKEN] = 0
        move_to_row(jnp.int32(0))
        lax.fori_loop(0, num_buffers - 1, lambda _, carry: fetch(), None)

    highest[...] = jnp.full(highest.shape, MASKED, jnp.float32)
    total[...] = jnp.zeros(total.shape, jnp.float32)
    weighted[...] = jnp.zeros(weighted.shape, jnp.float32)

    # Whole tiles: no key after the first query, and none before the last query's window.
    whole_begin = first_tile
    if has_window:
        whole_begin = jnp.clip(quotient_up(seq_lens[row] - window[0], tile_size), first_tile, end_tile)
        lax.fori_loop(first_tile, whole_begin, partial(attend, False), None)
    whole_end = jnp.clip(quotient(first_position + 1, tile_size), whole_begin, end_tile)
    lax.fori_loop(whole_begin, whole_end, partial(attend, True), None)
    lax.fori_loop(whole_end, end_tile, partial(attend, False), None)

    for head in range(num_kv_heads):
        weight = jnp.sum(total[head], axis=1, keepdims=True)
        out[head] = (weighted[head] / jnp.where(weight > 0, weight, 1.0)).astype(out.dtype)


MAX_UNROLLED = 16


def for_each(count: int, body: Any) -> None:
    """Calls `body` with 0 ... count - 1, written out where they are few."""
    if count <= MAX_UNROLLED:
        for idx in range(count):
            body(idx)
    else:
        lax.fori_loop(0, count, lambda idx, _: body(idx), None)


def _product(left: jax.Array, right: jax.Array, *, transposed: bool = False) -> jax.Array:
    """[m, k] x [k, n], or [m, k] x [n, k] transposed, in float32; products of float32 are not rounded to bfloat16."""
    precision = lax.Precision.HIGHEST if left.dtype == jnp.float32 else lax.Precision.DEFAULT
    contracted = (((1,), (1 if transposed else 0,)), ((), ()))
    return lax.dot_general(left, right, contracted, precision=precision, preferred_element_type=jnp.float32)


def _repeat(register: jax.Array, lanes: int) -> jax.Array:
    """[m, 128] to [m, lanes] of the same registers over again, which costs nothing."""
    return jnp.concatenate([register] * (lanes // LANES), axis=1)


def _sum_of_registers(values: jax.Array) -> jax.Array:
    """[m, n] to [m, 128]: lanes stay apart, so nothing moves across them."""
    parts = [values[:, first : first + LANES] for first in range(0, values.shape[1], LANES)]
    return sum(parts[1:], start=parts[0])
