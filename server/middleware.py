"""What stands around every endpoint, outermost first: request id, access log and counting; CORS; body limit; keys.

Plain ASGI throughout: a middleware that gathers bodies would break streams and hide clients that go away.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import json
import re
import sys
import time
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from quire.backends.environment import admin_keys, api_keys
from quire.kernels.errors import InvalidConfigError
from quire.server.responses import CLIENT_CLOSED_REQUEST, ErrorDetail, ErrorResponse, json_response
from quire.server.settings import ServerSettings
from quire.server.state import ServerState

OPEN_PATHS = frozenset({"/", "/health", "/ready", "/metrics", "/version", "/openapi.json"})
ADMIN_PREFIX = "/admin/"
# How much of a body that is too large is read and thrown away, in body limits, and for how long.
MAX_DISCARDED, DISCARD_SECONDS = 8, 2.0
REQUEST_ID = re.compile(r"[!-~]{1,128}")


def wrap(app: ASGIApp, state: ServerState) -> ASGIApp:
    """`app` inside all of them. Raises InvalidConfigError for a key file that cannot be used."""
    settings = state.settings
    keys = load_keys(settings)
    admins = _digests([*settings.admin_keys, *admin_keys()])
    app = BodyLimit(Keys(app, keys, admins), settings.max_body_bytes)
    if settings.cors_origins:
        app = CORSMiddleware(
            app,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id"],
        )
    return _at_root_path(Observed(app, state), settings.root_path)


def _at_root_path(app: ASGIApp, root_path: str) -> ASGIApp:
    """Serves below the root path too, so that it does not matter whether the proxy in front takes it off."""
    if not root_path:
        return app
    twice = 2 * root_path.rstrip("/") + "/"  # uvicorn puts it before whatever comes

    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith(twice):
            scope["path"] = scope["path"][len(root_path.rstrip("/")) :]
        await app(scope, receive, send)

    return call


def load_keys(settings: ServerSettings) -> tuple[bytes, ...]:
    """Digests of the API keys from flags, file and environment; none where the server is open to all.

    Raises InvalidConfigError for a file that cannot be read, or that holds no key: an open server was not what its user wanted.
    """
    return _digests([*settings.api_keys, *_keys_in(settings.api_key_file), *api_keys()])


def _keys_in(path: Path | None) -> list[str]:
    if path is None:
        return []
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidConfigError(f"api_key_file: {path} cannot be read ({error})") from error
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise InvalidConfigError(f"api_key_file: {path} holds no key; write one a line")
    return keys


def _digests(keys: Iterable[str]) -> tuple[bytes, ...]:
    return tuple(hashlib.sha256(key.encode()).digest() for key in keys)


class Keys:
    """Lets in who bears a key. Comparing digests, all of them, takes the same time whatever the key is."""

    def __init__(self, app: ASGIApp, keys: tuple[bytes, ...], admins: tuple[bytes, ...]) -> None:
        self._app = app
        self._keys = keys
        self._admins = admins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = _path(scope)
        is_admin = path.startswith(ADMIN_PREFIX)
        if is_admin and not self._admins:
            answer = json_response(ErrorResponse(ErrorDetail(f"there is no {path} here", "invalid_request_error")), 404)
            await answer(scope, receive, send)
            return
        wanted = self._admins if is_admin else self._keys
        if wanted and (is_admin or path not in OPEN_PATHS) and not self._bears_one_of(scope, wanted):
            message = "the request bears no valid key; send it as Authorization: Bearer KEY"
            detail = ErrorDetail(message, "authentication_error", None, "invalid_api_key")
            answer = json_response(ErrorResponse(detail), 401, {"WWW-Authenticate": "Bearer"})
            await answer(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _bears_one_of(self, scope: Scope, digests: tuple[bytes, ...]) -> bool:
        given = Headers(scope=scope).get("authorization", "")
        scheme, _, key = given.partition(" ")
        found = hashlib.sha256(key.strip().encode("latin-1")).digest()
        matches = [hmac.compare_digest(found, digest) for digest in digests]
        return scheme.lower() == "bearer" and any(matches)


def _path(scope: Scope) -> str:
    """The path without what a proxy put before it."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", "")) or "/"


