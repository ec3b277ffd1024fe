"""Well-formed requests that are made to cost: they are refused or paid for by their sender, and nobody else waits."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import uvicorn

from quire.server.http_protocol import MAX_HEAD_BYTES, HttpProtocol
from tests.server.conftest import Server
from tests.server.test_fuzz import request_head, talk, works

SHORT = {"prompt": "def f(x):", "max_tokens": 2}
MESSAGES = [{"role": "user", "content": "hello"}]
PATIENCE = 1.5  # seconds; each of these held the server for 1 to 43 before, on a machine as busy as this one may be


@contextmanager
def answering(server: Server) -> Iterator[None]:
    """Asks /health all the while, and asserts that no answer took long."""
    worst, ends = [0.0], threading.Event()

    def ask() -> None:
        while not ends.wait(0.01):
            begin = time.monotonic()
            server.get("/health", timeout=60)
            worst[0] = max(worst[0], time.monotonic() - begin)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        ends.set()
        thread.join()
    assert worst[0] < PATIENCE


def numbers(count: int, field: str) -> bytes:
    """A body whose `field` is the same token over and over."""
    return b'{"prompt": "x", "' + field.encode() + b'": [' + b"5," * count + b"5]}"


COSTLY = {
    "text": ("/v1/completions", {"prompt": "def f(x): " * 1_500_000}, "prompt"),
    "text without special tokens": ("/v1/completions", {"prompt": "a" * 10**7, "add_special_tokens": False}, "prompt"),
    "conversation": (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "def f(x): " * 10**6}]},
        "prompt",
    ),
    "text to count": ("/tokenize", {"prompt": "def f(x): " * 1_500_000}, "prompt"),
    "conversation to count": ("/tokenize", {"messages": [{"role": "user", "content": "a b" * 10**6}]}, "prompt"),
    "tokens": ("/detokenize", {"tokens": [5] * 5_000_000}, "tokens"),
    "stop strings": ("/v1/completions", {**SHORT, "stop": [f"z{number}" for number in range(10_000)]}, "stop"),
    "stop tokens": ("/v1/completions", numbers(5_000_000, "stop_token_ids"), "stop_token_ids"),
    "allowed tokens": ("/v1/completions", numbers(5_000_000, "allowed_token_ids"), "allowed_token_ids"),
    "bad words": ("/v1/completions", {**SHORT, "bad_words": ["word"] * 10**6}, "bad_words"),
    "choices": ("/v1/completions", {**SHORT, "n": 16384}, "n"),
    "prompts": ("/v1/completions", {"prompt": ["def f(x): " * 199] * 8000}, "prompt"),
}


@pytest.mark.parametrize("name", COSTLY)
def test_costly_requests_are_refused_before_work_is_done_for_them(server: Server, name: str) -> None:
    path, body, parameter = COSTLY[name]
    with answering(server):
        status, answer = server.post(path, body)
    assert status == 400, answer
    assert answer["error"]["param"] == parameter
    works(server)


@pytest.mark.parametrize("parameters", [{}, {"truncate": 5}])
def test_costly_inputs_are_refused_in_tgis_shape_too(server: Server, parameters: dict) -> None:
    with answering(server):
        status, answer = server.post("/generate", {"inputs": "def f(x): " * 1_500_000, "parameters": parameters})
    assert status == 422
    assert "inputs" in answer["error"]
    assert (
        server.post("/generate", {"inputs": "x", "parameters": {"stop": [f"z{number}" for number in range(100)]}})[0]
        == 422
    )


def test_texts_as_long_as_their_use_are_taken(server: Server) -> None:
    with answering(server):
        status, answer = server.post("/tokenize", {"prompt": "def f(x): " * 100_000, "return_token_strs": True})
    assert status == 200
    assert answer["count"] > 100_000
    status, answer = server.post(
        "/generate", {"inputs": "def f(x): " * 5000, "parameters": {"truncate": 9, "max_new_tokens": 2}}
    )
    assert status == 200


def nested(depth: int) -> bytes:
    return b'{"a":' * depth + b"1" + b"}" * depth


@pytest.mark.parametrize("depth", [100, 400, 700, 900, 990])
@pytest.mark.parametrize(
    "field",
    [
        b'"tools": [{"type": "function", "function": {"name": "f", "parameters": @}}]',
        b'"chat_template_kwargs": {"x": @}',
        b'"metadata": @',
    ],
)
def test_nesting_is_answered_or_refused(server: Server, field: bytes, depth: int) -> None:
    body = b'{"messages": [{"role": "user", "content": "x", "extra": @}], "max_tokens": 1, ' + field + b"}"
    status, answer = server.post("/v1/chat/completions", body.replace(b"@", nested(depth)))
    assert status in (200, 400), answer


@pytest.mark.parametrize(
    "name", ["add_generation_prompt", "continue_final_message", "return_dict", "tokenizer_kwargs", "max_length"]
)
def test_arguments_of_the_library_are_none_of_the_template(server: Server, name: str) -> None:
    status, answer = server.post("/v1/chat/completions", {"messages": MESSAGES, "chat_template_kwargs": {name: 1}})
    assert status == 400
    assert answer["error"]["param"] == "chat_template_kwargs"
    assert name in answer["error"]["message"]


def test_body_that_is_too_large_is_answered_although_its_client_sends_on(server: Server) -> None:
    status, answer = server.post("/v1/completions", b'{"prompt": "' + b"x" * (20 * 2**20) + b'"}')
    assert status == 413
    assert "max-body-bytes" in answer["error"]["message"]
    works(server)


def test_head_has_a_limit_however_it_comes(server: Server) -> None:
    head = b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    assert talk(server, head + b"X-A: " + b"y" * (MAX_HEAD_BYTES // 2) + b"\r\n\r\n").startswith(b"HTTP/1.1 200")
    with answering(server):
        for endless in (b"X-A: " + b"y" * 30_000_000, b"X-A: b\r\n" * 500_000):
            answer = talk(server, head + endless)
            assert answer == b"" or answer.startswith(b"HTTP/1.1 400")  # nothing, where it was closed while it was sent
    chunked = request_head("/v1/completions", "Transfer-Encoding: chunked")
    answer = talk(server, chunked + b"1;" + b"x" * 10**6)
    assert b"HTTP/1.1 200" not in answer
    works(server)


def test_bodies_larger_than_a_head_may_be_are_taken(server: Server) -> None:
    body = json.dumps({**SHORT, "user": "x" * (20 * MAX_HEAD_BYTES)}).encode()
    answer = talk(server, request_head("/v1/completions", f"Content-Length: {len(body)}") + body)
    assert answer.startswith(b"HTTP/1.1 200"), answer[:300]


def test_pipelined_requests_are_answered_in_order(server: Server) -> None:
    data = b""
    for count in range(1, 9):
        body = json.dumps({**SHORT, "max_tokens": count, "ignore_eos": True}).encode()
        head = "" if count < 8 else "Connection: close\r\n"
        data += f"POST /v1/completions HTTP/1.1\r\nHost: x\r\n{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    counts = re.findall(rb'"completion_tokens":(\d+)', talk(server, data))
    assert [int(count) for count in counts] == list(range(1, 9))


class Impatient(HttpProtocol):
    """With a stall that a test can wait for."""

    stall_seconds = 0.3


@contextmanager
def impatient_server() -> Iterator[tuple[str, int]]:
    """The protocol around an application that reads a body, waits longer than a stall, and answers."""

    async def app(scope, receive, send) -> None:
        while (await receive()).get("more_body"):
            pass
        await asyncio.sleep(1.0)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, http=Impatient, lifespan="off", log_config=None, ws="none"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield listener.getsockname()
    finally:
        server.should_exit = True
        thread.join()


@pytest.mark.parametrize("sent", [b"", b"POST / HTT", b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n12345"])
def test_connection_that_stalls_in_a_request_is_closed(sent: bytes) -> None:
    with impatient_server() as address, socket.create_connection(address, timeout=10) as connection:
        connection.sendall(sent)
        assert connection.recv(100) == b""


def test_connection_that_waits_for_its_answer_or_trickles_is_not_closed() -> None:
    with impatient_server() as address, socket.create_connection(address, timeout=10) as connection:
        for byte in b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\n123":
            connection.sendall(bytes([byte]))
            time.sleep(0.02)
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
