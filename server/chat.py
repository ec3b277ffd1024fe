"""POST /v1/chat/completions: conversations through the model's chat template, with tool calls read back from its text."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from msgspec import UNSET, Struct, UnsetType
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from quire.engine.input_processor import ProcessedRequest
from quire.engine.outputs import CompletionOutput, RequestOutput
from quire.engine.sampling_params import SamplingParams
from quire.kernels.errors import InvalidRequestError, QuireError
from quire.server.logprobs import ChatLogprobs, PromptLogprob, chat_logprobs, prompt_logprobs
from quire.server.openapi import Operation
from quire.server.output_stream import OutputStream
from quire.server.prompts import render
from quire.server.protocol import (
    STRUCTURED,
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
from quire.server.tool_calls import ParsedDelta, ToolParser, make_tool_parser


class FunctionDefinition(Struct):
    """A function that the model may call; `parameters` is a JSON schema that the template shows to it."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Struct):
    """A tool; only functions exist."""

    type: str
    function: FunctionDefinition


class ChatRequest(GenerationFields, kw_only=True, forbid_unknown_fields=True):
    """A conversation, oldest message first. Without a limit the answer may fill what is left of max_model_len."""

    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Tool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    # Refused unless neutral, as those of GenerationFields.
    chat_template: str | None = None
    documents: Any = None
    modalities: Any = None
    audio: Any = None
    reasoning_effort: Any = None
    prediction: Any = None
    web_search_options: Any = None
    functions: Any = None
    function_call: Any = None
    verbosity: Any = None


class FunctionCall(Struct):
    """What the model wants called. `arguments` is JSON as the model wrote it; in a stream, a piece of it."""

    name: str | None
    arguments: str


class ToolCall(Struct):
    """One call of an answer."""

    id: str
    function: FunctionCall
    type: str = "function"


class ToolCallDelta(Struct, omit_defaults=True):
    """One call of a stream: id, type and name come once, the arguments in pieces."""

    index: int
    function: dict[str, str]
    id: str | None = None
    type: str | None = None


class ChatMessage(Struct):
    """The answer; `content` is null where the model only calls tools."""

    role: str
    content: str | None
    tool_calls: list[ToolCall] | UnsetType = UNSET
    refusal: None = None


class ChatDelta(Struct):
    """What is new of an answer."""

    role: str | UnsetType = UNSET
    content: str | UnsetType | None = UNSET
    tool_calls: list[ToolCallDelta] | UnsetType = UNSET


class ChatChoice(Struct):
    """One answer."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None


class ChatChunkChoice(Struct):
    """What is new of one answer."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None


class ChatResponse(Struct, kw_only=True):
    """All answers."""

    id: str
    object: str = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | None = None


class ChatChunk(Struct, kw_only=True):
    """One event of a streamed answer."""

    id: str
    object: str = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | UnsetType | None = UNSET


@dataclass
class _Job:
    """One HTTP request while it is answered."""

    state: ServerState
    body: ChatRequest
    request: ProcessedRequest
    response_id: str
    created: int

    def parser(self) -> ToolParser | None:
        """A parser for one choice, None where no tool may be called."""
        if not self.body.tools or self.body.tool_choice == "none":
            return None
        return make_tool_parser(self.state.settings.tool_parser, _template(self.state))

    def chunk(self, choices: list[ChatChunkChoice], usage: Usage | None) -> ChatChunk:
        return ChatChunk(
            id=self.response_id, created=self.created, model=self.state.model_name, choices=choices, usage=usage
        )

    def logprobs(self, choice: CompletionOutput) -> ChatLogprobs | None:
        if not self.body.logprobs or choice.logprobs is None:
            return None
        as_ids = bool(self.body.return_tokens_as_token_ids)
        return chat_logprobs(choice.token_ids, choice.logprobs, self.body.top_logprobs or 0, as_ids=as_ids)


def _template(state: ServerState) -> str | None:
    if state.chat_template is not None:
        return state.chat_template
    return None if state.engine.tokenizer is None else state.engine.tokenizer.chat_template


