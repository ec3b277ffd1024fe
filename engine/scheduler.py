"""Decides, before every step, which tokens of which requests are computed. Runs in microseconds, never imports jax."""

from __future__ import annotations

import time
from bisect import insort
from collections.abc import Callable, Sequence

from quire.engine.admission import AdmissionPolicy, Headroom
from quire.engine.block_pool import NULL_BLOCK
from quire.engine.draft_scheduler import DraftScheduler
from quire.engine.kv_cache_manager import CachedPrefix, KVCacheManager
from quire.engine.outputs import FinishReason
from quire.engine.request import EngineCoreRequest, Request
from quire.engine.step_data import (
    BlockUpdate,
    DecodeRow,
    DraftRound,
    EngineCoreOutput,
    ModelRunnerOutput,
    PrefillChunk,
    SchedulerOutput,
    StepLimits,
    TokenLogprobs,
)
from quire.engine.step_plan import SchedulerCounters, StepPlan, admitted_request
from quire.kernels.errors import InvalidRequestError, OutOfBlocksError

# Waiting requests that one step passes over because another is computing their prefix; those behind wait for the next step.
MAX_PASSED_OVER = 32


def _sort_key(request: Request) -> tuple[float, int]:
    return request.order


class Scheduler:
    """Owns the requests, from arrival to the last token, and the order in which they are served.

    `schedule` may be called again before the last step's result is in: tokens that are in flight count as tokens, and the
    device feeds them to the next step itself. `update_from_output` must be called once per step, in order.
    Knows nothing of devices, shapes, text or time beyond the arrival of a request.
    """

    def __init__(
        self,
        kv_cache: KVCacheManager,
        limits: StepLimits,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        admission: AdmissionPolicy,
        decode_steps_per_dispatch: int = 1,
        priority_seconds: float = 0.0,
        drafts: DraftScheduler | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`priority_seconds` is how much later a request counts as arrived per unit of priority; 0 is first come, first served.

        `drafts` decides about speculation, None for none.
        """
        assert max_num_seqs <= limits.max_decode_rows, (max_num_seqs, limits)
        self.kv_cache = kv_cache
        self.limits = limits
        self.num_slots = max_num_seqs
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self.counters = SchedulerCounters()
        self.requests: dict[str, Request] = {}
        self.running: list[Request] = []
        self.waiting: list[Request] = []
        self.drafts = drafts
        self._admission = admission
        self._headroom = Headroom(kv_cache.block_size)
        self._decode_steps_per_dispatch = decode_steps_per_dispatch
        self._priority_seconds = priority_seconds
        self._clock = clock
        self._free_slots = list(range(max_num_seqs - 1, -1, -1))
        self._num_arrivals = 0
        self._last_was_prefill = False

    # ---- requests in and out

    def add_request(self, source: EngineCoreRequest) -> None:
        """Queues a request.

        Raises InvalidRequestError when the prompt cannot fit, or the id is in use; OutOfBlocksError when the whole cache
        could not hold it.
        """
        prompt_len = len(source.prompt_token_ids)
        if source.request_id in self.requests:
            raise InvalidRequestError(f"request id {source.request_id!r} is in use; give each request its own")
        if prompt_len == 0:
            raise InvalidRequestError("the prompt is empty; give at least one token", parameter="prompt")
        if prompt_len >= self.max_model_len:
            raise InvalidRequestError(
                f"the prompt has {prompt_len} tokens, and max_model_len is {self.max_model_len}, which leaves no room for a "
                "token to be generated; shorten the prompt or raise max_model_len",
                parameter="prompt",
            )
        order = (source.arrival_time + self._priority_seconds * source.priority, self._num_arrivals)
        max_drafts = 0 if self.drafts is None else self.drafts.max_drafts
        request = Request(source, max_model_len=self.max_model_len, order=order, max_drafts=max_drafts)
        if self.drafts is not None:
            request.draft_acceptance = self.drafts.policy.new_acceptance()
        needed, usable = self.kv_cache.num_blocks_for(request.max_total_tokens), self.kv_cache.pool.num_usable
        if needed > usable:
            raise OutOfBlocksError(
                f"the request may grow to {request.max_total_tokens} tokens, {needed} blocks, and the KV cache has {usable}; "
                "lower max_tokens or raise num_kv_blocks"
            )
        self._num_arrivals += 1
        self.requests[request.request_id] = request
        insort(self.waiting, request, key=_sort_key)

    def abort_request(self, request_id: str, *, has_finished: bool = False) -> bool:
        """Ends a request at once and frees its blocks; False when there is none by that id (it may just have finished).

        `has_finished` when it came to its end in a way that only its caller can see, at a stop string.
        """
        request = self.requests.get(request_id)
        if request is None:
            return False
        self._remove(request)
        if has_finished:
            self._count_finished()
        return True

    @property
    def has_unfinished_requests(self) -> bool:
        """Whether any request is waiting or running."""
        return bool(self.requests)

    def set_admission_policy(self, policy: AdmissionPolicy) -> None:
        """Changes how waiting requests are let in. What runs goes on; a static batch forms once it has ended."""
        self._admission = policy

    def reconfigure(self, *, max_num_seqs: int, max_num_batched_tokens: int, priority_seconds: float) -> None:
        """Changes the limits of later steps, within what was compiled. Requests in excess run on to their end."""
        assert 1 <= max_num_seqs <= self.num_slots, (max_num_seqs, self.num_slots)
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self._priority_seconds = priority_seconds

    # ---- a step

    def schedule(self) -> SchedulerOutput | None:
        """The next step, or None when there is nothing that can be computed before another result is in."""
        plan = self._new_plan()
        prefill_first = not self.limits.mixed_batches and not self._last_was_prefill and self._wants_prefill(plan)
        held = self._admission.computes_prompts_first and self._wants_prefill(plan)
        if not prefill_first and not held:
            self._schedule_decodes(plan)
        if self.limits.mixed_batches or not plan.decode:
            self._schedule_chunks(plan)
            self._admit(plan)
        if not (plan.decode or plan.prefill) and (prefill_first or held):
            self._schedule_decodes(plan)
        if not (plan.decode or plan.prefill):
            return None
        if plan.drafts is not None:
            plan.drafts.give_to_head(self.running, plan.num_decode_steps, has_prompts=bool(plan.prefill))
        for request in plan.chunked:
            self.kv_cache.publish_full_blocks(request)
        self._last_was_prefill = bool(plan.prefill)
        self.counters.num_steps += 1
        return plan.output(
            step_idx=self.counters.num_steps,
            padded_decode_rows=self._admission.padded_decode_rows() if plan.decode else 0,
        )

    def update_from_output(self, step: SchedulerOutput, result: ModelRunnerOutput) -> list[EngineCoreOutput]:
        """Takes a step's tokens in; what each request gained by it.

        Rows whose request was ended by an earlier token or an abort while the step was in flight count for nothing, also
        when another request has taken the id since.
        """
        outputs = []
        num_rows = len(step.decode)
        rounds = result.rounds or [[]] * num_rows
        decoded = zip(step.decode, result.token_ids[:num_rows], result.logprobs[:num_rows], rounds, strict=True)
        for row, token_ids, logprobs, row_rounds in decoded:
            request = self.requests.get(row.request_id)
            if request is not None and request.order[1] == row.arrival_idx:
                request.num_in_flight -= row.num_tokens
                request.num_surely_in_flight -= row.min_tokens
                outputs.append(self._append(request, token_ids, logprobs, rounds=row_rounds, num_asked=row.num_drafts))
        sampled = zip(result.token_ids[num_rows:], result.logprobs[num_rows:], strict=True)
        for chunk in step.prefill:
            token_ids, logprobs = next(sampled) if chunk.samples else ([], None)
            request = self.requests.get(chunk.request_id)
            if request is None or request.order[1] != chunk.arrival_idx:
                continue
            prompt_logprobs = self._new_prompt_logprobs(request, chunk, result)
            if chunk.samples:
                request.num_in_flight -= 1
                request.num_surely_in_flight -= 1
                outputs.append(self._append(request, token_ids, logprobs, prompt_logprobs))
            elif prompt_logprobs:
                outputs.append(self._append(request, [], None, prompt_logprobs))
        return outputs

    # ---- the parts of a step

    def _new_plan(self) -> StepPlan:
        num_admissible, drafts = 0, self.drafts
        if self.waiting and len(self.running) < self.max_num_seqs:
            num_admissible = self._admission.num_admissible(self.waiting, self.running, self._clock())
            # Whether anybody comes in decides on long dispatches and drafts.
            is_long = self._decode_steps_per_dispatch > 1 or drafts is not None
            if num_admissible and is_long and not self._first_fits():
                self._admission.admitted(0, True)
                num_admissible = 0
        # Prompts are not kept waiting by the rest of a long dispatch, nor for drafts.
        decodes_alone = not num_admissible and all(request.num_uncomputed_tokens <= 1 for request in self.running)
        num_decode_steps = self._decode_steps_per_dispatch if decodes_alone else 1
        if drafts is not None and decodes_alone and self.running and drafts.passes_over(num_decode_steps):
            drafts = None
        return StepPlan(
            drafts=drafts,
            tokens_left=self.max_num_batched_tokens,
            tiles_left=self.limits.max_prefill_tiles,
            num_admissible=num_admissible,
            num_decode_steps=num_decode_steps,
            may_draft=decodes_alone or not self.limits.mixed_batches,
        )

    def _wants_prefill(self, plan: StepPlan) -> bool:
        return plan.num_admissible > 0 or any(request.num_uncomputed_tokens > 1 for request in self.running)

    def _schedule_decodes(self, plan: StepPlan) -> None:
        """One row for every request whose newest token is all that is left to compute, the first in order first.

        A row takes one token of the budget, however many steps the dispatch has: the budget bounds each of them.
        """
        idx, drafts, running, num_steps = 0, plan.drafts, self.running, plan.num_decode_steps
        if drafts is not None:
            decoding = (request for request in running if request.can_decode)
            plan.num_drafts = drafts.begin_step(decoding, plan.tokens_left, may_draft=plan.may_draft)
            plan.wakes_head = drafts.wakes_head
        concerned = drafts if drafts and drafts.concerns_rows else None
        while idx < len(running) and len(plan.decode) < plan.tokens_left:
            request = running[idx]
            idx += 1
            if not request.can_decode:
                continue
            if self.kv_cache.has_window:
                self._release_out_of_window(plan, request)
            num_drafts = self._make_room(plan, request, num_steps)
            if num_drafts is None:
                continue
            if concerned is not None:
                concerned.planned(request, num_drafts, num_steps)
            # Each step brings a token at least, and every draft of it at most; the row has room for less near its end.
            num_tokens = min(num_steps * (1 + num_drafts), request.max_total_tokens - request.least_tokens)
            min_tokens = min(num_steps, request.max_total_tokens - request.most_tokens)
            request.num_in_flight += num_tokens
            request.num_surely_in_flight += min_tokens
            end = request.num_computed_tokens = request.most_tokens - 1
            row = DecodeRow(request.request_id, request.order[1], request.slot, end, num_tokens, min_tokens, num_drafts)
            plan.decode.append(row)
        plan.tokens_left -= len(plan.decode)
        if drafts is not None and plan.decode:
            plan.catch_up = drafts.end_step(num_steps)

    def _make_room(self, plan: StepPlan, request: Request, num_steps: int) -> int | None:
        """Gives a decode row the blocks that it may fill in `num_steps` steps; how many tokens may be drafted for it.

        Nobody loses blocks for drafts: where they would not fit, there are none. None when the request went itself.
        """
        drafts = plan.drafts.num_drafts_for(request) if plan.num_drafts and plan.drafts is not None else 0
        held = len(request.block_ids) * self.kv_cache.block_size
        for num_drafts in (drafts, 0) if drafts else (0,):
            end = min(request.most_tokens + num_steps * (1 + num_drafts), request.max_total_tokens) - 1
            if end <= held:
                return num_drafts
            if num_drafts and self._extend(plan, request, end):
                return num_drafts
        return 0 if self._grow(plan, request, end) else None

    def _extend(self, plan: StepPlan, request: Request, num_tokens: int) -> bool:
        """Makes room for the request to hold `num_tokens`; False, and nothing done, where there are no free blocks for them."""
        first_idx = len(request.block_ids)
        blocks = self.kv_cache.grow(request, num_tokens)
        if blocks is None:
            return False
        plan.block_updates.append(BlockUpdate(request.slot, first_idx, blocks))
        return True

    def _grow(self, plan: StepPlan, request: Request, num_tokens: int) -> bool:
        """Makes room for the request to hold `num_tokens`, preempting from the back of the order; False when it went itself."""
        while not self._extend(plan, request, num_tokens):
            victim = self.running[-1]
            self._preempt(victim)
            plan.has_preempted = True
            if victim is request:
                return False
        return True

    def _schedule_chunks(self, plan: StepPlan) -> None:
        """The next piece of every running request that is still catching up; its blocks were given on admission."""
        for request in self.running:
            if not plan.tiles_left or plan.tokens_left <= 0:
                return
            if request.num_uncomputed_tokens > 1:
                self._schedule_chunk(plan, request)

    def _schedule_chunk(self, plan: StepPlan, request: Request) -> None:
        tile_size = self.limits.tile_size
        start = request.num_computed_tokens
        room = min(plan.tokens_left, plan.tiles_left * tile_size)
        count = request.num_uncomputed_tokens
        if count > room:
            # A piece that is not the last ends on a tile's edge, so that no tile is half empty.
            count = room - room % tile_size or room
        if self.kv_cache.has_window:
            self._release_out_of_window(plan, request)
        request.num_computed_tokens = start + count
        samples = request.num_computed_tokens == len(request.token_ids)
        if samples:
            request.num_in_flight += 1
            request.num_surely_in_flight += 1
            if self.drafts is not None:
                self.drafts.sampled(request)
        plan.tokens_left -= count
        plan.tiles_left -= self.limits.num_tiles(count)
        if samples:
            padding = min(self.limits.num_tiles(self._admission.prompt_padding(request)), plan.tiles_left)
            plan.num_padding_tiles += padding
            plan.tiles_left -= padding
        plan.prefill.append(PrefillChunk(request.request_id, request.order[1], request.slot, start, count, samples))
        plan.chunked.append(request)

    def _admit(self, plan: StepPlan) -> None:
        """Lets waiting requests in, in order, while there are slots, tiles, tokens and blocks for all they have."""
        if plan.has_preempted or not plan.num_admissible:
            return
        num_passed, is_blocked = 0, False
        reserved = self._headroom.blocks(self.running)
        while (
            num_passed < min(len(self.waiting), MAX_PASSED_OVER)
            and len(plan.admitted) < plan.num_admissible
            and len(self.running) < self.max_num_seqs
            and plan.tiles_left
            and plan.tokens_left > 0
        ):
            request = self.waiting[num_passed]
            prefix = self.kv_cache.find_prefix(request)
            if request.num_in_flight or self.kv_cache.is_being_computed(request, prefix):
                num_passed += 1  # ready in a step or two: those behind it may go first, this once
                continue
            reserved += self._headroom.growth(request)
            if not self._fits(request, prefix, reserved):
                is_blocked = True
                break  # nobody overtakes a request that waits for blocks, or it might wait for ever
            del self.waiting[num_passed]
            self._let_in(plan, request, prefix)
        self._admission.admitted(len(plan.admitted), is_blocked)

    def _fits(self, request: Request, prefix: CachedPrefix, reserved: int) -> bool:
        """Whether there are blocks for all that a waiting request has, and `reserved` more for those that run to grow into."""
        needed = self.kv_cache.num_blocks_to_admit(request, prefix)
        if self.running:  # alone, it has the whole cache to grow into
            needed += reserved
        return needed <= self.kv_cache.pool.num_free

    def _first_fits(self) -> bool:
        """Whether the request that is to be let in next does not wait for blocks; if it does, so do all behind it."""
        request = self.waiting[0]
        prefix = self.kv_cache.find_prefix(request)
        if request.num_in_flight or self.kv_cache.is_being_computed(request, prefix):
            return True
        reserved = self._headroom.blocks(self.running) + self._headroom.growth(request)
        return self._fits(request, prefix, reserved)

    def _let_in(self, plan: StepPlan, request: Request, prefix: CachedPrefix) -> None:
        self.kv_cache.admit(request, prefix)
        self._headroom.admitted()
        request.num_computed_tokens = prefix.num_tokens
        if request.first_scheduled_time is None:
            request.first_scheduled_time = self._clock()
            request.num_cached_tokens = prefix.num_tokens
            self.counters.num_prompt_tokens += request.prompt_len
        request.slot = self._free_slots.pop()
        if self.drafts is not None:
            self.drafts.admitted(request)
        insort(self.running, request, key=_sort_key)
        plan.admitted.append(admitted_request(request))
        self._schedule_chunk(plan, request)

    def _release_out_of_window(self, plan: StepPlan, request: Request) -> None:
        first_idx, count = self.kv_cache.release_out_of_window(request)
        if count:
            plan.block_updates.append(BlockUpdate(request.slot, first_idx, [NULL_BLOCK] * count))

    def _preempt(self, request: Request) -> None:
        """Takes a request's blocks away; it waits again in its place of the order and computes its tokens anew."""
        self.running.remove(request)
        self._give_back(request)
        request.num_computed_tokens = 0
        request.num_preemptions += 1
        self.counters.num_preemptions += 1
        self._headroom.preempted()
        insort(self.waiting, request, key=_sort_key)

    # ---- the parts of an update

    def _new_prompt_logprobs(
        self, request: Request, chunk: PrefillChunk, result: ModelRunnerOutput
    ) -> list[TokenLogprobs] | None:
        """The chunk's prompt logprobs that were not handed out before a preemption made it compute them again."""
        found = result.prompt_logprobs.get(chunk.request_id)
        if found is None:
            return None
        new = found[max(request.num_prompt_logprobs - chunk.start, 0) :]
        request.num_prompt_logprobs += len(new)
        return new

    def _append(
        self,
        request: Request,
        token_ids: list[int],
        logprobs: list[TokenLogprobs] | None,
        prompt_logprobs: list[TokenLogprobs] | None = None,
        rounds: Sequence[DraftRound] = (),
        num_asked: int = 0,
    ) -> EngineCoreOutput:
        """Adds sampled tokens up to the first that ends the request."""
        finish_reason: FinishReason | None = None
        stop_reason: int | None = None
        tokens, num_new = request.token_ids, 0
        for token_id in token_ids:
            tokens.append(token_id)
            num_new += 1
            if token_id in request.end_ids and len(tokens) >= request.min_total_tokens:
                finish_reason, stop_reason = "stop", None if token_id in request.eos_token_ids else token_id
                break
            if len(tokens) >= request.max_total_tokens:
                finish_reason = "length"
                break
        self.counters.num_generation_tokens += num_new
        if request.slot >= 0:  # fewer drafts may have been accepted than might have been
            request.num_computed_tokens = min(request.num_computed_tokens, request.most_tokens - 1)
        # Publishing has nothing to do before another block is full, which spares most rows the call.
        if request.slot >= 0 and len(tokens) >= (request.num_hashed_blocks + 1) * self.kv_cache.block_size:
            self.kv_cache.publish_full_blocks(request)
        if finish_reason is not None:
            self._remove(request)
            self._count_finished()
        if rounds and self.drafts is not None:
            self.drafts.observe(request, rounds, num_asked)
        if num_new < len(token_ids):
            token_ids = token_ids[:num_new]
            logprobs = logprobs[:num_new] if logprobs is not None else None
        return EngineCoreOutput(
            request.request_id,
            token_ids,
            logprobs,
            prompt_logprobs,
            finish_reason,
            stop_reason,
            request.num_cached_tokens,
            request.num_preemptions,
            request.first_scheduled_time,
            rounds,
        )

    def _count_finished(self) -> None:
        self.counters.num_finished += 1
        self._headroom.finished()

    def _remove(self, request: Request) -> None:
        del self.requests[request.request_id]
        if request.slot >= 0:
            self.running.remove(request)
            self._give_back(request)
        else:
            self.waiting.remove(request)

    def _give_back(self, request: Request) -> None:
        self.kv_cache.release(request)
        self._free_slots.append(request.slot)
        request.slot = -1

    # ---- laws

    def check(self) -> None:
        """Asserts the scheduler's laws; cheap enough to run whenever the engine is idle."""
        self.kv_cache.check(self.running)
        assert len(self.requests) == len(self.running) + len(self.waiting)
        assert all(not request.block_ids and request.slot < 0 for request in self.waiting)
        slots = [request.slot for request in self.running]
        assert sorted([*slots, *self._free_slots]) == list(range(self.num_slots)), (slots, self._free_slots)
        assert self.running == sorted(self.running, key=_sort_key)
        assert self.waiting == sorted(self.waiting, key=_sort_key)
