"""The compiled step: draft, forward, sample, accept, and hand the tokens to the next step, in one program without a host in between.

R decode rows of W = 1 + K tokens (K drafts), P prefill tiles of C tokens, T = R x W + P x C, M blocks a row can reach, N decode steps per
dispatch, D hidden, V vocabulary.

The dense layers see decode rows and tiles laid end to end; attention is called once per rectangle. No lax.cond, no
dynamic loop, no callback: a row that has nothing to compute points at the null block and the sink slot.

A row's drafts stand in its tokens, after those that count. Each of its W tokens gives the logits of the one that follows, and what the
target samples there depends on the tokens before and on the noise of the position alone: while the target samples what was
drafted, the next token is right too. So the tokens are those of a step without drafts, and only their number differs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from quire.backends.base import Program, StepShape
from quire.engine.device_state import DeviceState, Slots, StateSplit
from quire.engine.drafting import (
    DecodeRows,
    Drafter,
    DraftStep,
    ModelDrafter,
    Rectangles,
    Verified,
    Weights,
    write_tokens,
)
from quire.engine.passes import StepModel, places_of_tokens, sampling_fields, sampling_rows
from quire.kernels.paged_attention.contract import RowsOfTokens, StepPlaces
from quire.kernels.sampling.reference import compute_logprobs
from quire.kernels.sampling.rows import Logprobs
from quire.models.decoder import compute_logits


@flax.struct.dataclass
class ModelInput:
    """What the host sends for one step, in two arrays: each one more would cost its own transfer in every step.

    Tokens and positions of decode rows are on the device already.
    """

    # [R, 2 + M] int32: slot, the sink for padding; the most to draft for the row, of at most K; block table. None for no rows.
    decode: Any
    # [P, 4 + M] int32: slot, the sink for padding; position of the first token; how many are real, 0 for padding; 1 where the tile ends
    # with the request's newest token; block table. None for no tiles.
    tiles: Any

    DECODE_COLUMNS = 2
    TILE_COLUMNS = 4

    def arrays(self) -> tuple[jax.Array, jax.Array]:
        """Both, empty where there is none."""
        decode, tiles, extra = self.decode, self.tiles, self.TILE_COLUMNS - self.DECODE_COLUMNS
        if decode is None:
            decode = jnp.zeros((0, tiles.shape[1] - extra), jnp.int32)
        if tiles is None:
            tiles = jnp.zeros((0, decode.shape[1] + extra), jnp.int32)
        return decode, tiles


@flax.struct.dataclass
class StepInput:
    """The same by name, every index within bounds: on some devices one out of range is no wrong token but a failed device."""

    decode_drafts: Any  # [R] int32
    tile_slots: Any  # [P] int32
    tile_starts: Any  # [P] int32
    tile_lens: Any  # [P] int32
    tile_samples: Any  # [P] bool
    tile_tables: Any  # [P, M] int32


@flax.struct.dataclass
class StepOutput:
    """What the host reads. The leading axis is the decode steps of the dispatch, except that of the last."""

    sampled: Any  # [N, R x W + P] int32, the tokens; in steps with drafts [N, R x W + P + 2 x R]: then, for each
    # row, how many of its W tokens count, and how many were drafted for it
    logprobs: Logprobs | None  # of those tokens, fields [N, R x W + P, ...]; full sampling only
    prompt_logprobs: Logprobs | None  # of the token after each tile token, fields [P, C, ...]


@dataclass(frozen=True)
class StepConfig:
    """What is static about every step of an engine."""

    target: StepModel
    block_size: int
    num_logprobs: int
    unroll_steps: bool
    drafter: Drafter | None = None


def changed_by(config: StepConfig, shape: StepShape) -> frozenset[str]:
    """The fields of DeviceState and of Slots that a step of this shape changes."""
    by_target = () if shape.is_catch_up else ("kv_cache", "tokens", "num_tokens")
    by_drafter = () if config.drafter is None else config.drafter.changed_by(shape)
    return frozenset((*by_target, *by_drafter))


def read_by(shape: StepShape) -> frozenset[str]:
    """The fields of Slots that a step of this shape reads, whether or not it changes them: what it reads of the rest it changes too."""
    return frozenset(("tokens", "num_tokens", "max_total_tokens", *sampling_fields(shape.sampling)))


Leaves = tuple[Any, ...]


def make_step(config: StepConfig, shape: StepShape, split: StateSplit) -> Program:
    """The program of one shape, for each device: (weights, held, changed, inputs) -> (changed, StepOutput).

    `held` and `changed` are the parts of the state by `split`; compile it with `changed` donated.
    """

    def step(weights: Weights, held: Leaves, changed: Leaves, inputs: ModelInput) -> tuple[Leaves, StepOutput]:
        def one_step(changed: Leaves) -> tuple[Leaves, StepOutput]:
            state, output = _one_step(config, shape, weights, split.join(held, changed), inputs)
            return split.changed_of(state, held), output

        if shape.num_decode_steps == 1:
            changed, output = one_step(changed)
            return changed, with_step_axis(output)
        if config.unroll_steps:
            outputs = []
            for _ in range(shape.num_decode_steps):
                changed, output = one_step(changed)
                outputs.append(output)
            return changed, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)
        return jax.lax.scan(lambda changed, _: one_step(changed), changed, length=shape.num_decode_steps)

    def catch_up(weights: Weights, held: Leaves, changed: Leaves, inputs: Any) -> tuple[Leaves, None]:
        assert isinstance(config.drafter, ModelDrafter), shape
        state = config.drafter.catch_up(shape, config.block_size, weights, split.join(held, changed), inputs)
        return split.changed_of(state, held), None

    return catch_up if shape.is_catch_up else step


def with_step_axis(output: StepOutput) -> StepOutput:
    """The output of a single step as that of a dispatch."""
    stepped: StepOutput = jax.tree.map(lambda leaf: leaf[None], output.replace(prompt_logprobs=None))  # type: ignore[attr-defined]
    return stepped.replace(prompt_logprobs=output.prompt_logprobs)  # type: ignore[attr-defined, no-any-return]


def _one_step(
    config: StepConfig, shape: StepShape, weights: Weights, state: DeviceState, inputs: ModelInput
) -> tuple[DeviceState, StepOutput]:
    begun, rows = begin_step(shape, state.slots, inputs)
    state, num_drafts = draft(config, shape, weights, state, begun, rows)
    return verify(config, shape, weights, state, begun, rows, num_drafts)


def begin_step(shape: StepShape, slots: Slots, inputs: ModelInput) -> tuple[StepInput, DecodeRows]:
    """The inputs by name, and the rows that they name, for the two halves of a step: `draft` and `verify`."""
    sink, max_len = slots.num_tokens.shape[0] - 1, slots.tokens.shape[1]
    decode, tiles = inputs.arrays()
    begun = StepInput(
        decode_drafts=decode[:, 1],
        tile_slots=jnp.clip(tiles[:, 0], 0, sink),
        tile_starts=jnp.clip(tiles[:, 1], 0, max_len - 1),
        tile_lens=jnp.clip(tiles[:, 2], 0, shape.tile_size),
        tile_samples=tiles[:, 3] > 0,
        tile_tables=tiles[:, ModelInput.TILE_COLUMNS :],
    )
    return begun, DecodeRows.of(slots, jnp.clip(decode[:, 0], 0, sink), decode[:, ModelInput.DECODE_COLUMNS :])


def draft(
    config: StepConfig, shape: StepShape, weights: Weights, state: DeviceState, inputs: StepInput, rows: DecodeRows
) -> tuple[DeviceState, jax.Array]:
    """The state with drafts after the rows' tokens, and how many there are: [R] int32."""
    if shape.num_drafts == 0:
        return state, jnp.zeros(shape.decode_rows, jnp.int32)
    assert config.drafter is not None, shape
    limits = jnp.clip(inputs.decode_drafts, 0, jnp.minimum(rows.room - 1, shape.num_drafts))
    return config.drafter.draft(DraftStep(shape, config.block_size, weights, rows), state, limits)


