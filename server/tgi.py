"""Text Generation Inference's API: /generate, /generate_stream and /info, for clients that speak it.

Owns the translation of its parameters, answers and errors. What it takes and the server cannot honour is refused by name.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from msgspec import Struct
from msgspec import field as struct_field
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from quire.engine.input_processor import ProcessedRequest
from quire.engine.outputs import CompletionOutput, Logprob, RequestOutput
from quire.engine.sampling_params import RequestOutputKind, SamplingParams
from quire.kernels.errors import InvalidRequestError, NotServingError, QueueFullError, QuireError
from quire.server.openapi import Operation
from quire.server.output_stream import OutputStream
from quire.server.prompts import MAX_COUNTED_CHARS, check_length, encode
from quire.server.protocol import MAX_STOP_STRINGS, check_num_items
from quire.server.responses import (
    ClientDisconnected,
    event,
    json_response,
    read_body,
    sse_response,
    status_of,
    unless_disconnected,
)
from quire.server.state import ServerState, state_of

DEFAULT_MAX_NEW_TOKENS = 100


class GenerateParameters(Struct, kw_only=True, forbid_unknown_fields=True):
    """How to generate. Tokens are sampled where `do_sample` is set or a sampling parameter is given, else the likeliest is taken."""

    max_new_tokens: int | None = None
    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: list[str] | None = None
    return_full_text: bool | None = None
    truncate: int | None = None
    details: bool | None = None
    decoder_input_details: bool | None = None
    top_n_tokens: int | None = None

    # Refused unless neutral.
    best_of: int | None = None
    typical_p: float | None = None
    watermark: bool | None = None
    adapter_id: str | None = None
    grammar: Any = None


class GenerateRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    """A prompt and how to go on from it."""

    inputs: str
    parameters: GenerateParameters | None = None
    stream: bool | None = None


class TgiToken(Struct):
    """A generated token."""

    id: int
    text: str
    logprob: float
    special: bool


class PrefillToken(Struct):
    """A token of the prompt; the first has no log-probability."""

    id: int
    text: str
    logprob: float | None


class Details(Struct):
    """How the generation went."""

    finish_reason: str
    generated_tokens: int
    seed: int | None
    prefill: list[PrefillToken] = struct_field(default_factory=list)
    tokens: list[TgiToken] = struct_field(default_factory=list)
    top_tokens: list[list[TgiToken]] | None = None


class GenerateResponse(Struct):
    """The text; `details` where asked for."""

    generated_text: str
    details: Details | None = None


class StreamDetails(Struct):
    """How a streamed generation went, in its last event."""

    finish_reason: str
    generated_tokens: int
    input_length: int
    seed: int | None


class StreamEvent(Struct):
    """One token; the last one has the whole text."""

    index: int
    token: TgiToken
    generated_text: str | None = None
    details: StreamDetails | None = None
    top_tokens: list[TgiToken] | None = None


class TgiInfo(Struct):
    """What is served."""

    model_id: str
    model_dtype: str
    model_device_type: str
    max_concurrent_requests: int
    max_best_of: int
    max_stop_sequences: int
    max_input_tokens: int
    max_total_tokens: int
    max_batch_total_tokens: int
    version: str


class TgiError(Struct):
    """An error in TGI's shape; `error_type` is validation, overloaded, generation or unhealthy."""

    error: str
    error_type: str


_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "typical_p": (1.0,),
    "watermark": (False,),
    "adapter_id": ("",),
    "grammar": (),
}


def tgi_error(error: QuireError) -> tuple[TgiError, int]:
    """An error in TGI's shape, and its status."""
    if isinstance(error, InvalidRequestError):
        name = "inputs" if error.parameter == "prompt" else error.parameter
        named = f"{name}: {error}" if name and name not in str(error) else str(error)
        return TgiError(f"Input validation error: {named}", "validation"), 422
    if isinstance(error, QueueFullError):
        return TgiError(str(error), "overloaded"), 429
    if isinstance(error, NotServingError):
        return TgiError(str(error), "unhealthy"), 503
    return TgiError(str(error), "generation"), status_of(error)


def _refusal(error: QuireError) -> Response:
    body, status = tgi_error(error)
    headers = {"Retry-After": str(error.retry_after)} if isinstance(error, QueueFullError) else None
    return json_response(body, status, headers)


async def generate(request: Request) -> Response:
    """Answers POST /generate."""
    return await _answer(request, is_stream=False)


async def generate_stream(request: Request) -> Response:
    """Answers POST /generate_stream."""
    return await _answer(request, is_stream=True)


@dataclass(frozen=True)
class _Job:
    """One HTTP request while it is answered."""

    state: ServerState
    inputs: str
    parameters: GenerateParameters
    request: ProcessedRequest

    @property
    def seed(self) -> int | None:
        """The seed that was sampled with, drawn where none was given; None where nothing was sampled."""
        return None if self.request.params.is_greedy else self.request.params.seed

    @property
    def shown_prompt(self) -> str:
        """What stands before the generated text."""
        return self.inputs if self.parameters.return_full_text else ""


