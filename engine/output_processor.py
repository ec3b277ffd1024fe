"""From the engine core's token ids to what a caller reads: text, stop strings, logprobs, one output per request."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from quire.engine.detokenizer import IncrementalDetokenizer
from quire.engine.input_processor import ProcessedRequest
from quire.engine.outputs import CompletionOutput, FinishReason, Logprob, RequestMetrics, RequestOutput
from quire.engine.sampling_params import RequestOutputKind
from quire.engine.step_data import DraftRound, EngineCoreOutput, TokenLogprobs
from quire.engine.tokenizer import Tokenizer
from quire.kernels.errors import InvalidRequestError


@dataclass
class _Choice:
    index: int
    detokenizer: IncrementalDetokenizer | None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] | None = None
    cumulative_logprob: float | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    num_emitted_tokens: int = 0
    num_emitted_chars: int = 0
    is_end_emitted: bool = False

    @property
    def has_news(self) -> bool:
        """Whether it has tokens, or an end, that no output has had yet."""
        is_ended = self.finish_reason is not None
        return len(self.token_ids) > self.num_emitted_tokens or is_ended != self.is_end_emitted


@dataclass
class _State:
    request: ProcessedRequest
    prompt_token_ids: list[int]
    choices: list[_Choice]
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    are_prompt_logprobs_emitted: bool = False
    num_draft_rounds: int = 0
    num_draft_tokens: int = 0
    num_accepted_per_pos: list[int] = field(default_factory=list)

    @property
    def is_finished(self) -> bool:
        return all(choice.finish_reason is not None for choice in self.choices)

    def count(self, rounds: Sequence[DraftRound]) -> None:
        """Adds what came of speculation."""
        for num_drafts, num_accepted in rounds:
            if num_drafts:
                self.num_draft_rounds += 1
                self.num_draft_tokens += num_drafts
                missing = num_drafts - len(self.num_accepted_per_pos)
                self.num_accepted_per_pos += [0] * missing
                for position in range(num_accepted):
                    self.num_accepted_per_pos[position] += 1


class OutputProcessor:
    """Owns, for every open request, the text and the tokens so far. Knows nothing of steps, blocks or devices."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._states: dict[str, _State] = {}
        self._choice_of: dict[str, tuple[_State, _Choice]] = {}

    def add(self, request: ProcessedRequest) -> None:
        """A request is about to be handed to the engine core. Raises InvalidRequestError where its id is in use."""
        core_ids = {core_request.request_id for core_request in request.choices}
        if request.request_id in self._states or not core_ids.isdisjoint(self._choice_of):
            raise InvalidRequestError(f"request id {request.request_id!r} is in use; give each request its own")
        params = request.params
        choices = [
            _Choice(
                index=idx,
                detokenizer=self._detokenizer(request),
                logprobs=None if params.logprobs is None else [],
                cumulative_logprob=None if params.logprobs is None else 0.0,
            )
            for idx in range(params.n)
        ]
        prompt_logprobs: list[dict[int, Logprob] | None] | None = None if params.prompt_logprobs is None else [None]
        state = _State(request, list(request.prompt_token_ids), choices, prompt_logprobs)
        self._states[request.request_id] = state
        for core_request, choice in zip(request.choices, choices, strict=True):
            self._choice_of[core_request.request_id] = (state, choice)

    def process(self, outputs: Sequence[EngineCoreOutput]) -> tuple[list[RequestOutput], list[str]]:
        """Takes a step's outputs in.

        Returns what callers get, and the core's ids of requests that a stop string ended, which the core must abort.
        Log-probabilities of a part of the prompt make no output of their own; they come with the first token.
        """
        touched: dict[str, _State] = {}
        to_abort: list[str] = []
        for output in outputs:
            found = self._choice_of.get(output.request_id)
            if found is None:
                continue  # ended by a stop string or an abort while its next token was on its way
            state, choice = found
            self._take(state, choice, output)
            if choice.finish_reason is not None:
                del self._choice_of[output.request_id]
                if output.finish_reason is None:
                    to_abort.append(output.request_id)
            if choice.has_news:
                touched[state.request.request_id] = state
        return [made for state in touched.values() if (made := self._emit(state)) is not None], to_abort

    def abort(self, request_id: str) -> tuple[RequestOutput | None, list[str]]:
        """Ends a request for its caller: its last output, and the core's ids to abort. (None, []) when it is unknown."""
        state = self._states.get(request_id)
        if state is None:
            return None, []
        open_ids = []
        for core_request, choice in zip(state.request.choices, state.choices, strict=True):
            if choice.finish_reason is None:
                choice.finish_reason = "abort"
                if choice.detokenizer is not None:
                    choice.detokenizer.finish()
                del self._choice_of[core_request.request_id]
                open_ids.append(core_request.request_id)
        return self._emit(state), open_ids

    @property
    def num_unfinished(self) -> int:
        """Requests whose last output has not been given yet."""
        return len(self._states)

    def _detokenizer(self, request: ProcessedRequest) -> IncrementalDetokenizer | None:
        if self._tokenizer is None or not request.params.detokenize:
            return None
        return IncrementalDetokenizer(self._tokenizer, request.params, request.prompt_token_ids)

    def _take(self, state: _State, choice: _Choice, output: EngineCoreOutput) -> None:
        if choice.index == 0:  # the others find in the cache what the first one computed
            state.num_cached_tokens = output.num_cached_tokens
        state.num_preemptions = max(state.num_preemptions, output.num_preemptions)
        state.first_scheduled_time = state.first_scheduled_time or output.first_scheduled_time
        state.count(output.rounds)
        if output.prompt_logprobs and state.prompt_logprobs is not None and choice.index == 0:
            self._take_prompt_logprobs(state, state.prompt_logprobs, output.prompt_logprobs)
        token_ids = output.new_token_ids
        if token_ids and state.first_token_time is None:
            state.first_token_time = time.monotonic()
        choice.finish_reason, choice.stop_reason = output.finish_reason, output.stop_reason
        if choice.detokenizer is not None:
            token_ids = self._take_text(
                choice, choice.detokenizer, token_ids, state.request.params.include_stop_str_in_output
            )
        choice.token_ids.extend(token_ids)
        if choice.logprobs is not None and output.logprobs is not None:
            entries = output.logprobs[: len(token_ids)]
            detokenize = state.request.params.detokenize
            choice.logprobs.extend(
                self._logprobs(entry, token_id, detokenize) for entry, token_id in zip(entries, token_ids, strict=True)
            )
            assert choice.cumulative_logprob is not None
            choice.cumulative_logprob += sum(entry.logprob for entry in entries)

    def _take_text(
        self, choice: _Choice, detokenizer: IncrementalDetokenizer, token_ids: list[int], include_stop: bool
    ) -> list[int]:
        """Adds the tokens' text; the tokens that belong to the output, fewer where a stop string came first."""
        # The token that ends a sequence has no place in its text unless that is asked for.
        ends_with_stop_token = choice.finish_reason == "stop" and not include_stop
        with_text = token_ids[:-1] if ends_with_stop_token else token_ids
        num_taken = detokenizer.append(with_text)
        if detokenizer.stop_reason is None and choice.finish_reason is not None:
            detokenizer.finish()
        if detokenizer.stop_reason is not None:
            choice.finish_reason, choice.stop_reason = "stop", detokenizer.stop_reason
            detokenizer.finish()
            return token_ids[:num_taken]
        return token_ids

    def _take_prompt_logprobs(
        self, state: _State, found: list[dict[int, Logprob] | None], entries: Sequence[TokenLogprobs]
    ) -> None:
        token_ids = state.prompt_token_ids[len(found) : len(found) + len(entries)]
        detokenize = state.request.params.detokenize
        found.extend(
            self._logprobs(entry, token_id, detokenize) for entry, token_id in zip(entries, token_ids, strict=True)
        )

    def _logprobs(self, entry: TokenLogprobs, token_id: int, detokenize: bool) -> dict[int, Logprob]:
        """The token's own entry first, then the most likely ones in order."""
        tokenizer = self._tokenizer if detokenize else None

        def text(token_id: int) -> str | None:
            return None if tokenizer is None else tokenizer.token_text(token_id)

        found = {token_id: Logprob(entry.logprob, entry.rank, text(token_id))}
        for rank, (top_id, logprob) in enumerate(zip(entry.top_ids, entry.top_logprobs, strict=True), start=1):
            if top_id != token_id:
                found[top_id] = Logprob(logprob, rank, text(top_id))
        return found

    def _emit(self, state: _State) -> RequestOutput | None:
        """The request's next output, or None while its kind asks for nothing yet."""
        request, finished = state.request, state.is_finished
        if finished:
            del self._states[request.request_id]
        if request.params.output_kind is RequestOutputKind.FINAL_ONLY and not finished:
            return None
        is_delta = request.params.output_kind is RequestOutputKind.DELTA
        prompt_logprobs = state.prompt_logprobs
        # Another choice may be faster than the one that computes the prompt, by what it finds in the cache.
        is_whole = prompt_logprobs is None or len(prompt_logprobs) == len(state.prompt_token_ids)
        if not (is_whole or finished) or (is_delta and state.are_prompt_logprobs_emitted):
            prompt_logprobs = None
        state.are_prompt_logprobs_emitted |= prompt_logprobs is not None
        choices = [choice for choice in state.choices if choice.has_news] if is_delta else state.choices
        return RequestOutput(
            request_id=request.request_id,
            prompt=request.prompt,
            prompt_token_ids=state.prompt_token_ids,
            prompt_logprobs=prompt_logprobs,
            outputs=[_completion(choice, is_delta) for choice in choices],
            finished=finished,
            num_cached_tokens=state.num_cached_tokens,
            metrics=RequestMetrics(
                arrival_time=request.arrival_time,
                first_scheduled_time=state.first_scheduled_time,
                first_token_time=state.first_token_time,
                finished_time=time.monotonic() if finished else None,
                num_preemptions=state.num_preemptions,
                num_draft_rounds=state.num_draft_rounds,
                num_draft_tokens=state.num_draft_tokens,
                num_accepted_tokens=sum(state.num_accepted_per_pos),
                num_accepted_per_pos=tuple(state.num_accepted_per_pos),
            ),
        )


def _completion(choice: _Choice, is_delta: bool) -> CompletionOutput:
    begin = choice.num_emitted_tokens if is_delta else 0
    choice.num_emitted_tokens = len(choice.token_ids)
    choice.is_end_emitted = choice.finish_reason is not None
    text = ""
    if choice.detokenizer is not None:
        text = choice.detokenizer.delta()
        choice.num_emitted_chars += len(text)
        if not is_delta:  # without the end that is held back: what was shown once is never taken back
            text = choice.detokenizer.text[: choice.num_emitted_chars]
    return CompletionOutput(
        index=choice.index,
        text=text,
        token_ids=choice.token_ids[begin:],
        cumulative_logprob=choice.cumulative_logprob,
        logprobs=None if choice.logprobs is None else choice.logprobs[begin:],
        finish_reason=choice.finish_reason,
        stop_reason=choice.stop_reason,
    )