def verify(
    config: StepConfig,
    shape: StepShape,
    weights: Weights,
    state: DeviceState,
    inputs: StepInput,
    rows: DecodeRows,
    num_drafts: jax.Array,
) -> tuple[DeviceState, StepOutput]:
    """The state with the tokens that the target sampled, after those of the rows' drafts that it sampled too."""
    slots = state.slots
    rectangles = _lay_out(shape, config.block_size, slots, inputs, rows, num_drafts)
    target = config.target
    captured_layers = () if config.drafter is None else config.drafter.captured_layers(shape)
    hidden, kv_cache, captured = target.run(
        weights.target,
        rectangles.token_ids,
        rectangles.positions,
        state.kv_cache,
        rectangles.places,
        captured_layers,
    )  # [T, D]
    sampled = target.sample(
        weights.target,
        hidden[rectangles.last_token],
        sampling_rows(slots, rectangles.slots, rectangles.num_tokens, shape.sampling),
        shape.sampling,
        config.num_logprobs,
        is_used=rectangles.num_tokens > 0,
    )
    num_accepted, newest = _accept(shape, slots, rows, num_drafts, sampled.token_ids)
    num_decoded = shape.decode_rows * shape.decode_width
    appended = _append(
        slots,
        jnp.concatenate([rows.slots, rectangles.slots[num_decoded:]]),
        jnp.concatenate([rows.num_tokens + num_accepted, rectangles.num_tokens[num_decoded:]]),
        jnp.concatenate([newest, sampled.token_ids[num_decoded:]]),
    )
    prompt_logprobs = None
    if shape.prompt_logprobs:
        prompt_logprobs = _prompt_logprobs(config, shape, weights.target, hidden, slots, inputs)
    state = state.replace(kv_cache=kv_cache, slots=appended)  # type: ignore[attr-defined]
    read = sampled.token_ids
    if config.drafter is not None:
        kept = _lay_out(shape, config.block_size, appended, inputs, rows, num_accepted)
        step = DraftStep(shape, config.block_size, weights, rows)
        state = config.drafter.observe(step, state, Verified(num_drafts, num_accepted, kept, captured))
    if shape.num_drafts:
        read = jnp.concatenate([read, jnp.where(rows.is_active, num_accepted + 1, 0), num_drafts])
    return state, StepOutput(read, sampled.logprobs, prompt_logprobs)


