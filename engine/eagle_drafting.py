"""The part of a compiled step that drafts with an EAGLE-3 head, which reads what the target's own layers computed.

R decode rows, K drafts, T tokens of a step, D hidden size of the head, S slots.

The head has an entry for every token but a row's newest: the feature of its position together with the token after it. Entries of
tokens that the target computed are written in the step that computes them, prompts included, so the head never has to catch up. While
it drafts it takes its own output for the features that the target has not computed yet, and what it writes then is written anew
once the target has.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from quire.backends.base import StepShape
from quire.engine.device_state import DeviceState
from quire.engine.drafting import DraftStep, Verified, write_tokens
from quire.engine.passes import StepModel, make_attend, places_of_tokens, sampling_rows, write_first_layer
from quire.kernels.paged_attention.contract import RowsOfTokens, StepPlaces
from quire.models.eagle import EagleConfig, embed_for_head, fuse_features, head_forward, head_keys_values, head_logits


@dataclass(frozen=True)
class EagleDrafter:
    """`quire.engine.drafting.Drafter`."""

    part: StepModel
    head: EagleConfig

    @property
    def captured_layers(self) -> tuple[int, ...]:
        return self.head.captured_layers

    def changed_by(self, shape: StepShape) -> Collection[str]:
        return ("draft_cache", "draft_features")

    def draft(self, step: DraftStep, state: DeviceState, limits: jax.Array) -> tuple[DeviceState, jax.Array]:
        slots, cache, rows, weights = state.slots, state.draft_cache, step.rows, step.weights
        sampling = step.shape.sampling
        sink, max_len = slots.num_tokens.shape[0] - 1, slots.tokens.shape[1]
        # A row that decodes has a prompt, and a token that was sampled after it.
        num_drafts = jnp.where(rows.num_tokens > 1, jnp.maximum(limits, 0), 0)
        features = state.draft_features[rows.slots]  # [R, D]
        for idx in range(step.shape.num_drafts):
            drafts_now = idx < num_drafts
            end = jnp.where(drafts_now, rows.num_tokens + idx, 0)  # where the draft goes
            position = jnp.clip(end - 2, 0, max_len - 1)  # of the feature
            token_ids = slots.tokens[rows.slots, jnp.clip(end - 1, 0, max_len - 1)]
            query_lens = drafts_now.astype(jnp.int32)
            places = places_of_tokens(rows.tables, position[:, None], drafts_now[:, None], step.block_size)
            rectangle = RowsOfTokens(rows.tables, jnp.where(drafts_now, position + 1, 0), query_lens, width=1)
            features, cache = head_forward(
                weights.draft,
                self.head,
                embed_for_head(weights.draft, self.head, weights.target, token_ids, self.part.parallel),
                features,
                position,
                cache,
                make_attend(self.part, StepPlaces(*places, [rectangle])),
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
        assert verified.captured is not None
        slots, weights, kept, num_rows = state.slots, step.weights, verified.kept, step.shape.decode_rows
        sink, max_len = slots.num_tokens.shape[0] - 1, slots.tokens.shape[1]
        features = fuse_features(weights.draft, verified.captured)  # [T, D]
        following = slots.tokens[kept.token_slots, jnp.minimum(kept.positions + 1, max_len - 1)]
        embeddings = embed_for_head(weights.draft, self.head, weights.target, following, self.part.parallel)
        k, v = head_keys_values(weights.draft, self.head, embeddings, features, kept.positions)
        cache = write_first_layer(self.part, state.draft_cache, k, v, kept.places)
        num_decoded = num_rows * step.shape.decode_width
        newest = jnp.arange(num_rows, dtype=jnp.int32) * step.shape.decode_width + verified.num_accepted
        slot_ids = jnp.concatenate([step.rows.slots, kept.slots[num_decoded:]])
        places = jnp.concatenate([newest, kept.last_token[num_decoded:]])
        latest = jnp.where((slot_ids == sink)[:, None], jnp.zeros_like(features[:1]), features[places])
        return state.replace(  # type: ignore[attr-defined, no-any-return]
            draft_cache=cache,
            draft_features=state.draft_features.at[slot_ids].set(latest, mode="promise_in_bounds"),
        )
