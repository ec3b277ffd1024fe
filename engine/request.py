"""A request, as the frontend sends it and as the scheduler tracks it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from quire.engine.sampling_params import SamplingParams


@dataclass(frozen=True)
class EngineCoreRequest:
    """What the frontend asks of the engine core: one prompt, one sequence (`n` is expanded by the frontend).

    `bad_words` are token ids, since the core has no tokenizer; `arrival_time` is in seconds of time.monotonic.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    arrival_time: float
    eos_token_ids: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    priority: int = 0
    cache_salt: str | None = None


class Request:
    """One sequence inside the scheduler.

    There is no prefill phase and no decode phase: `num_computed_tokens` catches up with the request's tokens. It counts
    every token that a dispatched step computes, also before that step's result is read; `num_in_flight` counts the
    tokens that dispatched steps will add. Where they speculate, both are bounds from above until the result is in, and
    `num_surely_in_flight` is the one from below. Owned and changed by the scheduler alone.
    """

    __slots__ = (
        "block_hashes",
        "block_ids",
        "cache_salt",
        "draft_acceptance",
        "draft_hole",
        "drafted_until",
        "end_ids",
        "eos_token_ids",
        "first_scheduled_time",
        "is_catching_up",
        "max_drafts",
        "max_total_tokens",
        "min_total_tokens",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_drafted",
        "num_hashed_blocks",
        "num_in_flight",
        "num_in_place",
        "num_nulled_blocks",
        "num_preemptions",
        "num_prompt_logprobs",
        "num_surely_in_flight",
        "order",
        "params",
        "prompt_len",
        "request_id",
        "slot",
        "source",
        "stop_ids",
        "token_ids",
    )

    def __init__(
        self, source: EngineCoreRequest, *, max_model_len: int, order: tuple[float, int], max_drafts: int = 0
    ) -> None:
        params = source.params
        self.source = source
        self.request_id = source.request_id
        self.params = params
        self.cache_salt = source.cache_salt
        self.token_ids = list(source.prompt_token_ids)
        self.prompt_len = len(self.token_ids)
        wanted = max_model_len if params.max_tokens is None else self.prompt_len + params.max_tokens
        self.max_total_tokens = min(wanted, max_model_len)
        self.eos_token_ids = frozenset(() if params.ignore_eos else source.eos_token_ids)
        self.stop_ids = frozenset(params.stop_token_ids)
        self.end_ids = self.eos_token_ids | self.stop_ids
        # With fewer tokens than these, none of the end_ids ends the request.
        self.min_total_tokens = self.prompt_len + params.min_tokens
        # The scheduler's sort key: the smaller goes first and is preempted last. It never changes, so no request overtakes for ever.
        self.order = order
        self.slot = -1
        self.num_computed_tokens = 0
        self.num_in_flight = 0
        self.num_surely_in_flight = 0
        self.num_cached_tokens = 0
        self.num_preemptions = 0
        self.num_prompt_logprobs = 0
        self.first_scheduled_time: float | None = None
        # How many tokens may be drafted for it at once, and how well that went.
        self.max_drafts = (
            max_drafts if params.num_speculative_tokens is None else min(max_drafts, params.num_speculative_tokens)
        )
        self.draft_acceptance: Any = None
        # Leading tokens that the draft model's cache has at least, and the round, in the draft scheduler's count, after which it lacks
        # one more of the newest with each at most.
        self.num_drafted = 0
        self.drafted_until = 0
        self.is_catching_up = False
        # Of a head: the blocks in which it has nothing, first and how many, and the leading tokens whose entries are where they belong.
        self.draft_hole = (0, 0)
        self.num_in_place = 0
        # Owned by the KV cache manager.
        self.block_ids: list[int] = []
        self.block_hashes: list[bytes] = []
        self.num_hashed_blocks = 0
        self.num_nulled_blocks = 0

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far whose values are known."""
        return len(self.token_ids) - self.prompt_len

    @property
    def num_uncomputed_tokens(self) -> int:
        """Tokens whose keys and values are still to be computed: 1 for a request that has caught up, whose newest token it is.

        The last token that may be generated never needs to be computed, and counts all the same.
        """
        return self.most_tokens - self.num_computed_tokens

    @property
    def can_decode(self) -> bool:
        """Whether the newest token is all that is left to compute, and not surely the last that it may have."""
        return self.num_uncomputed_tokens == 1 and self.least_tokens < self.max_total_tokens

    @property
    def most_tokens(self) -> int:
        """How many tokens it has at most once every dispatched step is done."""
        return min(len(self.token_ids) + self.num_in_flight, self.max_total_tokens)

    @property
    def least_tokens(self) -> int:
        """How many tokens it has at least by then, unless one of them ends it."""
        return len(self.token_ids) + self.num_surely_in_flight

    def __repr__(self) -> str:
        return (
            f"Request({self.request_id}, prompt={self.prompt_len}, tokens={len(self.token_ids)}, "
            f"computed={self.num_computed_tokens}, in_flight={self.num_in_flight}, slot={self.slot})"
        )