async def _answer(request: Request, *, is_stream: bool) -> Response:
    state = state_of(request)
    try:
        body = await read_body(request, GenerateRequest)
        is_stream = is_stream or bool(body.stream)
        job = await _prepare(state, body.inputs, body.parameters or GenerateParameters(), is_stream)
        stream = state.engine.open(job.request)
        if is_stream:
            return sse_response(_events(job, stream))
        return json_response(await unless_disconnected(request, _whole(job, stream)))
    except ClientDisconnected:
        raise
    except QuireError as error:
        return _refusal(error)


async def _prepare(state: ServerState, inputs: str, parameters: GenerateParameters, is_stream: bool) -> _Job:
    for name, neutral in _NEUTRAL.items():
        value = getattr(parameters, name)
        if value is not None and value not in neutral:
            raise InvalidRequestError(f"{name} is not supported; leave it out", parameter=name)
    if parameters.decoder_input_details and is_stream:
        raise InvalidRequestError(
            "decoder_input_details is not streamed; ask /generate for it", parameter="decoder_input_details"
        )
    state.engine.check_serving()
    check_num_items(parameters, state)
    prompt: str | list[int] = inputs
    if parameters.truncate is None:
        check_length(state, inputs, parameter="inputs")
    else:
        prompt = await _truncated(state, inputs, parameters.truncate)
    request = await state.engine.prepare(prompt, _params(parameters, is_stream))
    _check_room(state, parameters.max_new_tokens, len(request.prompt_token_ids))
    return _Job(state, inputs, parameters, request)


async def _truncated(state: ServerState, inputs: str, most: int) -> list[int]:
    """The last `most` tokens of the prompt."""
    if most < 1:
        raise InvalidRequestError(f"truncate is a number of tokens, at least 1, not {most}", parameter="truncate")
    return (await encode(state, inputs, at_least=MAX_COUNTED_CHARS, parameter="inputs"))[-most:]


def _check_room(state: ServerState, max_new_tokens: int | None, num_prompt_tokens: int) -> None:
    """TGI promises the number of tokens that is asked for, or refuses."""
    info = state.engine.info
    if info is None or max_new_tokens is None or num_prompt_tokens + max_new_tokens <= info.max_model_len:
        return
    raise InvalidRequestError(
        f"inputs of {num_prompt_tokens} tokens and max_new_tokens={max_new_tokens} are more than the {info.max_model_len} "
        "that the model is served with; ask for fewer, or leave it out",
        parameter="max_new_tokens",
    )


def _params(parameters: GenerateParameters, is_stream: bool) -> SamplingParams:
    given: dict[str, Any] = {
        name: value
        for name in ("temperature", "top_k", "top_p", "repetition_penalty", "frequency_penalty", "seed", "stop")
        if (value := getattr(parameters, name)) is not None
    }
    if not _is_sampled(parameters):
        given["temperature"] = 0.0
    num_top = parameters.top_n_tokens or 0
    wants_tokens = is_stream or parameters.details or parameters.decoder_input_details
    most = DEFAULT_MAX_NEW_TOKENS if parameters.max_new_tokens is None else parameters.max_new_tokens
    try:
        return SamplingParams(
            **given,
            max_tokens=most,
            logprobs=num_top if wants_tokens else None,
            prompt_logprobs=0 if parameters.decoder_input_details else None,
            include_stop_str_in_output=True,  # as TGI does
            output_kind=RequestOutputKind.DELTA if is_stream else RequestOutputKind.FINAL_ONLY,
        )
    except InvalidRequestError as error:
        names = {"max_tokens": "max_new_tokens", "logprobs": "top_n_tokens"}
        name = names.get(error.parameter or "", error.parameter)
        raise InvalidRequestError(str(error).replace(error.parameter or "\0", name or ""), parameter=name) from error


def _is_sampled(parameters: GenerateParameters) -> bool:
    """TGI's rule: where asked for, or where a parameter would change the distribution, whatever `do_sample` says."""
    return bool(
        parameters.do_sample
        or parameters.temperature not in (None, 1.0)
        or parameters.top_k not in (None, 0, -1)
        or parameters.top_p not in (None, 1.0)
    )


def _finish_reason(choice: CompletionOutput) -> str:
    if choice.finish_reason != "stop":
        return "length"
    return "eos_token" if choice.stop_reason is None else "stop_sequence"


def _token(job: _Job, token_id: int, entry: Logprob, text: str | None = None) -> TgiToken:
    tokenizer = job.state.engine.tokenizer
    is_special = tokenizer is not None and token_id in tokenizer.all_special_ids
    return TgiToken(token_id, (entry.decoded_token or "") if text is None else text, entry.logprob, is_special)


def _top(job: _Job, entry: dict[int, Logprob]) -> list[TgiToken]:
    ranked = sorted(entry.items(), key=lambda item: item[1].rank or 0)
    most = job.parameters.top_n_tokens or 0
    return [_token(job, token_id, found) for token_id, found in ranked if (found.rank or 0) <= most]


