"""The ASGI application: every endpoint, what errors become, and the middleware around them."""

from __future__ import annotations

import importlib.metadata
import logging
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from quire.kernels.errors import QuireError
from quire.server import chat, completions, openapi, operations, page, responses, tgi, tokens
from quire.server.engine_client import TRACEPARENT
from quire.server.middleware import load_keys, wrap
from quire.server.state import ServerState

logger = logging.getLogger(__name__)

ENDPOINTS: tuple[Any, ...] = (completions, chat, tokens, tgi, operations)


def make_app(state: ServerState) -> ASGIApp:
    """The application of one server."""
    operations_of_all = tuple(operation for module in ENDPOINTS for operation in module.OPERATIONS)
    app = Starlette(
        routes=[
            *(route for module in ENDPOINTS for route in module.routes),
            *page.routes,
            *openapi.openapi_routes(
                operations_of_all,
                title="quire",
                version=importlib.metadata.version("quire"),
                root_path=state.settings.root_path,
                has_keys=bool(load_keys(state.settings)),
            ),
        ],
        exception_handlers={QuireError: _on_error, HTTPException: _on_http_error, Exception: _on_bug},
    )
    app.state.quire = state
    return wrap(_traced(app), state)


def _traced(app: ASGIApp) -> ASGIApp:
    """Keeps the traceparent header where the engine client finds it."""

    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            found = next((value for name, value in scope["headers"] if name == b"traceparent"), None)
            TRACEPARENT.set(None if found is None else found.decode("latin-1"))
        await app(scope, receive, send)

    return call


async def _on_error(request: Request, error: Exception) -> Response:
    return responses.error_response(error)


async def _on_http_error(request: Request, error: Exception) -> Response:
    """What the router refuses: no such path, or not this method."""
    assert isinstance(error, HTTPException)
    known = {404: f"there is no {request.url.path} here; /openapi.json lists what there is"}
    message = known.get(error.status_code, f"{error.detail}: {request.method} {request.url.path}")
    body = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
    return responses.json_response({"error": body}, status=error.status_code, headers=error.headers)


async def _on_bug(request: Request, error: Exception) -> Response:
    logger.exception("%s %s failed", request.method, request.url.path, exc_info=error)
    return responses.error_response(error)
