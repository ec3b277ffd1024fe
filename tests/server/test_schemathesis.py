"""schemathesis over the server's own OpenAPI document: what it generates never breaks the server or the document's promises.

Generation is kept short, since what is looked for is in the requests' shapes and not in their answers' lengths.
"""

from __future__ import annotations

import json

import pytest
import schemathesis
import schemathesis.checks
import schemathesis.specs.openapi.checks as openapi_checks
from hypothesis import HealthCheck, settings

CHECKS = [
    schemathesis.checks.not_a_server_error,
    openapi_checks.status_code_conformance,
    openapi_checks.content_type_conformance,
    openapi_checks.response_headers_conformance,
    openapi_checks.response_schema_conformance,
]
PATHS = [
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/models",
    "/v1/models/{model}",
    "/tokenize",
    "/detokenize",
    "/version",
    "/generate",
    "/generate_stream",
    "/info",
    "/health",
    "/ready",
    "/metrics",
]
MAX_TOKENS = {"/v1/completions": "max_tokens", "/v1/chat/completions": "max_tokens"}


@pytest.fixture(scope="module")
def schema(server):
    """The document as the server gives it."""
    return schemathesis.openapi.from_url(server.url + "/openapi.json")


def keep_short(case):
    """Limits how much a valid request may generate; what makes a request invalid stays."""
    body = case.body
    if not isinstance(body, dict):
        return
    name = MAX_TOKENS.get(case.path)
    if name is not None and isinstance(body.get(name, 0), int | None):
        body[name] = 3
    if isinstance(body.get("n"), int) and body["n"] > 4:
        body["n"] = 4
    if "/generate" in case.path and isinstance(body.get("parameters", {}), dict | None):
        body["parameters"] = {"max_new_tokens": 3, **(body.get("parameters") or {})}


@pytest.mark.parametrize("path", PATHS)
def test_generated_requests_are_answered_as_the_document_says(server, schema, path):
    for operation in (found.ok() for found in schema.get_all_operations()):
        if operation.path == path:
            check(operation)
    server.wait_idle()


def check(operation):
    """Sends what schemathesis makes of one operation."""

    @settings(max_examples=40, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @schemathesis.python.given(operation) if hasattr(schemathesis.python, "given") else lambda test: test
    def sends(case):
        keep_short(case)
        case.call_and_validate(checks=CHECKS, timeout=30)

    sends()


def test_every_path_of_the_document_is_tried(server):
    assert sorted(json.loads(server.get("/openapi.json")[1])["paths"]) == sorted(PATHS)
