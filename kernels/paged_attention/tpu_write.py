"""Writing new keys and values into a `HeadMajor` cache, in place.

R rows, W tokens of a row, P planes of a token (`HeadMajor`), B = block_size, g = 8 tokens of a group (`GROUP`).

A copy moves whole tiles of memory, so the least that can be written is a *group*: g tokens of a block, all heads. A group is
read, gets its new tokens, and is written back. Reading and writing back take far longer than what lies between, so the groups
of some rows ahead are being read, and those of rows behind being written, while a row is worked on:

    row r + A      reading its groups into slots of a ring
    row r          its groups have arrived: insert the tokens
    rows before r  writing theirs back; a slot is waited for when its turn comes again

Two neighbouring rows may end and begin in the same group (a prompt cut into tiles at a token that is no multiple of g). Reading it
for the second row would miss what the first is about to write. So rows are only where tokens come from: the kernel walks
over *groups*, and a group equal to the one before stays where it is, in the same slot, and is written once, when the walk leaves it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from quire.kernels.paged_attention.contract import RowsOfTokens, StepPlaces
from quire.kernels.paged_attention.tpu_format import GROUP, LANES, parts_of_rows, quotient, quotient_up, rows_of_tokens

GROUPS_AHEAD = 8
"""About how many groups are being read at any time."""

# Places in the kernel's state: how many distinct groups were begun to be read, or had tokens inserted, and the last one's address.
NUM_READ, LAST_READ, NUM_TAKEN, LAST_TAKEN = range(4)
NOWHERE = -1


def write_kv(
    kv_cache: jax.Array, k_new: jax.Array, v_new: jax.Array, places: StepPlaces, *, interpret: Any = False
) -> jax.Array:
    """`contract.WriteKV` on a `HeadMajor` cache. `interpret` is that of `pl.pallas_call`."""
    # In float32, since one row of two that share a register of bfloat16 cannot be picked; it goes there and back unchanged.
    rows_new = rows_of_tokens(*(new.astype(kv_cache.dtype) for new in (k_new, v_new))).astype(
        jnp.float32
    )  # [T, P, 128]
    first = 0
    for rectangle in places.rectangles:
        num_rows, blocks_per_row = rectangle.block_tables.shape
        for part in parts_of_rows(num_rows, blocks_per_row):
            some = jax.tree.map(lambda field, part=part: field[part], rectangle)
            num_tokens = (part.stop - part.start) * rectangle.width
            kv_cache = _write_rows(kv_cache, rows_new[first : first + num_tokens], some, interpret)
            first += num_tokens
    return kv_cache


def _write_rows(kv_cache: jax.Array, rows_new: jax.Array, rectangle: RowsOfTokens, interpret: Any) -> jax.Array:
    """The cache with the tokens of some rows in it; `rows_new` [R * W, P, 128]."""
    num_rows, width = rectangle.seq_lens.shape[0], rectangle.width
    num_planes = kv_cache.shape[1]
    max_groups = -(-(width - 1) // GROUP) + 1  # of one row, wherever it begins
    rows_ahead = min(max(GROUPS_AHEAD // max_groups, 1), num_rows)
    # One for each group of the row at hand and of those ahead, and one for the group before, which may not be written yet.
    num_slots = (rows_ahead + 1) * max_groups + 1
    return pl.pallas_call(
        partial(_kernel, rows_ahead=rows_ahead),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(num_rows,),
            in_specs=[
                pl.BlockSpec((None, width, num_planes, LANES), lambda row, *_: (row, 0, 0, 0)),
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=pl.BlockSpec(memory_space=pl.ANY),
            scratch_shapes=[
                pltpu.VMEM((num_slots, num_planes, GROUP, LANES), kv_cache.dtype),
                pltpu.SemaphoreType.DMA((num_slots,)),
                pltpu.SemaphoreType.DMA((num_slots,)),
                pltpu.SMEM((4,), jnp.int32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(kv_cache.shape, kv_cache.dtype),
        input_output_aliases={4: 0},  # counted with the three scalars
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), disable_bounds_checks=True),
        interpret=interpret,
        name="write_kv",
    )(
        rectangle.block_tables.reshape(-1),
        rectangle.seq_lens,
        rectangle.query_lens,
        rows_new.reshape(num_rows, width, num_planes, LANES),
        kv_cache,
    )


def _kernel(
    tables: Any,  # [R * M] in scalar memory, as are the next two
    seq_lens: Any,  # [R]
    query_lens: Any,  # [R]
    tokens: Any,  # [W, P, 128] float32, those of this row
    _cache_in: Any,  # the cache as input: the same memory as the output
    cache: Any,  # [num_blocks, P, B, 128] in HBM
    slots: Any,  # [num_slots, P, g, 128]
    read_done: Any,  # [num_slots] semaphores
    written: Any,  # [num_slots] semaphores
    state: Any,  # [4] in scalar memory
    *,
    rows_ahead: int,
) -> None:
    row, num_rows = pl.program_id(0), seq_lens.shape[0]
    blocks_per_row = tables.shape[0] // num_rows
    num_slots, num_planes, group, lanes = slots.shape
    groups_per_block = cache.shape[2] // group

    def groups_of(row: Any) -> tuple[Any, Any]:
        """First group of the row's request that has a new token of the row, and the one after the last. Equal for padding."""
        seq_len, query_len = seq_lens[row], query_lens[row]
        begin = quotient(seq_len - query_len, group)
        return begin, jnp.where(query_len > 0, quotient_up(seq_len, group), begin)

    def address_of(row: Any, idx: Any) -> Any:
        """Which group of the whole cache the idx-th group of the row's request is."""
        return tables[row * blocks_per_row + quotient(idx, groups_per_block)] * groups_per_block + lax.rem(
            idx, groups_per_block
        )

    def in_cache(address: Any) -> Any:
        offset = pl.multiple_of(lax.rem(address, groups_per_block) * group, group)
        return cache.at[quotient(address, groups_per_block), :, pl.ds(offset, group), :]

    def reading(address: Any, slot: Any) -> Any:
        return pltpu.make_async_copy(in_cache(address), slots.at[slot], read_done.at[slot])

    def writing(address: Any, slot: Any) -> Any:
        return pltpu.make_async_copy(slots.at[slot], in_cache(address), written.at[slot])

    def read(row: Any) -> None:
        """Begins to read the row's groups."""

        def begin(idx: Any, carry: None) -> None:
            address = address_of(row, idx)

            @pl.when(address != state[LAST_READ])
            def _() -> None:
                count = state[NUM_READ]
                slot = lax.rem(count, num_slots)

                @pl.when(count >= num_slots)
                def _() -> None:
                    writing(address, slot).wait()  # what was in the slot before; a wait looks at sizes only

                reading(address, slot).start()
                state[NUM_READ], state[LAST_READ] = count + 1, address

        lax.fori_loop(*groups_of(row), begin, None)

    def leave_group() -> None:
        """Begins to write back the group that tokens were inserted in last."""

        @pl.when(state[NUM_TAKEN] > 0)
        def _() -> None:
            writing(state[LAST_TAKEN], lax.rem(state[NUM_TAKEN] - 1, num_slots)).start()

    def take(idx: Any) -> Any:
        """The slot in which the row's idx-th group lies, once it has arrived."""
        address = address_of(row, idx)

        @pl.when(address != state[LAST_TAKEN])
        def _() -> None:
            leave_group()
            reading(address, lax.rem(state[NUM_TAKEN], num_slots)).wait()
            state[NUM_TAKEN], state[LAST_TAKEN] = state[NUM_TAKEN] + 1, address

        return lax.rem(state[NUM_TAKEN] - 1, num_slots)

    def insert(idx: Any, carry: None) -> None:
        """Puts those of this row's tokens that belong to its idx-th group there."""
        slot = take(idx)
        first = seq_lens[row] - query_lens[row]
        offset = first - idx * group  # of the row's first token from the group's first place; negative in later groups
        place = lax.broadcasted_iota(jnp.int32, (group, lanes), 0)

        def one_token(token: Any, planes: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            is_its_place = place == token + offset
            return tuple(
                jnp.where(is_its_place, tokens[token, pl.ds(plane, 1), :], old) for plane, old in enumerate(planes)
            )

        planes = tuple(slots[slot, plane].astype(jnp.float32) for plane in range(num_planes))
        if tokens.shape[0] == 1:
            planes = one_token(0, planes)
        else:
            begin, end = jnp.maximum(-offset, 0), jnp.minimum(group - offset, query_lens[row])
            planes = lax.fori_loop(begin, end, one_token, planes)
        for plane, new in enumerate(planes):
            slots[slot, plane] = new.astype(slots.dtype)

    @pl.when(row == 0)
    def first_row() -> None:
        state[NUM_READ], state[LAST_READ], state[NUM_TAKEN], state[LAST_TAKEN] = 0, NOWHERE, 0, NOWHERE
        for ahead in range(rows_ahead):
            read(jnp.int32(ahead))

    @pl.when(row + rows_ahead < num_rows)
    def row_ahead() -> None:
        read(row + rows_ahead)

    lax.fori_loop(*groups_of(row), insert, None)

    @pl.when(row == num_rows - 1)
    def last_row() -> None:
        leave_group()
        count = state[NUM_TAKEN]

        def finish(idx: Any, carry: None) -> None:
            writing(0, lax.rem(idx, num_slots)).wait()

        lax.fori_loop(jnp.maximum(count - num_slots, 0), count, finish, None)
