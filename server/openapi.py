"""The OpenAPI document of the server, made from the types that decode requests and encode responses."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from quire.server.responses import ErrorResponse


@dataclass(frozen=True)
class Operation:
    """One method of one path, as its endpoint module describes it for the OpenAPI document.

    `request` and `response` are msgspec types (None: no body, or a body that is no JSON). `stream` is the type of one
    chunk where the operation can answer with server-sent events. `errors` are the statuses of its own that it answers
    beyond those that every operation has, and `error_type` is what they hold; what the middleware refuses (401, 413) is
    always in OpenAI's shape.
    """

    method: str
    path: str
    summary: str
    request: type | None
    response: type | None
    stream: type | None = None
    errors: tuple[int, ...] = ()
    needs_key: bool = True
    tag: str = ""
    error_type: type = ErrorResponse


def openapi_document(
    operations: Sequence[Operation], *, title: str, version: str, root_path: str, has_keys: bool
) -> dict[str, Any]:
    """An OpenAPI 3.1 document of the operations. Types become components, with their docstrings as descriptions."""
    types = {
        ErrorResponse,
        *(found for o in operations for found in (o.request, o.response, o.stream, o.error_type) if found),
    }
    ordered = sorted(types, key=lambda found: found.__name__)
    _, components = msgspec.json.schema_components(ordered, ref_template="#/components/schemas/{name}")
    paths: dict[str, dict[str, Any]] = {}
    for operation in operations:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _operation(operation, has_keys)
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": title, "version": version},
        "servers": [{"url": root_path or "/"}],
        "paths": paths,
        "components": {"schemas": components},
    }
    if has_keys:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return document


def _reference(type_: type) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{type_.__name__}"}


def _content(type_: type, media_type: str = "application/json") -> dict[str, Any]:
    return {media_type: {"schema": _reference(type_)}}


def _error(status: int, type_: type) -> dict[str, Any]:
    error: dict[str, Any] = {
        "description": _STATUSES[status],
        "content": _content(ErrorResponse if status in (401, 413) else type_),
    }
    if status in (429, 503):
        schema = {"type": "integer", "description": "Seconds after which to try again."}
        error["headers"] = {"Retry-After": {"schema": schema}}
    return error


def _event(operation: Operation) -> dict[str, Any]:
    """One server-sent event: before OpenAPI 3.2 the schema of a stream is that of each of its events."""
    assert operation.stream is not None
    shapes = [_reference(operation.stream), _reference(operation.error_type)]
    data = {"contentMediaType": "application/json", "contentSchema": {"anyOf": shapes}}
    return {
        "type": "object",
        "description": f"Server-sent events, each a {operation.stream.__name__}, or an error. [DONE] ends OpenAI's streams.",
        "properties": {"data": {"type": "string", "anyOf": [data, {"const": "[DONE]"}]}},
        "required": ["data"],
    }


def _operation(operation: Operation, has_keys: bool) -> dict[str, Any]:
    answer: dict[str, Any] = {"description": "Done."}
    if operation.response is not None:
        answer["content"] = _content(operation.response)
    if operation.stream is not None:
        answer.setdefault("content", {})["text/event-stream"] = {"schema": _event(operation)}
    statuses = {*operation.errors, *((400, 413) if operation.request else ())}
    statuses |= {401} if has_keys and operation.needs_key else set()
    described: dict[str, Any] = {
        "operationId": f"{operation.method.lower()}{operation.path.replace('/', '_').replace('{', '').replace('}', '')}",
        "summary": operation.summary,
        "responses": {
            "200": answer,
            **{str(status): _error(status, operation.error_type) for status in sorted(statuses)},
        },
    }
    names = re.findall(r"{(\w+)}", operation.path)
    if names:
        described["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names
        ]
    if operation.tag:
        described["tags"] = [operation.tag]
    if operation.request is not None:
        described["requestBody"] = {"required": True, "content": _content(operation.request)}
    if has_keys and operation.needs_key:
        described["security"] = [{"key": []}]
    return described


_STATUSES = {
    400: "Something in the request is wrong; the error names the parameter.",
    401: "The key is missing or wrong.",
    404: "There is no such thing.",
    413: "The body is too large.",
    422: "Something in the request is wrong.",
    429: "The queue is full; Retry-After tells when to try again.",
    503: "The server starts or stops, or its engine is dead.",
    504: "The request took too long.",
}


def openapi_routes(operations: Sequence[Operation], **about: Any) -> list[Route]:
    """GET /openapi.json, made once; `about` are the keyword arguments of `openapi_document`."""
    body = msgspec.json.encode(openapi_document(operations, **about))

    async def openapi(request: Request) -> Response:
        return Response(body, media_type="application/json")

    return [Route("/openapi.json", openapi, methods=["GET"])]
