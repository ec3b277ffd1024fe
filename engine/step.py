"""The compiled step: forward, sample, and hand the tokens to the next step, in one program without a host in between.

R decode rows, P prefill tiles of C tokens, T = R + P x C, M blocks a row can reach, N decode steps per dispatch, D hidden,
N_q query heads, K key/value heads, H head_dim, V vocabulary.

The dense layers see decode rows and tiles laid end to end; attention is called once per rectangle. No lax.cond, no
dynamic loop, no callback: a row that has nothing to compute points at the null block and the sink slot.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from quire.backends.base import Program, StepShape
from quire.engine.block_pool import NULL_BLOCK
from quire.engine.device_state import DeviceState, Slots
from quire.kernels.ops import Ops
from quire.kernels.paged_attention.contract import RowsOfTokens, StepPlaces
from quire.kernels.sampling.reference import best_of_part, compute_logprobs, first_argmax
from quire.kernels.sampling.rows import Logprobs, SampleOutput, SamplingMode, SamplingRows
from quire.models.config import ModelConfig
from quire.models.decoder import Attend, LayerInfo, RunLayer, compute_logits, forward, layer_spec, logits_of_part
from quire.models.parallel import ALONE, Parallel
from quire.models.params import Layer


@flax.struct.dataclass
class ModelInput:
    """What the host sends for one step. Tokens and positions of decode rows are on the device already."""

    decode_slots: Any  # [R] int32; the sink for padding
    decode_tables: Any  # [R, M] int32
    tile_slots: Any  # [P] int32; the sink for padding
    tile_starts: Any  # [P] int32, position of the tile's first token
    tile_lens: Any  # [P] int32, real tokens in the tile; 0 for padding
    tile_samples: Any  # [P] bool, whether the tile ends with the request's newest token
    tile_tables: Any  # [P, M] int32


@flax.struct.dataclass
class StepOutput:
    """What the host reads. The leading axis of the first two is the decode steps of the dispatch."""

    token_ids: Any  # [N, R + P] int32
    logprobs: Logprobs | None  # of those tokens, fields [N, R + P, ...]; full sampling only
    prompt_logprobs: Logprobs | None  # of the token after each tile token, fields [P, C, ...]


@dataclass(frozen=True)
class StepConfig:
    """What is static about every step of an engine."""

    model: ModelConfig
    ops: Ops
    block_size: int
    num_logprobs: int
    unroll_steps: bool
    parallel: Parallel = ALONE


def make_step(config: StepConfig, shape: StepShape) -> Program:
    """The program of one shape, for each device: (params, state, inputs) -> (state, StepOutput); compile it with the state donated."""

    def step(params: Any, state: DeviceState, inputs: ModelInput) -> tuple[DeviceState, StepOutput]:
        if shape.num_decode_steps == 1:
            state, output = _one_step(config, shape, params, state, inputs)
            return state, _with_step_axis(output)
        if config.unroll_steps:
            outputs = []
            for _ in range(shape.num_decode_steps):
                state, output = _one_step(config, shape, params, state, inputs)
                outputs.append(output)
            return state, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)
        return jax.lax.scan(
            lambda state, _: _one_step(config, shape, params, state, inputs), state, length=shape.num_decode_steps
        )

    return step


def _with_step_axis(output: StepOutput) -> StepOutput:
    sampled = jax.tree.map(lambda leaf: leaf[None], (output.token_ids, output.logprobs))
    return StepOutput(token_ids=sampled[0], logprobs=sampled[1], prompt_logprobs=output.prompt_logprobs)


@dataclass(frozen=True)
class _Rectangles:
    """Positions and lengths of the two rectangles, on the device."""

    decode_lens: jax.Array  # [R] int32, tokens including the newest
    decode_query_lens: jax.Array  # [R] int32, 1, or 0 for a row with nothing to compute
    tile_lens: jax.Array  # [P] int32, tokens up to the tile's last
    positions: jax.Array  # [T] int32
    write_blocks: jax.Array  # [T] int32, where each token's key and value go; the null block for padding
    write_offsets: jax.Array  # [T] int32
    token_ids: jax.Array  # [T] int32
    slots: jax.Array  # [R + P] int32, whose tokens are sampled; the sink for rows that sample nothing
    last_token: jax.Array  # [R + P] int32, index into T of the token whose hidden state gives the logits


def _one_step(
    config: StepConfig, shape: StepShape, params: Any, state: DeviceState, inputs: ModelInput
) -> tuple[DeviceState, StepOutput]:
    inputs = _bounded(shape, state.slots, inputs)
    rectangles = _lay_out(shape, config.block_size, state.slots, inputs)
    places = _places_of_step(shape, inputs, rectangles)
    attend, run_layer = _make_attend(config, places), _make_run_layer(config, places)
    hidden, kv_cache = forward(
        params,
        config.model,
        rectangles.token_ids,
        rectangles.positions,
        state.kv_cache,
        attend,
        run_layer,
        config.parallel,
        config.ops.experts.function,
    )  # [T, D]
    rows = _sampling_rows(state.slots, rectangles.slots, shape.sampling)
    sampled = _sample(config, shape.sampling, params, hidden[rectangles.last_token], rows)
    slots = _append(state.slots, rectangles.slots, sampled.token_ids)
    prompt_logprobs = None
    if shape.prompt_logprobs:
        prompt_logprobs = _prompt_logprobs(config, shape, params, hidden, state.slots, inputs)
    return DeviceState(kv_cache, slots), StepOutput(sampled.token_ids, sampled.logprobs, prompt_logprobs)


def _sample(
    config: StepConfig, mode: SamplingMode, params: Any, hidden: jax.Array, rows: SamplingRows | None
) -> SampleOutput:
    """One token for each of the hidden states [R + P, D]."""
    if config.parallel.size == 1 or mode == SamplingMode.FULL:
        logits = compute_logits(params, config.model, hidden, config.parallel)  # [R + P, V]
        num_logprobs = config.num_logprobs if mode == SamplingMode.FULL else 0
        sampled: SampleOutput = config.ops.sample.function(logits, rows, mode=mode, num_logprobs=num_logprobs)
        return sampled
    # Each device looks for the best of its tokens: gathering the logits would take a good part of a decode step.
    logits = logits_of_part(params, config.model, hidden)
    first_token = config.parallel.offset(logits.shape[1])
    score, token_ids = best_of_part(
        logits, rows, mode=mode, first_token=first_token, vocab_size=config.model.vocab_size
    )
    scores, token_ids = (config.parallel.gather(x[:, None], axis=1) for x in (score, token_ids))  # [R + P, devices]
    best = first_argmax(scores)
    return SampleOutput(jnp.take_along_axis(token_ids, best[:, None], axis=1)[:, 0])


def _bounded(shape: StepShape, slots: Slots, inputs: ModelInput) -> ModelInput:
    """The inputs with whatever becomes an index clipped: on some devices one out of range is no wrong token but a failed device."""
    sink, max_len = slots.num_tokens.shape[0] - 1, slots.tokens.shape[1]
    bounded: ModelInput = inputs.replace(  # type: ignore[attr-defined]
        decode_slots=jnp.clip(inputs.decode_slots, 0, sink),
        tile_slots=jnp.clip(inputs.tile_slots, 0, sink),
        tile_starts=jnp.clip(inputs.tile_starts, 0, max_len - 1),
        tile_lens=jnp.clip(inputs.tile_lens, 0, shape.tile_size),
    )
    return bounded


def _lay_out(shape: StepShape, block_size: int, slots: Slots, inputs: ModelInput) -> _Rectangles:
    num_rows, num_tiles, tile_size = shape.decode_rows, shape.prefill_tiles, shape.tile_size
    sink = slots.num_tokens.shape[0] - 1
    max_len = slots.tokens.shape[1]
    # A row that reached its limit within the dispatch, or after the host planned it, computes nothing more.
    num_tokens = jnp.clip(slots.num_tokens[inputs.decode_slots], 0, max_len)  # [R]
    is_active = num_tokens < slots.max_total_tokens[inputs.decode_slots]
    decode_positions = jnp.maximum(num_tokens - 1, 0)
    offsets = jnp.arange(tile_size, dtype=jnp.int32)[None, :]
    tile_positions = jnp.minimum(inputs.tile_starts[:, None] + offsets, max_len - 1)  # [P, C]
    decode_tokens = slots.tokens[inputs.decode_slots, decode_positions]
    tile_tokens = slots.tokens[inputs.tile_slots[:, None], tile_positions]
    decode_places = _places(inputs.decode_tables, decode_positions[:, None], is_active[:, None], block_size)
    tile_places = _places(inputs.tile_tables, tile_positions, offsets < inputs.tile_lens[:, None], block_size)
    last_of_tile = num_rows + jnp.arange(num_tiles, dtype=jnp.int32) * tile_size + jnp.maximum(inputs.tile_lens - 1, 0)
    return _Rectangles(
        decode_lens=jnp.where(is_active, num_tokens, 0),
        decode_query_lens=is_active.astype(jnp.int32),
        tile_lens=inputs.tile_starts + inputs.tile_lens,
        positions=jnp.concatenate([decode_positions, tile_positions.reshape(-1)]),
        write_blocks=jnp.concatenate([decode_places[0], tile_places[0]]),
        write_offsets=jnp.concatenate([decode_places[1], tile_places[1]]),
        token_ids=jnp.concatenate([decode_tokens, tile_tokens.reshape(-1)]),
        slots=jnp.concatenate(
            [jnp.where(is_active, inputs.decode_slots, sink), jnp.where(inputs.tile_samples, inputs.tile_slots, sink)]
        ),
        last_token=jnp.concatenate([jnp.arange(num_rows, dtype=jnp.int32), last_of_tile]),
    )


def _places(
    tables: jax.Array, positions: jax.Array, is_real: jax.Array, block_size: int
) -> tuple[jax.Array, jax.Array]:
    """Block and offset, each [rows x width], of the tokens at `positions` [rows, width]; the null block where not real.

    Positions are not negative, so division needs no rounding towards minus infinity.
    """
    block_idx = jnp.minimum(jax.lax.div(positions, np.int32(block_size)), tables.shape[1] - 1)
    blocks = jnp.where(is_real, jnp.take_along_axis(tables, block_idx, axis=1), NULL_BLOCK)
    return blocks.reshape(-1), jnp.where(is_real, jax.lax.rem(positions, np.int32(block_size)), 0).reshape(-1)


def _places_of_step(shape: StepShape, inputs: ModelInput, rectangles: _Rectangles) -> StepPlaces:
    parts = []
    if shape.decode_rows:
        lens = (rectangles.decode_lens, rectangles.decode_query_lens)
        parts.append(RowsOfTokens(inputs.decode_tables, *lens, width=1))
    if shape.prefill_tiles:
        lens = (rectangles.tile_lens, inputs.tile_lens)
        parts.append(RowsOfTokens(inputs.tile_tables, *lens, width=shape.tile_size))
    return StepPlaces(rectangles.write_blocks, rectangles.write_offsets, parts)


def _make_attend(config: StepConfig, places: StepPlaces) -> Attend:
    """Attention for the model: writes the layer's keys and values, then calls the op once per rectangle."""
    model = config.model

    def attend(
        q: jax.Array, k: jax.Array, v: jax.Array, kv_cache: Any, info: LayerInfo
    ) -> tuple[jax.Array, jax.Array | tuple[jax.Array, ...]]:
        cache, first_block = _layer_cache(kv_cache, info, model.num_layers)
        here = places.shifted(first_block)
        cache = config.ops.write_kv.function(cache, k, v, here)
        outs, first = [], 0
        for rows in here.rectangles:
            end = first + rows.block_tables.shape[0] * rows.width
            out = config.ops.paged_attention.function(
                q[first:end].reshape(-1, rows.width, *q.shape[1:]),  # [rows, width, N_q, H]
                cache,
                rows.block_tables,
                rows.seq_lens,
                rows.query_lens,
                scale=model.attention_scale,
                sliding_window=info.sliding_window,
                soft_cap=model.attention_soft_cap,
            )
            outs.append(out.reshape(-1, *q.shape[1:]))
            first = end
        return jnp.concatenate(outs) if len(outs) > 1 else outs[0], _with_layer_cache(kv_cache, info, cache)

    return attend