async def create_chat_completion(request: Request) -> Response:
    """Answers POST /v1/chat/completions."""
    state = state_of(request)
    body = await read_body(request, ChatRequest)
    job = await _prepare(state, body)
    stream = state.engine.open(job.request)
    if body.stream:
        return sse_response(_events(job, stream))
    return json_response(await unless_disconnected(request, _whole(job, stream)))


async def _prepare(state: ServerState, body: ChatRequest) -> _Job:
    check_common(body, state)
    _check_tools(body)
    params = _params(body)
    state.engine.check_serving()
    check_choices(state, params.n)
    token_ids = await render(
        state,
        body.messages,
        tools=body.tools,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        template_kwargs=body.chat_template_kwargs,
        add_special_tokens=bool(body.add_special_tokens),
    )
    prepared = await state.engine.prepare(token_ids, params, priority=body.priority or 0, cache_salt=body.cache_salt)
    return _Job(state, body, prepared, make_id("chatcmpl"), now())


def _check_tools(body: ChatRequest) -> None:
    choice = body.tool_choice
    if choice not in (None, "none", "auto"):
        raise InvalidRequestError(
            f"tool_choice {choice!r} is not supported: the model cannot be made to call a tool, as {STRUCTURED}; "
            "leave it at auto",
            parameter="tool_choice",
        )
    if choice == "auto" and not body.tools:
        raise InvalidRequestError("tool_choice auto needs tools", parameter="tool_choice")
    for tool in body.tools or ():
        if tool.type != "function":
            raise InvalidRequestError(f"a tool is of type function, not {tool.type!r}", parameter="tools")


def _params(body: ChatRequest) -> SamplingParams:
    if body.max_tokens is not None and body.max_completion_tokens not in (None, body.max_tokens):
        raise InvalidRequestError(
            f"max_tokens={body.max_tokens} and max_completion_tokens={body.max_completion_tokens} say different things; "
            "give one of them",
            parameter="max_tokens",
        )
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidRequestError("top_logprobs needs logprobs: true", parameter="top_logprobs")
    most = body.max_completion_tokens if body.max_tokens is None else body.max_tokens
    try:
        return sampling_params(body, max_tokens=most, logprobs=(body.top_logprobs or 0) if body.logprobs else None)
    except InvalidRequestError as error:
        if error.parameter == "logprobs":
            raise InvalidRequestError(
                str(error).replace("logprobs", "top_logprobs"), parameter="top_logprobs"
            ) from error
        raise


async def _whole(job: _Job, stream: OutputStream) -> ChatResponse:
    """The answer once it is there."""
    counter = UsageCounter()
    final: RequestOutput | None = None
    async with stream as outputs:
        async for output in outputs:
            final = output
            counter.add(output)
    assert final is not None
    return ChatResponse(
        id=job.response_id,
        created=job.created,
        model=job.state.model_name,
        choices=[_choice(job, choice) for choice in final.outputs],
        usage=counter.usage(),
        prompt_token_ids=final.prompt_token_ids if job.body.return_token_ids else None,
        prompt_logprobs=prompt_logprobs(final.prompt_logprobs),
    )


def _choice(job: _Job, choice: CompletionOutput) -> ChatChoice:
    text, calls = choice.text, []
    parser = job.parser()
    if parser is not None:
        reader = _CallReader(job)
        parsed = reader.take(parser.feed(text)), reader.take(parser.finish())
        text = "".join(piece.content for piece in parsed)
        calls = reader.calls
    message = ChatMessage("assistant", text if text or not calls else None)
    if calls:
        message.tool_calls = calls
    return ChatChoice(
        index=choice.index,
        message=message,
        logprobs=job.logprobs(choice),
        finish_reason="tool_calls" if calls and choice.finish_reason == "stop" else choice.finish_reason,
        stop_reason=choice.stop_reason,
        token_ids=choice.token_ids if job.body.return_token_ids else None,
    )