def _lay_out(
    shape: StepShape, block_size: int, slots: Slots, inputs: StepInput, rows: DecodeRows, num_drafts: jax.Array
) -> Rectangles:
    num_rows, width, num_tiles, tile_size = shape.decode_rows, shape.decode_width, shape.prefill_tiles, shape.tile_size
    sink, max_len = slots.num_tokens.shape[0] - 1, slots.tokens.shape[1]
    query_lens = jnp.where(rows.is_active, num_drafts + 1, 0)  # [R]
    row_offsets = jnp.arange(width, dtype=jnp.int32)[None, :]
    row_positions = jnp.clip(rows.num_tokens[:, None] - 1 + row_offsets, 0, max_len - 1)  # [R, W]
    is_query = row_offsets < query_lens[:, None]
    offsets = jnp.arange(tile_size, dtype=jnp.int32)[None, :]
    tile_positions = jnp.minimum(inputs.tile_starts[:, None] + offsets, max_len - 1)  # [P, C]
    row_tokens = slots.tokens[rows.slots[:, None], row_positions]
    tile_tokens = slots.tokens[inputs.tile_slots[:, None], tile_positions]
    row_places = places_of_tokens(rows.tables, row_positions, is_query, block_size)
    tile_places = places_of_tokens(inputs.tile_tables, tile_positions, offsets < inputs.tile_lens[:, None], block_size)
    parts = []
    if num_rows:
        seq_lens = jnp.where(rows.is_active, rows.num_tokens + num_drafts, 0)
        parts.append(RowsOfTokens(rows.tables, seq_lens, query_lens, width=width))
    if num_tiles:
        tile_ends = inputs.tile_starts + inputs.tile_lens
        parts.append(RowsOfTokens(inputs.tile_tables, tile_ends, inputs.tile_lens, width=tile_size))
    num_decoded = num_rows * width
    last_of_tile = num_decoded + jnp.arange(num_tiles, dtype=jnp.int32) * tile_size
    sampling_tiles = jnp.where(inputs.tile_samples, inputs.tile_slots, sink)
    return Rectangles(
        places=StepPlaces(
            jnp.concatenate([row_places[0], tile_places[0]]), jnp.concatenate([row_places[1], tile_places[1]]), parts
        ),
        positions=jnp.concatenate([row_positions.reshape(-1), tile_positions.reshape(-1)]),
        token_ids=jnp.concatenate([row_tokens.reshape(-1), tile_tokens.reshape(-1)]),
        token_slots=jnp.concatenate(
            [
                jnp.broadcast_to(rows.slots[:, None], row_positions.shape).reshape(-1),
                jnp.broadcast_to(inputs.tile_slots[:, None], tile_positions.shape).reshape(-1),
            ]
        ),
        slots=jnp.concatenate([jnp.where(is_query, rows.slots[:, None], sink).reshape(-1), sampling_tiles]),
        num_tokens=jnp.concatenate(
            [
                jnp.where(is_query, row_positions + 1, 0).reshape(-1),
                jnp.clip(slots.num_tokens[sampling_tiles], 0, max_len),
            ]
        ),
        last_token=jnp.concatenate(
            [jnp.arange(num_decoded, dtype=jnp.int32), last_of_tile + jnp.maximum(inputs.tile_lens - 1, 0)]
        ),
    )


