"""The part of a compiled step that drafts: guesses of a row's next tokens, written after those it has, for the target to verify.

R decode rows, K drafts, M blocks a row can reach, L places for tokens, P tiles of C tokens.

A drafter samples with the row's own parameters and with the noise of the position that it drafts for, which is what the target will
sample with: where both models would choose alike, they do. Nothing here can change what is emitted.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Protocol

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from quire.backends.base import StepShape
from quire.engine.device_state import DeviceState, Slots
from quire.engine.draft_scheduler import MAX_DRAFT_LAG
from quire.engine.passes import StepModel, places_of_tokens, sampling_rows
from quire.kernels.paged_attention.contract import RowsOfTokens, StepPlaces
from quire.kernels.sampling.reference import first_argmax


@flax.struct.dataclass
class Weights:
    """The parameters of an engine."""

    target: Any
    draft: Any = None


@flax.struct.dataclass
class DecodeRows:
    """The rows of a decode rectangle as the device knows them. A row that has nothing to compute is the sink's."""

    slots: Any  # [R] int32
    tables: Any  # [R, M] int32
    num_tokens: Any  # [R] int32, the newest included
    room: Any  # [R] int32, tokens that may still come
    is_active: Any  # [R] bool

    @classmethod
    def of(cls, slots: Slots, slot_ids: jax.Array, tables: jax.Array) -> DecodeRows:
        """The rows of slots `slot_ids`, which are within bounds.

        A row that reached its limit within the dispatch, or after the host planned it, computes nothing more.
        """
        sink, max_len = slots.num_tokens.shape[0] - 1, slots.tokens.shape[1]
        num_tokens = jnp.clip(slots.num_tokens[slot_ids], 0, max_len)
        room = jnp.clip(slots.max_total_tokens[slot_ids] - num_tokens, 0, max_len)
        is_active = (room > 0) & (num_tokens > 0)
        return cls(
            slots=jnp.where(is_active, slot_ids, sink),
            tables=tables,
            num_tokens=jnp.where(is_active, num_tokens, 0),
            room=room,
            is_active=is_active,
        )


@flax.struct.dataclass
class Rectangles:
    """Positions and lengths of a step's two rectangles, on the device: the tokens that are computed, or those that are kept."""

    places: StepPlaces
    positions: Any  # [T] int32
    token_ids: Any  # [T] int32
    token_slots: Any  # [T] int32
    slots: Any  # [R x W + P] int32, whose tokens are sampled; the sink for what samples nothing
    num_tokens: Any  # [R x W + P] int32, how many tokens the sampled one follows
    last_token: Any  # [R x W + P] int32, index into T of the token whose hidden state gives the logits


@dataclass(frozen=True)
class DraftStep:
    """The step that is drafted in, while it is traced."""

    shape: StepShape
    block_size: int
    weights: Weights
    rows: DecodeRows
    """As they are before it."""


@dataclass(frozen=True)
class Verified:
    """What came of a step's drafts."""

    num_drafts: jax.Array
    """[R] int32."""
    num_accepted: jax.Array
    """[R] int32."""
    kept: Rectangles
    """The tokens that the step computed and that stay, in the places that they were computed in."""
    captured: jax.Array | None
    """[T, n x D], the inputs of the captured layers, where there are any."""


class Drafter(Protocol):
    """Where drafts come from. Frozen and hashable: it is static for every step."""

    def captured_layers(self, shape: StepShape) -> tuple[int, ...]:
        """The layers of the target whose inputs it reads in a step of this shape."""
        ...

    def changed_by(self, shape: StepShape) -> Collection[str]:
        """The fields of DeviceState and of Slots that it changes in a step of this shape, beside those that every step does."""
        ...

    def draft(self, step: DraftStep, state: DeviceState, limits: jax.Array) -> tuple[DeviceState, jax.Array]:
        """The state with drafts in each row's tokens, from `step.rows.num_tokens` on, and how many there are: [R] int32, at most `limits`.

        `limits` [R] int32 is -1 to `step.shape.num_drafts`, above 0 only where the row is active.
        """
        ...

    def observe(self, step: DraftStep, state: DeviceState, verified: Verified) -> DeviceState:
        """The state after a step, with what the drafter keeps there; called in every step, with drafts or without.

        `state` is of after the step, with the sampled tokens.
        """
        ...


