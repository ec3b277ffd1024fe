"""A step while the scheduler puts it together."""

from __future__ import annotations

from dataclasses import dataclass, field

from quire.engine.draft_scheduler import DraftScheduler
from quire.engine.request import Request
from quire.engine.step_data import AdmittedRequest, BlockUpdate, CatchUp, DecodeRow, PrefillChunk, SchedulerOutput


@dataclass
class StepPlan:
    """A step while it is being put together."""

    drafts: DraftScheduler | None
    """Who decides about drafts; None also where it has nothing to do with this step."""
    tokens_left: int
    tiles_left: int
    num_admissible: int
    num_decode_steps: int
    may_draft: bool
    num_drafts: int = 0
    admitted: list[AdmittedRequest] = field(default_factory=list)
    block_updates: list[BlockUpdate] = field(default_factory=list)
    decode: list[DecodeRow] = field(default_factory=list)
    prefill: list[PrefillChunk] = field(default_factory=list)
    chunked: list[Request] = field(default_factory=list)
    catch_up: list[CatchUp] = field(default_factory=list)
    wakes_head: bool = False
    has_preempted: bool = False
    num_padding_tiles: int = 0

    def output(self, *, step_idx: int, padded_decode_rows: int) -> SchedulerOutput:
        """The step as it was put together."""
        return SchedulerOutput(
            step_idx=step_idx,
            admitted=self.admitted,
            block_updates=self.block_updates,
            decode=self.decode,
            prefill=self.prefill,
            num_decode_steps=self.num_decode_steps,
            padded_decode_rows=padded_decode_rows,
            num_padding_tiles=self.num_padding_tiles,
            num_drafts=self.num_drafts,
            catch_up=self.catch_up,
            wakes_head=self.wakes_head,
        )


@dataclass
class SchedulerCounters:
    """Counts since the start; only ever grow."""

    num_steps: int = 0
    num_preemptions: int = 0
    num_finished: int = 0
    num_prompt_tokens: int = 0
    num_generation_tokens: int = 0


def admitted_request(request: Request) -> AdmittedRequest:
    """What the device must know of a request that has its slot and its blocks."""
    return AdmittedRequest(
        request_id=request.request_id,
        slot=request.slot,
        token_ids=list(request.token_ids),
        prompt_len=request.prompt_len,
        max_total_tokens=request.max_total_tokens,
        params=request.params,
        stop_ids=(*sorted(request.eos_token_ids), *sorted(request.stop_ids)),
        bad_words=request.source.bad_words,
        block_ids=list(request.block_ids),
        num_drafted=request.num_drafted,
        draft_hole=request.draft_hole,
    )