def _accept(
    shape: StepShape, slots: Slots, rows: DecodeRows, num_drafts: jax.Array, token_ids: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """How many drafts of each row the target sampled too, up to the first that it did not, and what it sampled there; both [R] int32."""
    sampled = token_ids[: shape.decode_rows * shape.decode_width].reshape(shape.decode_rows, shape.decode_width)
    num_accepted = jnp.zeros(shape.decode_rows, jnp.int32)
    if shape.num_drafts == 0:
        return num_accepted, sampled[:, 0]
    agrees = jnp.ones(shape.decode_rows, bool)
    for idx in range(shape.num_drafts):
        place = jnp.minimum(rows.num_tokens + idx, slots.tokens.shape[1] - 1)
        agrees = agrees & (idx < num_drafts) & (sampled[:, idx] == slots.tokens[rows.slots, place])
        num_accepted = num_accepted + agrees.astype(jnp.int32)
    return num_accepted, jnp.take_along_axis(sampled, num_accepted[:, None], axis=1)[:, 0]


def _append(slots: Slots, slot_ids: jax.Array, num_tokens: jax.Array, token_ids: jax.Array) -> Slots:
    """Each slot gets a token after its `num_tokens`. The sink's length stays 0, so it is never active."""
    sink = slots.num_tokens.shape[0] - 1
    appended: Slots = write_tokens(slots, slot_ids, num_tokens, token_ids).replace(  # type: ignore[attr-defined]
        num_tokens=slots.num_tokens.at[slot_ids].set(
            jnp.where(slot_ids == sink, 0, num_tokens + 1), mode="promise_in_bounds"
        ),
    )
    return appended


def _prompt_logprobs(
    config: StepConfig, shape: StepShape, params: Any, hidden: jax.Array, slots: Slots, inputs: StepInput
) -> Logprobs:
    """Log-probabilities of the token that follows each tile token, one tile's logits in memory at a time."""
    target = config.target
    first = shape.decode_rows * shape.decode_width
    tiles = hidden[first:].reshape(shape.prefill_tiles, shape.tile_size, -1)  # [P, C, D]
    offsets = jnp.arange(1, shape.tile_size + 1, dtype=jnp.int32)[None, :]
    following = jnp.minimum(inputs.tile_starts[:, None] + offsets, slots.tokens.shape[1] - 1)
    targets = slots.tokens[inputs.tile_slots[:, None], following]  # [P, C]

    def one_tile(tile: tuple[jax.Array, jax.Array]) -> Logprobs:
        hidden, targets = tile
        logits = compute_logits(params, target.config, hidden, target.parallel)
        return compute_logprobs(logits, targets, config.num_logprobs)

    logprobs: Logprobs = jax.lax.map(one_tile, (tiles, targets))
    return logprobs