@dataclass(frozen=True)
class NgramDrafter:
    """Drafts what followed when the row's last few tokens stood in it before: prompt lookup (Saxena 2023), on the device.

    The longest run of at most `max_tokens` and at least `min_tokens` counts, of equals the latest. What would be copied from beyond the
    row's end is what is being drafted, so that a text which repeats itself is drafted round and round.
    """

    min_tokens: int
    max_tokens: int

    def captured_layers(self, shape: StepShape) -> tuple[int, ...]:
        return ()

    def changed_by(self, shape: StepShape) -> Collection[str]:
        return ()

    def draft(self, step: DraftStep, state: DeviceState, limits: jax.Array) -> tuple[DeviceState, jax.Array]:
        slots, rows = state.slots, step.rows
        tokens = slots.tokens[rows.slots]  # [R, L]
        source, length = latest_match(tokens, rows.num_tokens, self.max_tokens)
        num_drafts = jnp.where(length >= self.min_tokens, jnp.maximum(limits, 0), 0)
        period = jnp.maximum(rows.num_tokens - source, 1)
        idx = jnp.arange(step.shape.num_drafts, dtype=jnp.int32)[None, :]
        places = source[:, None] + jax.lax.rem(jnp.broadcast_to(idx, (tokens.shape[0], idx.shape[1])), period[:, None])
        drafts = jnp.take_along_axis(tokens, jnp.clip(places, 0, tokens.shape[1] - 1), axis=1)
        slot_ids = jnp.where(idx < num_drafts[:, None], rows.slots[:, None], slots.num_tokens.shape[0] - 1)
        slots = write_tokens(slots, slot_ids, rows.num_tokens[:, None] + idx, drafts)
        return state.replace(slots=slots), num_drafts  # type: ignore[attr-defined]

    def observe(self, step: DraftStep, state: DeviceState, verified: Verified) -> DeviceState:
        return state


@flax.struct.dataclass
class Drafted:
    """What a drafter's cache has of rows: `Slots.drafted` by name, each [R] int32. What is read may be anything: clip what indexes."""

    num_tokens: Any  # leading tokens that a draft model has; that a head was given, or has passed over
    num_passed_over: Any  # by a head, since it had the row's prompt: what came after them lies so many places earlier
    hole_start: Any  # the first block in which a head has nothing of the row, though the target has
    hole_blocks: Any  # how many there are

    @classmethod
    def of(cls, slots: Slots, slot_ids: jax.Array) -> Drafted:
        """Of slots `slot_ids` [R] int32, within bounds."""
        drafted = slots.drafted[slot_ids]
        return cls(*(drafted[:, column] for column in range(drafted.shape[1])))

    def write(self, slots: Slots, slot_ids: jax.Array) -> Slots:
        """The slots with these numbers in `slot_ids`, of which none is there twice but the sink, whose are without meaning."""
        fields = (self.num_tokens, self.num_passed_over, self.hole_start, self.hole_blocks)
        written: Slots = slots.replace(  # type: ignore[attr-defined]
            drafted=slots.drafted.at[slot_ids].set(jnp.stack(fields, axis=1), mode="promise_in_bounds")
        )
        return written


def write_tokens(slots: Slots, slot_ids: jax.Array, places: jax.Array, token_ids: jax.Array) -> Slots:
    """The slots with `token_ids` at `places` of their tokens; all three of one shape, int32, slots within bounds, places not below 0."""
    ends = jnp.minimum(places, slots.tokens.shape[1] - 1)
    written: Slots = slots.replace(  # type: ignore[attr-defined]
        tokens=slots.tokens.at[slot_ids, ends].set(token_ids, mode="promise_in_bounds")
    )
    return written


