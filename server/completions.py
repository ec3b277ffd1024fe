"""POST /v1/completions: prompts as text or token ids, streamed or whole, as OpenAI's legacy API and lm-evaluation-harness know it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from quire.engine.input_processor import ProcessedRequest
from quire.engine.outputs import CompletionOutput, RequestOutput
from quire.engine.sampling_params import SamplingParams
from quire.kernels.errors import InvalidRequestError, QuireError
from quire.server.logprobs import CompletionLogprobs, PromptLogprob, completion_logprobs, prompt_logprobs
from quire.server.openapi import Operation
from quire.server.output_stream import OutputStream
from quire.server.prompts import check_length, encode
from quire.server.protocol import (
    GenerationFields,
    Usage,
    UsageCounter,
    check_choices,
    check_common,
    make_id,
    now,
    sampling_params,
)
from quire.server.responses import DONE, error_body, event, json_response, read_body, sse_response, unless_disconnected
from quire.server.state import ServerState, state_of

DEFAULT_MAX_TOKENS = 16
MAX_CHOICES = 16384  # of all prompts of a body together


_TOKENS = {"type": "array", "items": {"type": "integer", "minimum": 0}}
Prompts = Annotated[
    # msgspec's unions hold one list type; `_prompts_of` checks what is in it.
    str | list[Any],
    Meta(
        extra_json_schema={
            "anyOf": [
                {"type": "string"},
                _TOKENS,
                {"type": "array", "items": {"type": "string"}},
                {"type": "array", "items": _TOKENS},
            ]
        }
    ),
]


class CompletionRequest(GenerationFields, kw_only=True, forbid_unknown_fields=True):
    """A prompt, several, or their token ids. `echo` puts the prompt before its completion, with log-probabilities if asked.

    `max_tokens: 0` with `echo` scores the prompt alone.
    """

    prompt: Prompts
    echo: bool | None = None
    logprobs: int | None = None
    suffix: str | None = None


class CompletionChoice(Struct):
    """One completion, or what is new of it in a stream. `stop_reason` is the stop string or token id that ended it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | None = None


class CompletionResponse(Struct, kw_only=True):
    """All choices, prompt by prompt."""

    id: str
    object: str = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


@dataclass
class _Job:
    """One HTTP request while it is answered."""

    state: ServerState
    body: CompletionRequest
    prompts: list[ProcessedRequest]
    response_id: str
    created: int
    num_hidden: int

    def response(self, choices: list[CompletionChoice], usage: Usage | None) -> CompletionResponse:
        return CompletionResponse(
            id=self.response_id, created=self.created, model=self.state.model_name, choices=choices, usage=usage
        )

    @property
    def num_choices(self) -> int:
        return self.prompts[0].params.n

    def prompt_text(self, request: ProcessedRequest) -> str:
        """The prompt as text, for echoing it."""
        if request.prompt is not None:
            return request.prompt
        tokenizer = self.state.engine.tokenizer
        if tokenizer is None:
            return ""
        return tokenizer.decode(request.prompt_token_ids, skip_special_tokens=False)


async def create_completion(request: Request) -> Response:
    """Answers POST /v1/completions."""
    state = state_of(request)
    body = await read_body(request, CompletionRequest)
    job = await _prepare(state, body)
    stream = state.engine.open(*job.prompts)
    if body.stream:
        return sse_response(_events(job, stream))
    return json_response(await unless_disconnected(request, _whole(job, stream)))


def _prompts_of(body: CompletionRequest) -> list[str | list[int]]:
    prompt = body.prompt
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise InvalidRequestError("prompt is empty; give a string, token ids, or a list of them", parameter="prompt")
    wanted: Any = list[int]
    if isinstance(prompt[0], (str, list)):
        wanted = list[str] if isinstance(prompt[0], str) else list[list[int]]
    try:
        checked = msgspec.convert(prompt, wanted)
    except msgspec.ValidationError as error:
        raise InvalidRequestError(
            f"prompt is a string, token ids, a list of strings or a list of lists of token ids: {error}",
            parameter="prompt",
        ) from error
    return [checked] if wanted == list[int] else checked


