"""The part of a compiled step that drafts with an EAGLE-3 head, which reads what the target's own layers computed.

R decode rows, K drafts, P prefill tiles, T tokens of a step, M blocks a row can reach, D hidden size of the head, S slots.

The head has an entry for a token: the feature of its position together with the token after it. Entries are written in the step in
which the target computes the token, if that is one with drafts or with prompts. A step with neither is the plain engine's; what it
computes the head passes over. Entries after such a gap close up to those before it: their keys are rotated for the positions that
they are of, and only lie as many places earlier as were passed over, so that a row's entries are always those in the first places of
its blocks. Other requests may share its blocks up to the first gap and no further; where one shares more of the target's, the head has a
hole there, of whole blocks, which are left out of its table.

While it drafts the head takes its own output for the features that the target has not computed yet, and what it writes then is written
anew once the target has. In the first round after a gap the newest feature is missing, and nothing is drafted.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from quire.backends.base import StepShape
from quire.engine.device_state import DeviceState, Slots
from quire.engine.drafting import DecodeRows, Drafted, DraftStep, Rectangles, Verified, write_tokens
from quire.engine.passes import StepModel, make_attend, places_of_tokens, sampling_rows, with_head_entries
from quire.kernels.paged_attention.contract import RowsOfTokens, StepPlaces
from quire.models.eagle import EagleConfig, embed_for_head, head_forward, head_logits


@dataclass(frozen=True)
class _Entries:
    """Where the entries of decode rows lie: at a token's position, less those passed over and those of the hole, in a table without it."""

    tables: jax.Array  # [R, M] int32
    num_missing: jax.Array  # [R] int32
    block_size: int
    max_len: int

    @classmethod
    def of(
        cls, rows: DecodeRows, drafted: Drafted, num_passed_over: jax.Array, block_size: int, max_len: int
    ) -> _Entries:
        num_blocks = rows.tables.shape[1]
        idx = jnp.arange(num_blocks, dtype=jnp.int32)[None, :]
        hole = jnp.clip(drafted.hole_blocks, 0, num_blocks)
        idx = idx + jnp.where(idx >= drafted.hole_start[:, None], hole[:, None], 0)
        tables = jnp.take_along_axis(rows.tables, jnp.minimum(idx, num_blocks - 1), axis=1)
        return cls(tables, num_passed_over + hole * np.int32(block_size), block_size, max_len)

    def places(self, positions: jax.Array, query_lens: jax.Array) -> tuple[jax.Array, jax.Array, RowsOfTokens]:
        """Block and offset, each [R x W], of entries of tokens at `positions` [R, W], of which `query_lens` [R] are real; and the rows."""
        width = positions.shape[1]
        places = jnp.clip(positions - self.num_missing[:, None], 0, self.max_len - 1)
        is_real = jnp.arange(width, dtype=jnp.int32)[None, :] < query_lens[:, None]
        seq_lens = jnp.where(query_lens > 0, places[:, 0] + query_lens, 0)
        blocks, offsets = places_of_tokens(self.tables, places, is_real, self.block_size)
        return blocks, offsets, RowsOfTokens(self.tables, seq_lens, query_lens, width=width)


