"""schemathesis over the server's own OpenAPI document: what it generates never breaks the server or the document's promises.

Generation is kept short, since what is looked for is in the requests' shapes and not in their answers' lengths.
"""

from __future__ import annotations

import json

import pytest
import schemathesis
import schemathesis.checks
import schemathesis.specs.openapi.checks as openapi_checks
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode

from quire.server.protocol import REFUSED
from tests.server.conftest import ADMIN_KEY

CHECKS = [
    schemathesis.checks.not_a_server_error,
    openapi_checks.status_code_conformance,
    openapi_checks.content_type_conformance,
    openapi_checks.response_headers_conformance,
    openapi_checks.response_schema_conformance,
]
POSTS = ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize", "/generate", "/generate_stream"]
GETS = ["/v1/models", "/v1/models/{model}", "/version", "/info", "/health", "/ready", "/metrics"]
ADMIN = "/admin/scheduler"
PATHS = [*POSTS, *GETS, ADMIN]
ADMIN_HEADERS = {"authorization": f"Bearer {ADMIN_KEY}"}
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


MODES = [(path, GenerationMode.POSITIVE) for path in PATHS] + [(path, GenerationMode.NEGATIVE) for path in POSTS]


@pytest.mark.parametrize(("path", "mode"), MODES, ids=lambda value: getattr(value, "value", value))
def test_generated_requests_are_answered_as_the_document_says(server, schema, path, mode):
    operations = [found.ok() for found in schema.get_all_operations()]
    for operation in (found for found in operations if found.path == path):
        check(operation, mode)
    server.wait_idle()


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=lambda mode: mode.value)
@pytest.mark.parametrize("key", ["", ADMIN_KEY], ids=["without key", "with key"])
def test_admin_requests_are_answered_as_the_document_says(server, schema, key, mode):
    headers = {"authorization": f"Bearer {key}"} if key else {}
    before = json.loads(server.get(ADMIN, **ADMIN_HEADERS)[1])["settings"]
    try:
        for operation in (found.ok() for found in schema.get_all_operations()):
            if operation.path == ADMIN and (operation.method != "get" or mode is GenerationMode.POSITIVE):
                check(operation, mode, headers)
        if not key:
            assert json.loads(server.get(ADMIN, **ADMIN_HEADERS)[1])["settings"] == before
    finally:
        assert server.post(ADMIN, before, **ADMIN_HEADERS)[0] == 200
    server.wait_idle()


def check(operation, mode, headers=None):
    """Sends what schemathesis makes of one operation."""
    is_fixed = operation.method == "get" and "{" not in operation.path

    @settings(max_examples=1 if is_fixed else 60, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(mode))
    def sends(case):
        keep_short(case)
        case.call_and_validate(checks=CHECKS, timeout=30, headers=headers)

    sends()


REPAIRS = {
    "/v1/completions": {"prompt": "def f(x):", "max_tokens": 3},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hello"}], "max_completion_tokens": 3},
}
LEFT_OUT = {*REFUSED, "model", "best_of", "response_format", "priority", "max_tokens", "max_completion_tokens"}
NARROW = {"temperature", "top_p", "top_k", "min_p", "n", "logprobs", "top_logprobs", "prompt_logprobs", "min_tokens"}


@pytest.mark.parametrize("path", REPAIRS)
def test_answers_and_streams_are_as_the_document_says(server, schema, path):
    """Most of what is generated is refused, so here what is refused most often is put right."""
    operation = next(found.ok() for found in schema.get_all_operations() if found.ok().path == path)
    answered = set()

    @settings(max_examples=80, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(
        case=operation.as_strategy(),
        is_stream=st.booleans(),
        narrow=st.sets(st.sampled_from(sorted(NARROW)), max_size=1),
    )
    def sends(case, is_stream, narrow):
        dropped = LEFT_OUT | (NARROW - narrow)
        body = {name: value for name, value in case.body.items() if name not in dropped}
        case.body = {**body, **REPAIRS[path], "stream": is_stream, "tools": None, "tool_choice": None}
        if path == "/v1/completions":
            del case.body["tools"], case.body["tool_choice"]
        response = case.call(timeout=30)
        case.validate_response(response, checks=CHECKS)
        if response.status_code == 200:
            answered.add(response.headers["content-type"][0].split(";")[0])

    sends()
    assert answered == {"application/json", "text/event-stream"}
    server.wait_idle()


def test_every_path_of_the_document_is_tried(server):
    assert sorted(json.loads(server.get("/openapi.json")[1])["paths"]) == sorted(PATHS)