def _make_run_layer(config: StepConfig, places: StepPlaces) -> RunLayer | None:
    """A whole layer as one op, where the device has it."""
    fused = config.ops.fused_layer
    if fused is None:
        return None
    # Compiled inside the step's program: layers that are alike are then traced and lowered once.
    traced_once = jax.jit(fused, static_argnames="spec")

    def run_layer(
        layer: Layer, x: jax.Array, rope: tuple[jax.Array, jax.Array], kv_cache: Any, info: LayerInfo
    ) -> tuple[jax.Array, Any]:
        cache, _ = _layer_cache(kv_cache, info, config.model.num_layers)
        assert info.sliding_window is None or isinstance(info.sliding_window, int), "fused layers are unrolled"
        x, cache = traced_once(layer, x, rope, cache, places, spec=layer_spec(config.model, info.sliding_window))
        return x, _with_layer_cache(kv_cache, info, cache)

    return run_layer


def _layer_cache(kv_cache: Any, info: LayerInfo, num_layers: int) -> tuple[jax.Array, Any]:
    """The array that holds a layer's blocks, and where in it they begin."""
    if isinstance(kv_cache, tuple):
        assert isinstance(info.layer_idx, int)
        return kv_cache[info.layer_idx], 0
    return kv_cache, info.layer_idx * (kv_cache.shape[0] // num_layers)


def _with_layer_cache(kv_cache: Any, info: LayerInfo, cache: jax.Array) -> jax.Array | tuple[jax.Array, ...]:
    if isinstance(kv_cache, tuple):
        assert isinstance(info.layer_idx, int)
        return (*kv_cache[: info.layer_idx], cache, *kv_cache[info.layer_idx + 1 :])
    return cache


def _sampling_rows(slots: Slots, slot_ids: jax.Array, mode: SamplingMode) -> SamplingRows | None:
    """Gathers the sampling parameters and the history of the rows that the mode reads."""
    if mode == SamplingMode.GREEDY:
        return None
    position = slots.num_tokens[slot_ids]
    rows = SamplingRows(temperature=slots.temperature[slot_ids], key=slots.key[slot_ids], position=position)
    if mode == SamplingMode.RANDOM:
        return rows
    full: SamplingRows = rows.replace(  # type: ignore[attr-defined]
        history=slots.tokens[slot_ids],
        num_tokens=position,
        **{
            name: getattr(slots, name)[slot_ids]
            for name in (
                "top_k",
                "top_p",
                "min_p",
                "repetition_penalty",
                "presence_penalty",
                "frequency_penalty",
                "prompt_len",
                "bias_ids",
                "bias_values",
                "allowed_mask",
                "min_tokens",
                "stop_ids",
                "bad_words",
            )
        },
    )
    return full


def _append(slots: Slots, slot_ids: jax.Array, token_ids: jax.Array) -> Slots:
    """Each sampled token goes to the end of its slot's tokens. The sink's length stays 0, so it is never active."""
    sink = slots.num_tokens.shape[0] - 1
    num_tokens = jnp.clip(slots.num_tokens[slot_ids], 0, slots.tokens.shape[1])
    end = jnp.minimum(num_tokens, slots.tokens.shape[1] - 1)
    appended: Slots = slots.replace(  # type: ignore[attr-defined]
        tokens=slots.tokens.at[slot_ids, end].set(token_ids, mode="promise_in_bounds"),
        num_tokens=slots.num_tokens.at[slot_ids].set(
            jnp.where(slot_ids == sink, 0, num_tokens + 1), mode="promise_in_bounds"
        ),
    )
    return appended


def _prompt_logprobs(
    config: StepConfig, shape: StepShape, params: Any, hidden: jax.Array, slots: Slots, inputs: ModelInput
) -> Logprobs:
    """Log-probabilities of the token that follows each tile token, one tile's logits in memory at a time."""
    tiles = hidden[shape.decode_rows :].reshape(shape.prefill_tiles, shape.tile_size, -1)  # [P, C, D]
    offsets = jnp.arange(1, shape.tile_size + 1, dtype=jnp.int32)[None, :]
    following = jnp.minimum(inputs.tile_starts[:, None] + offsets, slots.tokens.shape[1] - 1)
    targets = slots.tokens[inputs.tile_slots[:, None], following]  # [P, C]

    def one_tile(tile: tuple[jax.Array, jax.Array]) -> Logprobs:
        hidden, targets = tile
        return compute_logprobs(
            compute_logits(params, config.model, hidden, config.parallel), targets, config.num_logprobs
        )

    logprobs: Logprobs = jax.lax.map(one_tile, (tiles, targets))
    return logprobs