def latest_match(tokens: jax.Array, num_tokens: jax.Array, max_tokens: int) -> tuple[jax.Array, jax.Array]:
    """Where the longest run that a row ends with stood before: tokens [R, L] int32, num_tokens [R] int32.

    Returns the place after it, in [0, L), the latest of equally long ones, and its length, at most `max_tokens`, 0 where the last token is
    new; both [R] int32.
    """
    num_places = tokens.shape[1]
    assert (max_tokens + 1) * num_places < 2**24, "places are compared as float32"
    places = jnp.arange(num_places, dtype=jnp.int32)[None, :]
    length = jnp.zeros(tokens.shape, jnp.int32)
    goes_on = (places > 0) & (places < num_tokens[:, None])
    for back in range(1, max_tokens + 1):
        last = jnp.take_along_axis(tokens, jnp.clip(num_tokens[:, None] - back, 0, num_places - 1), axis=1)
        before = jnp.pad(tokens, ((0, 0), (back, 0)))[:, :num_places]
        goes_on = goes_on & (places >= back) & (before == last)
        length = length + goes_on.astype(jnp.int32)
    score = (length * np.int32(num_places) + places).astype(jnp.float32)
    source = first_argmax(jnp.where(length > 0, score, np.float32(-1)))  # scores differ, so the largest is one place
    return source, jnp.take_along_axis(length, source[:, None], axis=1)[:, 0]


@flax.struct.dataclass
class CatchUpInput:
    """What the host sends so that the draft model's cache catches up; where a row's begins is on the device."""

    tiles: Any  # [P, 4 + M] int32: slot, the sink for padding; leading tokens that the cache has at least; which of its
    # row's tiles it is; 1 for the last of them; block table

    COLUMNS = 4


