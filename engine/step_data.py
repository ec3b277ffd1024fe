"""What passes between the scheduler, the model runner and the frontend: plain frozen data, no jax, no tokenizer.

Scheduler --SchedulerOutput--> ModelRunner --ModelRunnerOutput--> Scheduler --EngineCoreOutput--> frontend
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from quire.engine.outputs import FinishReason
from quire.engine.sampling_params import SamplingParams


@dataclass(frozen=True)
class StepLimits:
    """How much one step of the compiled shapes can take.

    The prefill rectangle is made of tiles: `tile_size` consecutive tokens of one request each. A chunk of a prompt takes as
    many tiles as it fills, so short prompts lie side by side and a long one is spread over many tiles.
    """

    max_decode_rows: int
    max_prefill_tiles: int
    tile_size: int
    mixed_batches: bool

    def num_tiles(self, num_tokens: int) -> int:
        """Tiles that a chunk of `num_tokens` takes."""
        return -(-num_tokens // self.tile_size)


class AdmittedRequest(NamedTuple):
    """A request that takes a slot of the device's state: everything the device must know of it before its first token."""

    request_id: str
    slot: int
    token_ids: list[int]
    prompt_len: int
    max_total_tokens: int
    params: SamplingParams
    stop_ids: tuple[int, ...]
    bad_words: tuple[tuple[int, ...], ...]
    block_ids: list[int]
    num_drafted: int = 0
    """Leading tokens that a draft model's cache has already, in blocks that the request shares."""
    draft_hole: tuple[int, int] = (0, 0)
    """Blocks in which a head has nothing of the request, though the target has: the first, and how many."""


class DecodeRow(NamedTuple):
    """A row of the decode rectangle: the request's newest token, its drafts, and the tokens sampled within the same dispatch.

    The device knows where the newest token stands; `end` bounds from above how many tokens it will have computed. Between
    `min_tokens` and `num_tokens` come of it, the same number unless drafts are accepted. `num_drafts` is the most that
    may be drafted for it.
    """

    request_id: str
    arrival_idx: int
    slot: int
    end: int
    num_tokens: int
    min_tokens: int
    num_drafts: int = 0


class CatchUp(NamedTuple):
    """Tokens of a request that the draft model computes, so that it can draft: as many tiles, from where its cache ends.

    That is known on the device; `start` bounds it from below, where the cache has tokens that another request computed.
    `end` bounds from above how many tokens there are.
    """

    slot: int
    start: int
    end: int
    num_tiles: int


class PrefillChunk(NamedTuple):
    """Tokens `start ... start + num_tokens - 1` of a request; `samples` when they are the last it has."""

    request_id: str
    arrival_idx: int
    slot: int
    start: int
    num_tokens: int
    samples: bool


class BlockUpdate(NamedTuple):
    """Entries `first_idx ...` of a slot's block table become `block_ids`."""

    slot: int
    first_idx: int
    block_ids: list[int]


@dataclass(frozen=True)
class SchedulerOutput:
    """One step: which tokens of which requests, after which changes to slots and block tables.

    `num_decode_steps` tokens are sampled for every decode row within the dispatch (fewer where its `num_tokens` says so).
    With `num_drafts` each of them is a round of speculation, which may bring a row more than one token; before the step
    the draft model catches up with `catch_up`. `padded_decode_rows` is the least number of decode rows to compute, and
    `num_padding_tiles` how many tiles beside those of `prefill`: what a static batch computes in vain.
    """

    step_idx: int
    admitted: list[AdmittedRequest]
    block_updates: list[BlockUpdate]
    decode: list[DecodeRow]
    prefill: list[PrefillChunk]
    num_decode_steps: int = 1
    padded_decode_rows: int = 0
    num_padding_tiles: int = 0
    num_drafts: int = 0
    catch_up: list[CatchUp] = field(default_factory=list)
    wakes_head: bool = False
    """Whether it has the width of a step with drafts for rows that cannot have any before the next: a head passed their tokens over."""

    @property
    def num_tokens(self) -> int:
        """Tokens whose keys and values the step computes and keeps, at most."""
        return sum(row.num_tokens for row in self.decode) + sum(chunk.num_tokens for chunk in self.prefill)


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities at one position: the chosen token's, its rank (1 is the largest), and the most likely tokens."""

    logprob: float
    rank: int
    top_ids: tuple[int, ...]
    top_logprobs: tuple[float, ...]


class DraftRound(NamedTuple):
    """What came of drafting for one row once: how many tokens were proposed, and how many of them the target would have sampled too."""

    num_drafts: int
    num_accepted: int


@dataclass(frozen=True)
class ModelRunnerOutput:
    """What a step sampled: lists over the scheduled rows, decode rows first, then the chunks that sample, in their order.

    `logprobs[i]` has one entry per token of `token_ids[i]`, or is None when the row did not ask. `rounds[i]` are those of decode
    row i, empty for a step that drafts nothing. `prompt_logprobs` maps a request to
    the entries of the prompt positions `start + 1 ...` that the step computed.
    """

    token_ids: list[list[int]]
    logprobs: list[list[TokenLogprobs] | None]
    prompt_logprobs: dict[str, list[TokenLogprobs]]
    rounds: list[list[DraftRound]] = field(default_factory=list)


class EngineCoreOutput(NamedTuple):
    """What a step brought one request; a tuple, since one is made per row and step.

    `stop_reason` is the stop token id, None for the model's own end of sequence.
    """

    request_id: str
    new_token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    first_scheduled_time: float | None = None
    rounds: Sequence[DraftRound] = ()