async def _whole(job: _Job, stream: OutputStream) -> GenerateResponse:
    final: RequestOutput | None = None
    async with stream as outputs:
        async for output in outputs:
            final = output
    assert final is not None
    choice = final.outputs[0]
    text = job.shown_prompt + choice.text
    if not (job.parameters.details or job.parameters.decoder_input_details):
        return GenerateResponse(text)
    entries = choice.logprobs or []
    details = Details(
        finish_reason=_finish_reason(choice),
        generated_tokens=len(choice.token_ids),
        seed=job.seed,
        prefill=_prefill(job, final),
        tokens=[_token(job, i, entry[i]) for i, entry in zip(choice.token_ids, entries, strict=True)],
    )
    if job.parameters.top_n_tokens:
        details.top_tokens = [_top(job, entry) for entry in entries]
    return GenerateResponse(text, details)


def _prefill(job: _Job, output: RequestOutput) -> list[PrefillToken]:
    if output.prompt_logprobs is None:
        return []
    tokenizer = job.state.engine.tokenizer
    found = []
    for token_id, entry in zip(output.prompt_token_ids, output.prompt_logprobs, strict=True):
        text = "" if tokenizer is None else tokenizer.token_text(token_id)
        found.append(PrefillToken(token_id, text, None if entry is None else entry[token_id].logprob))
    return found


async def _events(job: _Job, stream: OutputStream) -> AsyncIterator[bytes]:
    """An event per token; the last one carries the whole text."""
    writer = _EventWriter(job)
    async with stream as outputs:
        try:
            async for output in outputs:
                for made in writer.events(output.outputs[0]):
                    yield event(made)
        except QuireError as error:  # the headers are out: what went wrong is said in the stream
            yield event(tgi_error(error)[0])


class _EventWriter:
    """Turns deltas into one event per token; the texts of the tokens that are not special make up the generated text."""

    def __init__(self, job: _Job) -> None:
        self._job = job
        self._index = 0
        self._text = job.shown_prompt

    def events(self, choice: CompletionOutput) -> list[StreamEvent]:
        """The events of what is new."""
        self._text += choice.text
        entries = choice.logprobs or []
        own = [_token(self._job, i, entry[i]) for i, entry in zip(choice.token_ids, entries, strict=True)]
        made = []
        for token, entry in zip(_with_texts(own, choice.text), entries, strict=True):
            self._index += 1
            top = _top(self._job, entry) if self._job.parameters.top_n_tokens else None
            made.append(StreamEvent(self._index, token, top_tokens=top))
        if choice.finished():  # which a token brought
            made[-1].generated_text = self._text
            made[-1].details = StreamDetails(
                _finish_reason(choice), self._index, len(self._job.request.prompt_token_ids), self._job.seed
            )
        return made


def _with_texts(tokens: list[TgiToken], text: str) -> list[TgiToken]:
    """The tokens with texts that make up `text`; special ones, which are not in it, keep their names.

    A token that ends in the middle of a character, or that may begin a stop string, shows nothing, and a later one its text.
    """
    plain = [token for token in tokens if not token.special]
    if "".join(token.text for token in plain) != text:
        for token in plain:
            token.text = ""
        (plain or tokens)[-1].text = text
    return tokens


async def info(request: Request) -> Response:
    """Answers GET /info."""
    state = state_of(request)
    state.engine.check_alive()
    found, settings = state.engine.info, state.engine.scheduler_settings
    assert found is not None
    assert settings is not None
    return json_response(
        TgiInfo(
            model_id=state.model_name,
            model_dtype=found.dtype,
            model_device_type=found.platform,
            max_concurrent_requests=settings.max_queued_requests + settings.max_num_seqs,
            max_best_of=1,
            max_stop_sequences=MAX_STOP_STRINGS,
            max_input_tokens=found.max_model_len - 1,
            max_total_tokens=found.max_model_len,
            max_batch_total_tokens=found.num_kv_blocks * found.block_size,
            version=importlib.metadata.version("quire"),
        )
    )


routes = [
    Route("/generate", generate, methods=["POST"]),
    Route("/generate_stream", generate_stream, methods=["POST"]),
    Route("/info", info, methods=["GET"]),
]

_ERRORS = (422, 429, 503, 504)
OPERATIONS = (
    Operation(
        "POST",
        "/generate",
        "Generate text; `stream` makes it /generate_stream.",
        GenerateRequest,
        GenerateResponse,
        stream=StreamEvent,
        errors=_ERRORS,
        error_type=TgiError,
        tag="TGI",
    ),
    Operation(
        "POST",
        "/generate_stream",
        "Generate text, an event per token.",
        GenerateRequest,
        None,
        stream=StreamEvent,
        errors=_ERRORS,
        error_type=TgiError,
        tag="TGI",
    ),
    Operation("GET", "/info", "What is served.", None, TgiInfo, errors=(503,), tag="TGI"),
)
