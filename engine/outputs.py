"""What comes back to a caller, spelled as vLLM spells it. Plain data: it owns no state and knows no engine."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

FinishReason: TypeAlias = Literal["stop", "length", "abort"]
"""Why an output ended: a stop string, a stop token or the end of the sequence; the most tokens; the caller."""


@dataclass(frozen=True)
class Logprob:
    """One token's natural-log probability at one position, from the model's own distribution.

    `rank` counts from 1, the most likely token of the vocabulary. `decoded_token` is the token's own text, None
    where the request does not detokenize.
    """

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass(frozen=True)
class CompletionOutput:
    """One choice of a request: all of it so far, or what is new since the last output, as `output_kind` says.

    `index` is the choice, from 0. `token_ids` end where the output ends: a token that stops it is the last one.
    `logprobs` has one entry per token of `token_ids`, mapping the token itself and the most likely ones. `stop_reason`
    is the string or the token id that ended the output, None for the model's own end of sequence and for any other
    `finish_reason` than "stop". `cumulative_logprob` is the sum over all tokens so far, None without `logprobs`.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    def finished(self) -> bool:
        """Whether nothing will be added to this choice."""
        return self.finish_reason is not None


@dataclass(frozen=True)
class RequestMetrics:
    """When things happened to a request, in seconds of `time.monotonic`; None for what has not happened.

    `first_scheduled_time` is when its first token was given to a step, `first_token_time` when its first output token
    was read back. `num_preemptions` counts how often its blocks were taken away and its tokens computed again.
    Speculation: `num_draft_rounds` times tokens were drafted and verified, `num_draft_tokens` in all, of which
    `num_accepted_tokens` were accepted; `num_accepted_per_pos[i]` times the draft of position i was. All choices together.
    """

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None
    num_preemptions: int = 0
    num_draft_rounds: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_accepted_per_pos: tuple[int, ...] = ()


@dataclass(frozen=True)
class RequestOutput:
    """A request and its choices; `finished` when every one of the `n` choices is.

    `prompt` is None where token ids were given. `prompt_logprobs` has one entry per prompt token, the first of them
    None since nothing comes before it; the whole is None where they were not asked for. `num_cached_tokens` counts the
    prompt tokens whose keys and values were found in the prefix cache.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    num_cached_tokens: int = 0
    metrics: RequestMetrics | None = None
