"""The OpenAPI document: what the types say is in it, and every path that the server has."""

from __future__ import annotations

import json
from typing import Annotated

import msgspec
import pytest

from quire.server.openapi import Operation, openapi_document


class Asked(msgspec.Struct, forbid_unknown_fields=True):
    """What is asked."""

    count: Annotated[int, msgspec.Meta(description="How many.")]
    name: str | None = None


class Told(msgspec.Struct):
    """What is told."""

    text: str


class OddError(msgspec.Struct):
    """An error of another shape."""

    problem: str


OPERATIONS = (
    Operation("POST", "/ask", "Asks.", Asked, Told, stream=Told, errors=(422, 429), tag="Talk", error_type=OddError),
    Operation("GET", "/ask/{name}", "One answer.", None, Told, errors=(404,)),
    Operation("GET", "/open", "Open to all.", None, None, needs_key=False),
)


def document(**changes):
    about = {"title": "t", "version": "1", "root_path": "", "has_keys": False, **changes}
    return openapi_document(OPERATIONS, **about)


def test_docstrings_and_descriptions_carry_into_the_document():
    schema = document()["components"]["schemas"]["Asked"]
    assert schema["description"] == "What is asked."
    assert schema["properties"]["count"] == {"type": "integer", "description": "How many."}
    assert schema["required"] == ["count"]
    assert schema["additionalProperties"] is False


def test_streams_errors_and_path_parameters_are_described():
    paths = document()["paths"]
    ask = paths["/ask"]["post"]
    assert set(ask["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
    assert set(ask["responses"]) == {"200", "400", "413", "422", "429"}
    shapes = {
        status: found["content"]["application/json"]["schema"]["$ref"] for status, found in ask["responses"].items()
    }
    assert shapes["422"] == "#/components/schemas/OddError"
    assert shapes["413"] == "#/components/schemas/ErrorResponse"
    assert "Retry-After" in ask["responses"]["429"]["headers"]
    assert paths["/ask/{name}"]["get"]["parameters"][0]["name"] == "name"


def test_only_operations_behind_a_key_ask_for_it():
    paths = document(has_keys=True)["paths"]
    assert paths["/ask"]["post"]["security"] == [{"key": []}]
    assert "401" in paths["/ask"]["post"]["responses"]
    assert "security" not in paths["/open"]["get"]
    assert "security" not in document()["paths"]["/ask"]["post"]
    assert "securitySchemes" not in document()["components"]


def test_root_path_is_the_servers_url():
    assert document(root_path="/proxy")["servers"] == [{"url": "/proxy"}]


def references(value):
    """Every $ref in a document."""
    if isinstance(value, dict):
        yield from (found for found in [value.get("$ref")] if isinstance(found, str))
        value = list(value.values())
    if isinstance(value, list):
        for inner in value:
            yield from references(inner)


def test_a_server_describes_itself(server):
    status, body = server.get("/openapi.json")
    made = json.loads(body)
    assert status == 200
    assert made["openapi"].startswith("3.1")
    schemas = made["components"]["schemas"]
    assert {found.removeprefix("#/components/schemas/") for found in references(made)} == set(schemas)
    assert [name for name, schema in schemas.items() if not schema.get("description")] == []
    ids = [operation["operationId"] for path in made["paths"].values() for operation in path.values()]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize(
    "path",
    [
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/models",
        "/tokenize",
        "/detokenize",
        "/generate",
        "/generate_stream",
    ]
    + ["/info", "/version", "/health", "/ready", "/metrics"],
)
def test_every_endpoint_is_in_the_document(server, path):
    assert path in json.loads(server.get("/openapi.json")[1])["paths"]