async def _prepare(state: ServerState, body: CompletionRequest) -> _Job:
    check_common(body, state)
    params = _params(body)
    prompts = _prompts_of(body)
    state.engine.check_serving()
    check_choices(state, len(prompts) * params.n, "n" if len(prompts) == 1 else "prompt")
    if len(prompts) * params.n > MAX_CHOICES:
        raise InvalidRequestError(
            f"{len(prompts)} prompts of n={params.n} are more than the {MAX_CHOICES} choices of one body",
            parameter="prompt",
        )
    add_special_tokens = body.add_special_tokens is not False
    prepared = []
    for prompt in prompts:
        given = prompt
        if isinstance(prompt, str) and not add_special_tokens:
            given = await encode(state, prompt, add_special_tokens=False)
        elif isinstance(prompt, str):
            check_length(state, prompt)
        await asyncio.sleep(0)  # a thousand prompts are no reason for others to wait
        prepared.append(
            await state.engine.prepare(given, params, priority=body.priority or 0, cache_salt=body.cache_salt)
        )
    num_hidden = len(prompts) * params.n if body.max_tokens == 0 else 0
    return _Job(state, body, prepared, make_id("cmpl"), now(), num_hidden)


def _params(body: CompletionRequest) -> SamplingParams:
    max_tokens = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    if max_tokens == 0 and not body.echo:
        raise InvalidRequestError(
            "max_tokens: 0 makes nothing; with echo: true it scores the prompt, else ask for at least 1",
            parameter="max_tokens",
        )
    more: dict[str, int | None] = {
        "max_tokens": max(max_tokens, 1) if max_tokens >= 0 else max_tokens,
        "logprobs": body.logprobs,
    }
    if body.echo and body.logprobs is not None:
        if body.stream:
            raise InvalidRequestError(
                "echo with logprobs is not streamed: the prompt's come all at once; leave out stream", parameter="echo"
            )
        more["prompt_logprobs"] = max(body.logprobs, body.prompt_logprobs or 0)
    return sampling_params(body, **more)


async def _whole(job: _Job, stream: OutputStream) -> CompletionResponse:
    """The answer once all requests have ended."""
    counter = UsageCounter()
    finished: dict[str, RequestOutput] = {}
    async with stream as outputs:
        async for output in outputs:
            finished[output.request_id] = output
            counter.add(output)
    choices = [
        _choice(job, position, request, finished[request.request_id], choice)
        for position, request in enumerate(job.prompts)
        for choice in finished[request.request_id].outputs
    ]
    return job.response(choices, counter.usage(job.num_hidden))


def _choice(
    job: _Job, position: int, request: ProcessedRequest, output: RequestOutput, choice: CompletionOutput
) -> CompletionChoice:
    body, is_hidden = job.body, job.num_hidden > 0
    token_ids = [] if is_hidden else choice.token_ids
    text = "" if is_hidden else choice.text
    prompt_text = job.prompt_text(request) if body.echo else ""
    return CompletionChoice(
        index=position * job.num_choices + choice.index,
        text=prompt_text + text,
        logprobs=_logprobs(job, output, choice, prompt_text, token_ids),
        finish_reason="length" if is_hidden else choice.finish_reason,
        stop_reason=None if is_hidden else choice.stop_reason,
        token_ids=token_ids if body.return_token_ids else None,
        prompt_token_ids=output.prompt_token_ids if body.return_token_ids else None,
        prompt_logprobs=prompt_logprobs(output.prompt_logprobs) if body.prompt_logprobs is not None else None,
    )


