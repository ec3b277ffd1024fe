"""One pass of a model over the tokens of a step, and the sampling of its logits: the part that the target and a draft model share.

T tokens, R rows of logits, D hidden, N_q query heads, H head_dim, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from quire.engine.block_pool import NULL_BLOCK
from quire.engine.device_state import Slots
from quire.kernels.ops import Ops
from quire.kernels.paged_attention.contract import StepPlaces
from quire.kernels.sampling.logits import MASKED
from quire.kernels.sampling.reference import best_of_part, first_argmax
from quire.kernels.sampling.rows import SampleOutput, SamplingMode, SamplingRows
from quire.models.config import ModelConfig
from quire.models.decoder import (
    Attend,
    ForwardOutput,
    LayerInfo,
    RunLayer,
    compute_logits,
    forward,
    layer_spec,
    logits_of_part,
)
from quire.models.eagle import EagleConfig, fuse_features, head_keys_values, head_rope, head_spec
from quire.models.parallel import ALONE, Parallel
from quire.models.params import Layer


@dataclass(frozen=True)
class StepModel:
    """A model as steps run it."""

    config: ModelConfig
    ops: Ops
    parallel: Parallel = ALONE
    num_sampled: int | None = None
    """Tokens that are sampled from, where it is not the model's own vocabulary: what that lacks is never sampled."""

    def run(
        self,
        params: Any,
        token_ids: jax.Array,
        positions: jax.Array,
        kv_cache: Any,
        places: StepPlaces,
        captured_layers: tuple[int, ...] = (),
    ) -> ForwardOutput:
        """Hidden states [T, D] of tokens [T] int32 at positions [T] int32, and the cache with their keys and values in it.

        With `captured_layers`, also the hidden states that enter those.
        """
        return forward(
            params,
            self.config,
            token_ids,
            positions,
            kv_cache,
            make_attend(self, places),
            _make_run_layer(self, places),
            self.parallel,
            self.ops.experts.function,
            captured_layers=captured_layers,
        )

    def sample(
        self,
        params: Any,
        hidden: jax.Array,
        rows: SamplingRows | None,
        mode: SamplingMode,
        num_logprobs: int,
        is_used: jax.Array,
    ) -> SampleOutput:
        """One token for each of the hidden states [R, D], any token where `is_used` [R] bool is not set; logprobs only in FULL."""
        if self.parallel.size == 1 or mode == SamplingMode.FULL:
            logits = self._resized(compute_logits(params, self.config, hidden, self.parallel, is_used))
            num_logprobs = num_logprobs if mode == SamplingMode.FULL else 0
            sampled: SampleOutput = self.ops.sample.function(
                logits, rows, mode=mode, num_logprobs=num_logprobs, is_used=is_used
            )
            return sampled
        # Each device looks for the best of its tokens: gathering the logits would take a good part of a decode step.
        logits = logits_of_part(params, self.config, hidden, is_used)
        first_token = self.parallel.offset(logits.shape[1])
        vocab_size = min(self.config.vocab_size, self.num_sampled or self.config.vocab_size)
        score, token_ids = best_of_part(logits, rows, mode=mode, first_token=first_token, vocab_size=vocab_size)
        scores, token_ids = (self.parallel.gather(x[:, None], axis=1) for x in (score, token_ids))  # [R, devices]
        best = first_argmax(scores)
        return SampleOutput(jnp.take_along_axis(token_ids, best[:, None], axis=1)[:, 0])

    def _resized(self, logits: jax.Array) -> jax.Array:
        missing = (self.num_sampled or logits.shape[1]) - logits.shape[1]
        if missing <= 0:
            return logits[:, : self.num_sampled]
        return jnp.pad(logits, ((0, 0), (0, missing)), constant_values=MASKED)


def places_of_tokens(
    tables: jax.Array, positions: jax.Array, is_real: jax.Array, block_size: int
) -> tuple[jax.Array, jax.Array]:
    """Block and offset, each [rows x width], of the tokens at `positions` [rows, width]; the null block where not real.

    Positions are not negative, so division needs no rounding towards minus infinity.
    """
    block_idx = jnp.minimum(jax.lax.div(positions, np.int32(block_size)), tables.shape[1] - 1)
    blocks = jnp.where(is_real, jnp.take_along_axis(tables, block_idx, axis=1), NULL_BLOCK)
    return blocks.reshape(-1), jnp.where(is_real, jax.lax.rem(positions, np.int32(block_size)), 0).reshape(-1)