class BodyLimit:
    """Refuses bodies beyond a size, at once where their length is declared, else when they have grown past it."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not self._max_bytes:
            await self._app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "0")
        if not declared.isdigit() or int(declared) > self._max_bytes:
            await self._refuse(scope, receive, send)
            return
        num_bytes, is_too_large, has_begun = 0, False, False

        async def counted() -> Message:
            nonlocal num_bytes, is_too_large
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_bytes and message["type"] == "http.request":
                is_too_large = True
                return {"type": "http.request", "body": b"", "more_body": False}  # whatever is made of it is not sent
            return message

        async def noted(message: Message) -> None:
            nonlocal has_begun
            if has_begun or not is_too_large:
                has_begun = True
                await send(message)

        await self._app(scope, counted, noted)
        if is_too_large and not has_begun:
            await self._refuse(scope, receive, send)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        if "expect" not in Headers(scope=scope):  # reading on would tell such a client to send its body
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(_discard(receive, MAX_DISCARDED * self._max_bytes), DISCARD_SECONDS)
        detail = ErrorDetail(
            f"the body is larger than the {self._max_bytes} bytes that this server takes; send less, or start it with a larger "
            "--max-body-bytes",
            "invalid_request_error",
            None,
            "body_too_large",
        )
        await json_response(ErrorResponse(detail), 413, {"Connection": "close"})(scope, receive, send)


async def _discard(receive: Receive, max_bytes: int) -> None:
    """Reads what is still being sent: a connection that is closed before is reset, and its client never sees the answer."""
    num_bytes = 0
    while num_bytes < max_bytes:
        message = await receive()
        num_bytes += len(message.get("body", b""))
        if not message.get("more_body", False):
            return


class Observed:
    """Gives each request an id, and counts and logs it when it has ended."""

    def __init__(self, app: ASGIApp, state: ServerState) -> None:
        self._app = app
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begin = time.perf_counter()
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        status, num_bytes, is_whole = CLIENT_CLOSED_REQUEST, 0, False

        async def observed(message: Message) -> None:
            nonlocal status, num_bytes, is_whole
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            elif message["type"] == "http.response.body":
                num_bytes += len(message.get("body", b""))
                is_whole = not message.get("more_body", False)
            await send(message)

        try:
            await self._app(scope, receive, observed)
        finally:
            seconds = time.perf_counter() - begin
            ended = status if is_whole else CLIENT_CLOSED_REQUEST
            self._state.metrics.count_http(scope["method"], _route(scope), ended, seconds)
            self._log(scope, ended, seconds, num_bytes, request_id)

    def _log(self, scope: Scope, status: int, seconds: float, num_bytes: int, request_id: str) -> None:
        style = self._state.settings.access_log
        if style == "none":
            return
        client = scope.get("client")
        entry: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "client": f"{client[0]}:{client[1]}" if client else "-",
            "method": scope["method"],
            "path": scope["path"],
            "status": status,
            "seconds": round(seconds, 4),
            "bytes": num_bytes,
            "request_id": request_id,
        }
        if style == "json":
            line = json.dumps(entry)
        else:
            line = "{time} {client} {method} {path!r} {status} {seconds:.4f}s {bytes} bytes {request_id}".format(
                **entry
            )
        print(line, file=sys.stderr, flush=True)


def _route(scope: Scope) -> str:
    """The template of the route that answered, so that no client can make labels up."""
    route = scope.get("route")
    if route is not None:
        path: str = route.path
        return path
    endpoint_path = _path(scope)
    return endpoint_path if scope.get("endpoint") is not None and not scope.get("path_params") else "unmatched"