def _logprobs(
    job: _Job, output: RequestOutput, choice: CompletionOutput, prompt_text: str, token_ids: Sequence[int]
) -> CompletionLogprobs | None:
    num_top = job.body.logprobs
    if num_top is None or choice.logprobs is None:
        return None
    as_ids = bool(job.body.return_tokens_as_token_ids)
    own = completion_logprobs(
        token_ids, choice.logprobs[: len(token_ids)], num_top, as_ids=as_ids, offset=len(prompt_text)
    )
    if not job.body.echo or output.prompt_logprobs is None:
        return own
    tokenizer = job.state.engine.tokenizer
    first = "" if tokenizer is None else tokenizer.token_text(output.prompt_token_ids[0])
    prompt = completion_logprobs(
        output.prompt_token_ids, output.prompt_logprobs, num_top, as_ids=as_ids, first_text=first
    )
    return CompletionLogprobs(
        prompt.text_offset + own.text_offset,
        prompt.token_logprobs + own.token_logprobs,
        prompt.tokens + own.tokens,
        prompt.top_logprobs + own.top_logprobs,
    )


async def _events(job: _Job, stream: OutputStream) -> AsyncIterator[bytes]:
    """The answer as it comes, one event per output of a request."""
    options = job.body.stream_options
    with_usage = options is not None and bool(options.include_usage)
    with_all_usage = with_usage and options is not None and bool(options.continuous_usage_stats)
    writer, counter = _ChunkWriter(job), UsageCounter()
    async with stream as outputs:
        try:
            async for output in outputs:
                counter.add(output)
                usage = counter.usage(job.num_hidden) if with_all_usage else None
                yield event(job.response(writer.choices(output), usage))
            if with_usage:
                yield event(job.response([], counter.usage(job.num_hidden)))
        except QuireError as error:  # the headers are out: what went wrong is said in the stream
            yield event(error_body(error))
        yield DONE


class _ChunkWriter:
    """Turns deltas into chunks. Remembers which choices have begun and how far their text has come."""

    def __init__(self, job: _Job) -> None:
        self._job = job
        self._positions = {request.request_id: position for position, request in enumerate(job.prompts)}
        self._num_chars: dict[int, int] = {}

    def choices(self, output: RequestOutput) -> list[CompletionChoice]:
        """What is new."""
        position = self._positions[output.request_id]
        return [self._choice(position, output, choice) for choice in output.outputs]

    def _choice(self, position: int, output: RequestOutput, choice: CompletionOutput) -> CompletionChoice:
        body, index = self._job.body, position * self._job.num_choices + choice.index
        text = "" if self._job.num_hidden else choice.text
        token_ids = [] if self._job.num_hidden else choice.token_ids
        is_first = index not in self._num_chars
        if is_first and body.echo:
            text = self._job.prompt_text(self._job.prompts[position]) + text
        offset = self._num_chars.get(index, 0)
        self._num_chars[index] = offset + len(text)
        logprobs = None
        if body.logprobs is not None and choice.logprobs is not None:
            logprobs = completion_logprobs(
                token_ids, choice.logprobs, body.logprobs, as_ids=bool(body.return_tokens_as_token_ids), offset=offset
            )
        found = prompt_logprobs(output.prompt_logprobs) if body.prompt_logprobs is not None else None
        return CompletionChoice(
            index=index,
            text=text,
            logprobs=logprobs,
            finish_reason="length" if self._job.num_hidden and choice.finish_reason else choice.finish_reason,
            stop_reason=None if self._job.num_hidden else choice.stop_reason,
            token_ids=token_ids if body.return_token_ids else None,
            prompt_token_ids=output.prompt_token_ids if body.return_token_ids and is_first else None,
            prompt_logprobs=found if choice.index == 0 else None,
        )


routes = [Route("/v1/completions", create_completion, methods=["POST"])]

OPERATIONS = (
    Operation(
        "POST",
        "/v1/completions",
        "Complete prompts.",
        CompletionRequest,
        CompletionResponse,
        stream=CompletionResponse,
        errors=(404, 429, 503, 504),
        tag="OpenAI",
    ),
)