@dataclass(frozen=True)
class EagleDrafter:
    """`quire.engine.drafting.Drafter`."""

    part: StepModel
    head: EagleConfig

    def _observes(self, shape: StepShape) -> bool:
        """Whether the head is given what a step of this shape computes."""
        return bool(shape.num_drafts or shape.prefill_tiles)

    def captured_layers(self, shape: StepShape) -> tuple[int, ...]:
        return self.head.captured_layers if self._observes(shape) else ()

    def changed_by(self, shape: StepShape) -> Collection[str]:
        return ("draft_cache", "draft_features", "drafted") if self._observes(shape) else ()

    def draft(self, step: DraftStep, state: DeviceState, limits: jax.Array) -> tuple[DeviceState, jax.Array]:
        slots, cache, rows, weights = state.slots, state.draft_cache, step.rows, step.weights
        sampling = step.shape.sampling
        sink, max_len = slots.num_tokens.shape[0] - 1, slots.tokens.shape[1]
        drafted = Drafted.of(slots, rows.slots)
        # A row that decodes has a prompt, and a token that was sampled after it.
        is_ready = (rows.num_tokens > 1) & (drafted.num_tokens == rows.num_tokens - 1)
        num_drafts = jnp.where(is_ready, jnp.maximum(limits, 0), 0)
        features = state.draft_features[rows.slots]  # [R, D]
        entries = _Entries.of(rows, drafted, drafted.num_passed_over, step.block_size, max_len)
        for idx in range(step.shape.num_drafts):
            drafts_now = idx < num_drafts
            end = jnp.where(drafts_now, rows.num_tokens + idx, 0)  # where the draft goes
            position = jnp.clip(end - 2, 0, max_len - 1)  # of the feature
            token_ids = slots.tokens[rows.slots, jnp.clip(end - 1, 0, max_len - 1)]
            blocks, offsets, rectangle = entries.places(position[:, None], drafts_now.astype(jnp.int32))
            features, cache = head_forward(
                weights.draft,
                self.head,
                embed_for_head(weights.draft, self.head, weights.target, token_ids, self.part.parallel),
                features,
                position,
                cache,
                make_attend(self.part, StepPlaces(blocks, offsets, [rectangle])),
                self.part.parallel,
            )
            slot_ids = jnp.where(drafts_now, rows.slots, sink)
            sampled = self.part.ops.sample.function(
                head_logits(weights.draft, self.head, features, self.part.parallel, is_used=drafts_now),
                sampling_rows(slots, slot_ids, end, sampling),
                mode=sampling,
                num_logprobs=0,
                is_used=drafts_now,
            )
            slots = write_tokens(slots, slot_ids, end, sampled.token_ids)
        return state.replace(slots=slots, draft_cache=cache), num_drafts  # type: ignore[attr-defined]

    def observe(self, step: DraftStep, state: DeviceState, verified: Verified) -> DeviceState:
        """Writes the entries of the tokens that stay, and keeps the feature that the next draft of a row begins with."""
        if not self._observes(step.shape):
            return state
        assert verified.captured is not None
        weights, kept = step.weights, verified.kept
        slots, places, newest = _give_rows(step, state.slots, verified)
        slots, tile_slots = _give_tiles(step, slots, kept)
        sink, max_len = slots.num_tokens.shape[0] - 1, slots.tokens.shape[1]
        following = slots.tokens[kept.token_slots, jnp.minimum(kept.positions + 1, max_len - 1)]
        embeddings = embed_for_head(weights.draft, self.head, weights.target, following, self.part.parallel)
        features, cache = with_head_entries(
            self.part,
            weights.draft,
            self.head,
            verified.captured,
            embeddings,
            state.draft_cache,
            kept.positions,
            places,
        )
        slot_ids = jnp.concatenate([step.rows.slots, tile_slots])
        last = jnp.concatenate([newest, kept.last_token[step.shape.decode_rows * step.shape.decode_width :]])
        latest = jnp.where((slot_ids == sink)[:, None], jnp.zeros_like(features[:1]), features[last])
        return state.replace(  # type: ignore[attr-defined, no-any-return]
            slots=slots,
            draft_cache=cache,
            draft_features=state.draft_features.at[slot_ids].set(latest, mode="promise_in_bounds"),
        )


def _give_rows(step: DraftStep, slots: Slots, verified: Verified) -> tuple[Slots, StepPlaces, jax.Array]:
    """The slots with what the head is given of decode rows; where the entries of all tokens go; and [R] int32 the index into T of each
    row's newest token that the target has computed."""
    rows, width, kept = step.rows, step.shape.decode_width, verified.kept
    num_rows, max_len = step.shape.decode_rows, slots.tokens.shape[1]
    newest = jnp.arange(num_rows, dtype=jnp.int32) * width + verified.num_accepted
    if not num_rows:
        return slots, kept.places, newest
    drafted = Drafted.of(slots, rows.slots)
    # So much further has the row come since the head was given anything of it.
    gap = jnp.maximum(rows.num_tokens - 1 - jnp.clip(drafted.num_tokens, 0, max_len), 0)
    num_passed_over = jnp.where(rows.is_active, jnp.clip(drafted.num_passed_over, 0, max_len) + gap, 0)
    num_given = jnp.where(rows.is_active, rows.num_tokens + verified.num_accepted, 0)
    entries = _Entries.of(rows, drafted, num_passed_over, step.block_size, max_len)
    places, positions = kept.places, kept.positions[: num_rows * width].reshape(num_rows, width)
    blocks, offsets, rectangle = entries.places(positions, places.rectangles[0].query_lens)
    places = StepPlaces(
        jnp.concatenate([blocks, places.write_blocks[num_rows * width :]]),
        jnp.concatenate([offsets, places.write_offsets[num_rows * width :]]),
        [rectangle, *places.rectangles[1:]],
    )
    given = drafted.replace(num_tokens=num_given, num_passed_over=num_passed_over)  # type: ignore[attr-defined]
    return given.write(slots, rows.slots), places, newest


def _give_tiles(step: DraftStep, slots: Slots, kept: Rectangles) -> tuple[Slots, jax.Array]:
    """The slots with what the head is given of prompts, and of each tile [P] int32 its slot, the sink for all but a request's last."""
    shape, sink = step.shape, slots.num_tokens.shape[0] - 1
    tile_slots = kept.token_slots[shape.decode_rows * shape.decode_width :].reshape(
        shape.prefill_tiles, shape.tile_size
    )[:, 0]
    if not shape.prefill_tiles:
        return slots, tile_slots
    tiles = kept.places.rectangles[-1]
    is_same = tile_slots[:, None] == tile_slots[None, :]  # [P, P]
    furthest = jnp.max(jnp.where(is_same, tiles.seq_lens[None, :], 0), axis=1)
    is_last = (tiles.query_lens > 0) & (tiles.seq_lens == furthest)
    slot_ids = jnp.where(is_last, tile_slots, sink)
    given = Drafted.of(slots, slot_ids).replace(num_tokens=jnp.where(is_last, tiles.seq_lens, 0))  # type: ignore[attr-defined]
    return given.write(slots, slot_ids), slot_ids
