"""Bodies in and out: strict JSON to types, errors in OpenAI's shape, server-sent events, clients that go away."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Mapping
from typing import Any, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from quire.kernels.errors import (
    EngineDeadError,
    InvalidConfigError,
    InvalidRequestError,
    NotServingError,
    OutOfBlocksError,
    QueueFullError,
    QuireError,
    RequestTimeoutError,
)

T = TypeVar("T")

CLIENT_CLOSED_REQUEST = 499  # as nginx logs a client that went away
RETRY_SECONDS = 5  # for a server that starts or stops: another one, or this one, may take the request then

# Error class, HTTP status, OpenAI's type. The first that fits counts.
_KINDS: tuple[tuple[type[QuireError], int, str], ...] = (
    (InvalidRequestError, 400, "invalid_request_error"),
    (InvalidConfigError, 400, "invalid_request_error"),
    (OutOfBlocksError, 400, "invalid_request_error"),
    (QueueFullError, 429, "rate_limit_error"),
    (NotServingError, 503, "service_unavailable_error"),
    (EngineDeadError, 503, "service_unavailable_error"),
    (RequestTimeoutError, 504, "timeout_error"),
)


class ErrorDetail(msgspec.Struct):
    """What was wrong: `param` names the field of the request, where there is one."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(msgspec.Struct):
    """An error in OpenAI's shape."""

    error: ErrorDetail


class ModelNotFoundError(InvalidRequestError):
    """A request for a model that is not served here."""


class ClientDisconnected(QuireError):
    """The client went away before its answer was there."""


def json_response(value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A value as JSON."""
    return Response(msgspec.json.encode(value), status, headers, media_type="application/json")


def status_of(error: Exception) -> int:
    """The HTTP status that an error is answered with."""
    if isinstance(error, ModelNotFoundError):
        return 404
    if isinstance(error, ClientDisconnected):
        return CLIENT_CLOSED_REQUEST
    return next((status for kind, status, _ in _KINDS if isinstance(error, kind)), 500)


def error_body(error: Exception) -> ErrorResponse:
    """An error as a value for JSON. What is not quire's own is a defect, and its text stays in the server's log."""
    if isinstance(error, ModelNotFoundError):
        return ErrorResponse(ErrorDetail(str(error), "invalid_request_error", error.parameter, "model_not_found"))
    kind = next((kind for found, _, kind in _KINDS if isinstance(error, found)), "server_error")
    is_ours = isinstance(error, QuireError)
    message = str(error) if is_ours else "the server failed on this request; its log says why"
    code = {429: "queue_full", 503: "not_serving", 504: "timeout"}.get(status_of(error))
    return ErrorResponse(ErrorDetail(message, kind, getattr(error, "parameter", None), code))


def error_response(error: Exception) -> Response:
    """An error as an HTTP answer, with Retry-After where trying again may help."""
    headers = {}
    if isinstance(error, QueueFullError):
        headers["Retry-After"] = str(error.retry_after)
    elif isinstance(error, NotServingError):
        headers["Retry-After"] = str(RETRY_SECONDS)
    return json_response(error_body(error), status_of(error), headers)


async def read_body(request: Request, type_: type[T]) -> T:
    """The request's JSON body as a value of `type_`.

    Raises InvalidRequestError, naming the parameter where there is one, for whatever is not exactly that.
    """
    try:
        body = await request.body()
    except ClientDisconnect as error:
        raise ClientDisconnected("the client went away while it sent its request") from error
    return decode_body(body, type_)


def decode_body(body: bytes, type_: type[T]) -> T:
    """`read_body` for bytes that are there already."""
    try:
        return msgspec.json.decode(body, type=type_)
    except msgspec.ValidationError as error:
        raise InvalidRequestError(_explain(str(error)), parameter=_parameter_of(str(error))) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequestError(f"the body is no valid JSON: {error}") from error
    except RecursionError as error:
        raise InvalidRequestError("the body's JSON is nested too deeply") from error


def _explain(message: str) -> str:
    """msgspec's message, with the place in the words of the caller's JSON."""
    return message.replace("Object contains unknown field", "there is no parameter").replace("`$.", "`")


def _parameter_of(message: str) -> str | None:
    """The field that msgspec's message is about: an unknown or a missing one, or the first name of the path."""
    if found := re.search(r"unknown field `([^`]*)`|missing required field `([^`]*)`", message):
        return found.group(1) or found.group(2)
    found = re.search(r"`\$\.(\w+)", message)
    return found.group(1) if found else None


async def unless_disconnected(request: Request, awaitable: Awaitable[T]) -> T:
    """What `awaitable` gives. When the client goes away first it is cancelled, and ClientDisconnected raised.

    The body must have been read: what the client sends after it is not looked at.
    """
    work = asyncio.ensure_future(awaitable)
    watch = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return work.result()
        raise ClientDisconnected("the client went away before its answer was there")
    finally:
        for task in (work, watch):
            if not task.done():
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class _EventStream(StreamingResponse):
    """A stream that closes its iterator itself, so that what it holds is given back at once and not when it is collected."""

    def __init__(self, events: AsyncIterator[bytes]) -> None:
        # Proxies must not gather events, nor caches keep them.
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            if isinstance(self._events, AsyncGenerator):
                await self._events.aclose()


def sse_response(events: AsyncIterator[bytes]) -> Response:
    """Server-sent events, each as it comes; `events` are whole ones, as `event` makes them."""
    return _EventStream(events)


DONE = b"data: [DONE]\n\n"


def event(value: Any) -> bytes:
    """A value as one server-sent event."""
    return b"data: " + msgspec.json.encode(value) + b"\n\n"