@dataclass(frozen=True)
class ModelDrafter:
    """Drafts with a smaller model of the same vocabulary, whose cache lies under the target's block tables."""

    part: StepModel

    def captured_layers(self, shape: StepShape) -> tuple[int, ...]:
        return ()

    def changed_by(self, shape: StepShape) -> Collection[str]:
        return ("draft_cache", "drafted") if shape.num_drafts or shape.is_catch_up else ()

    def draft(self, step: DraftStep, state: DeviceState, limits: jax.Array) -> tuple[DeviceState, jax.Array]:
        slots, cache, rows, sampling = state.slots, state.draft_cache, step.rows, step.shape.sampling
        num_drafted = jnp.clip(Drafted.of(slots, rows.slots).num_tokens, 0, rows.num_tokens)
        lag = rows.num_tokens - num_drafted  # never 0 for an active row: its newest token is new to both models
        num_drafts = jnp.where((lag > 0) & (lag <= MAX_DRAFT_LAG), jnp.maximum(limits, 0), 0)
        start = num_drafted
        for idx in range(step.shape.num_drafts):
            drafts_now = idx < num_drafts
            width = MAX_DRAFT_LAG if idx == 0 else 1
            query_lens = jnp.where(drafts_now, jnp.clip(lag, 0, MAX_DRAFT_LAG) if idx == 0 else 1, 0)
            hidden, cache = self._run(
                slots, cache, step.weights, rows.slots, rows.tables, start, query_lens, width, step.block_size
            )
            last = jnp.arange(rows.slots.shape[0], dtype=jnp.int32) * width + jnp.maximum(query_lens - 1, 0)
            start = rows.num_tokens + idx
            slot_ids = jnp.where(drafts_now, rows.slots, slots.num_tokens.shape[0] - 1)
            end = jnp.where(drafts_now, start, 0)
            sampled = self.part.sample(
                step.weights.draft,
                hidden[last],
                sampling_rows(slots, slot_ids, end, sampling),
                sampling,
                num_logprobs=0,
                is_used=drafts_now,
            )
            slots = write_tokens(slots, slot_ids, end, sampled.token_ids)
        return state.replace(slots=slots, draft_cache=cache), num_drafts  # type: ignore[attr-defined]

    def observe(self, step: DraftStep, state: DeviceState, verified: Verified) -> DeviceState:
        """Of the accepted drafts the cache has all but the last that was made, which no pass has read."""
        if not step.shape.num_drafts:
            return state
        slots, rows, num_drafts = state.slots, step.rows, verified.num_drafts
        num_drafted = rows.num_tokens + jnp.minimum(num_drafts - 1, verified.num_accepted)
        slot_ids = jnp.where(num_drafts > 0, rows.slots, slots.num_tokens.shape[0] - 1)
        counted = jnp.where(num_drafts > 0, num_drafted, 0)
        slots = Drafted.of(slots, slot_ids).replace(num_tokens=counted).write(slots, slot_ids)  # type: ignore[attr-defined]
        return state.replace(slots=slots)  # type: ignore[attr-defined, no-any-return]

    def catch_up(
        self, shape: StepShape, block_size: int, weights: Weights, state: DeviceState, inputs: CatchUpInput
    ) -> DeviceState:
        """The state with up to C more tokens per tile in the draft model's cache; a row's newest token is left to its next draft."""
        slots, tile_size = state.slots, shape.tile_size
        sink, max_len = slots.num_tokens.shape[0] - 1, slots.tokens.shape[1]
        starts, tile_idx, is_last = inputs.tiles[:, 1], inputs.tiles[:, 2], inputs.tiles[:, 3] > 0
        tables = inputs.tiles[:, CatchUpInput.COLUMNS :]
        slot_ids = jnp.clip(inputs.tiles[:, 0], 0, sink)
        num_known = jnp.clip(slots.num_tokens[slot_ids] - 1, 0, max_len)
        begin = jnp.clip(jnp.maximum(Drafted.of(slots, slot_ids).num_tokens, starts), 0, max_len)
        start = jnp.clip(begin + jnp.clip(tile_idx, 0, shape.prefill_tiles) * tile_size, 0, max_len)
        lens = jnp.clip(num_known - start, 0, tile_size)
        _, cache = self._run(slots, state.draft_cache, weights, slot_ids, tables, start, lens, tile_size, block_size)
        counted = jnp.where(is_last, slot_ids, sink)
        ends = jnp.where(counted == sink, 0, jnp.maximum(begin, jnp.minimum(num_known, start + tile_size)))
        slots = Drafted.of(slots, counted).replace(num_tokens=ends).write(slots, counted)  # type: ignore[attr-defined]
        return state.replace(slots=slots, draft_cache=cache)  # type: ignore[attr-defined, no-any-return]

    def _run(
        self,
        slots: Slots,
        cache: Any,
        weights: Weights,
        slot_ids: jax.Array,
        tables: jax.Array,
        start: jax.Array,
        query_lens: jax.Array,
        width: int,
        block_size: int,
    ) -> tuple[jax.Array, Any]:
        """One pass over `query_lens` tokens of each row, from `start` on, laid out as [rows, width]."""
        max_len = slots.tokens.shape[1]
        offsets = jnp.arange(width, dtype=jnp.int32)[None, :]
        positions = jnp.clip(start[:, None] + offsets, 0, max_len - 1)
        places = places_of_tokens(tables, positions, offsets < query_lens[:, None], block_size)
        seq_lens = jnp.where(query_lens > 0, start + query_lens, 0)
        rectangle = RowsOfTokens(tables, seq_lens, query_lens, width=width)
        token_ids = slots.tokens[slot_ids[:, None], positions]
        out = self.part.run(
            weights.draft, token_ids.reshape(-1), positions.reshape(-1), cache, StepPlaces(*places, [rectangle])
        )
        return out.hidden, out.kv_cache