class _CallReader:
    """Gathers the calls of one choice; keeps only the first where the request allows no parallel ones."""

    def __init__(self, job: _Job) -> None:
        self._only_one = job.body.parallel_tool_calls is False
        self.calls: list[ToolCall] = []

    def take(self, parsed: ParsedDelta) -> ParsedDelta:
        """Notes the calls, and gives back what the client is to see."""
        kept = tuple(call for call in parsed.calls if not (self._only_one and call.index > 0))
        for call in kept:
            if call.id is not None:
                self.calls.append(ToolCall(call.id, FunctionCall(call.name, "")))
            self.calls[call.index].function.arguments += call.arguments
        return ParsedDelta(parsed.content, kept)


async def _events(job: _Job, stream: OutputStream) -> AsyncIterator[bytes]:
    """The answer as it comes."""
    options = job.body.stream_options
    with_usage = options is not None and bool(options.include_usage)
    with_all_usage = with_usage and options is not None and bool(options.continuous_usage_stats)
    writers: dict[int, _ChoiceWriter] = {}
    counter = UsageCounter()
    async with stream as outputs:
        try:
            async for output in outputs:
                counter.add(output)
                usage = counter.usage() if with_all_usage else None
                for choice in output.outputs:
                    writer = writers.get(choice.index)
                    if writer is None:
                        writer = writers[choice.index] = _ChoiceWriter(job)
                        first = job.chunk(
                            [ChatChunkChoice(choice.index, ChatDelta(role="assistant", content=""))], usage
                        )
                        if job.body.return_token_ids:
                            first.prompt_token_ids = output.prompt_token_ids
                        if output.prompt_logprobs is not None:
                            first.prompt_logprobs = prompt_logprobs(output.prompt_logprobs)
                        yield event(first)
                    if (chunk := writer.chunk(choice)) is not None:
                        yield event(job.chunk([chunk], usage))
            if with_usage:
                yield event(job.chunk([], counter.usage()))
        except QuireError as error:  # the headers are out: what went wrong is said in the stream
            yield event(error_body(error))
        yield DONE


class _ChoiceWriter:
    """Turns the deltas of one choice into chunks."""

    def __init__(self, job: _Job) -> None:
        self._job = job
        self._parser = job.parser()
        self._reader = _CallReader(job)

    def chunk(self, choice: CompletionOutput) -> ChatChunkChoice | None:
        """What is new; None while everything is held back, as the beginning of a tool call is."""
        content, calls = choice.text, []
        if self._parser is not None:
            parsed = [self._reader.take(self._parser.feed(choice.text))]
            if choice.finish_reason is not None:
                parsed.append(self._reader.take(self._parser.finish()))
            content = "".join(piece.content for piece in parsed)
            calls = [call for piece in parsed for call in piece.calls]
        finish_reason: str | None = choice.finish_reason
        if finish_reason == "stop" and self._reader.calls:
            finish_reason = "tool_calls"
        logprobs = self._job.logprobs(choice)
        if not (content or calls or finish_reason or logprobs or self._job.body.return_token_ids):
            return None
        delta = ChatDelta()
        if content or not calls:
            delta.content = content
        if calls:
            delta.tool_calls = [
                ToolCallDelta(
                    call.index,
                    {"arguments": call.arguments}
                    if call.name is None
                    else {"name": call.name, "arguments": call.arguments},
                    call.id,
                    None if call.id is None else "function",
                )
                for call in calls
            ]
        return ChatChunkChoice(
            index=choice.index,
            delta=delta,
            logprobs=logprobs,
            finish_reason=finish_reason,
            stop_reason=choice.stop_reason,
            token_ids=choice.token_ids if self._job.body.return_token_ids else None,
        )


routes = [Route("/v1/chat/completions", create_chat_completion, methods=["POST"])]

OPERATIONS = (
    Operation(
        "POST",
        "/v1/chat/completions",
        "Answer a conversation.",
        ChatRequest,
        ChatResponse,
        stream=ChatChunk,
        errors=(404, 429, 503, 504),
        tag="OpenAI",
    ),
)