def make_attend(part: StepModel, places: StepPlaces) -> Attend:
    """Attention for the model: writes the layer's keys and values, then calls the op once per rectangle."""
    model = part.config

    def attend(
        q: jax.Array, k: jax.Array, v: jax.Array, kv_cache: Any, info: LayerInfo
    ) -> tuple[jax.Array, jax.Array | tuple[jax.Array, ...]]:
        cache, first_block = _layer_cache(kv_cache, info, model.num_layers)
        here = places.shifted(first_block)
        cache = part.ops.write_kv.function(cache, k, v, here)
        outs, first = [], 0
        for rows in here.rectangles:
            end = first + rows.block_tables.shape[0] * rows.width
            out = part.ops.paged_attention.function(
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


def with_head_entries(
    part: StepModel,
    params: Any,
    head: EagleConfig,
    captured: jax.Array,
    embeddings: jax.Array,
    kv_cache: Any,
    positions: jax.Array,
    places: StepPlaces,
) -> tuple[jax.Array, Any]:
    """Features [T, D] of what was captured of T tokens, and the cache of a head with an entry for each that has a place.

    `captured` [T, C], `embeddings` [T, D] of the tokens after, `positions` [T] int32. Features of padding may be anything.
    """
    is_used = places.write_blocks != NULL_BLOCK
    info = LayerInfo(0, None)
    cache, _ = _layer_cache(kv_cache, info, part.config.num_layers)
    fused = part.ops.fused_head_entries
    if fused is None:
        features = fuse_features(params, captured, is_used)
        k, v = head_keys_values(params, head, embeddings, features, positions, is_used)
        cache = part.ops.write_kv.function(cache, k, v, places)
    else:
        rope = head_rope(head, positions)
        features, cache = fused(params, captured, embeddings, rope, cache, places, is_used, head_spec(head))
    return features, _with_layer_cache(kv_cache, info, cache)


def _make_run_layer(part: StepModel, places: StepPlaces) -> RunLayer | None:
    """A whole layer as one op, where the device has it."""
    fused = part.ops.fused_layer
    if fused is None:
        return None
    # Compiled inside the step's program: layers that are alike are then traced and lowered once.
    traced_once = jax.jit(fused, static_argnames="spec")

    def run_layer(
        layer: Layer, x: jax.Array, rope: tuple[jax.Array, jax.Array], kv_cache: Any, info: LayerInfo
    ) -> tuple[jax.Array, Any]:
        cache, _ = _layer_cache(kv_cache, info, part.config.num_layers)
        assert info.sliding_window is None or isinstance(info.sliding_window, int), "fused layers are unrolled"
        x, cache = traced_once(layer, x, rope, cache, places, spec=layer_spec(part.config, info.sliding_window))
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


_FULL_FIELDS = (
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


def sampling_fields(mode: SamplingMode) -> tuple[str, ...]:
    """The fields of Slots that `sampling_rows` reads, beside the tokens."""
    if mode == SamplingMode.GREEDY:
        return ()
    return ("temperature", "key") if mode == SamplingMode.RANDOM else ("temperature", "key", *_FULL_FIELDS)


def sampling_rows(slots: Slots, slot_ids: jax.Array, num_tokens: jax.Array, mode: SamplingMode) -> SamplingRows | None:
    """Gathers the sampling parameters and the history of the rows that the mode reads.

    slot_ids [R] int32; num_tokens [R] int32 counts the tokens that each row's next one follows, drafts among them.
    """
    if mode == SamplingMode.GREEDY:
        return None
    rows = SamplingRows(temperature=slots.temperature[slot_ids], key=slots.key[slot_ids], position=num_tokens)
    if mode == SamplingMode.RANDOM:
        return rows
    full: SamplingRows = rows.replace(  # type: ignore[attr-defined]
        history=slots.tokens[slot_ids],
        num_tokens=num_tokens,
        **{name: getattr(slots, name)[slot_ids] for name in _FULL_FIELDS},
    )
    return full
