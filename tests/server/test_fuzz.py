"""Bodies that nobody should send, and readers that go away: each is refused or let go, nothing hangs, no block is lost."""

from __future__ import annotations

import contextlib
import errno
import http.client
import json
import math
import random
import socket
import time
from urllib.parse import urlsplit

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

ADMIN_KEY = "admin-secret"  # of the session's server
SECONDS = 20.0  # longer is a hang
VALID = {
    "/v1/completions": {"prompt": "def f(x):", "max_tokens": 2},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2},
    "/tokenize": {"prompt": "def f(x):"},
    "/detokenize": {"tokens": [5, 6, 7]},
    "/generate": {"inputs": "def f(x):", "parameters": {"max_new_tokens": 2}},
    "/generate_stream": {"inputs": "def f(x):", "parameters": {"max_new_tokens": 2}},
    "/admin/scheduler": {"max_num_seqs": 8},
}
STREAMS = {
    "/v1/completions": {"prompt": "def f(x):", "max_tokens": 400, "stream": True, "ignore_eos": True},
    "/v1/chat/completions": {
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 400,
        "stream": True,
        "ignore_eos": True,
    },
    "/generate_stream": {"inputs": "def f(x):", "parameters": {"max_new_tokens": 400, "temperature": 3.0}},
}
DEEP = 100_000
MALFORMED = {
    "empty": b"",
    "white space": b" \n\t ",
    "truncated": b'{"prompt": "de',
    "only a brace": b"{",
    "two values": b"{} {}",
    "null": b"null",
    "number": b"1",
    "string": b'"text"',
    "array": b"[]",
    "no fields": b"{}",
    "invalid utf-8": b'{"prompt": "\xff\xfe"}',
    "overlong utf-8": b'{"prompt": "\xc0\xaf"}',
    "utf-16": '{"prompt": "x"}'.encode("utf-16"),
    "byte order mark": b'\xef\xbb\xbf{"prompt": "x"}',
    "lone surrogate as bytes": b'{"prompt": "\xed\xa0\x80"}',
    "null bytes": b"\x00" * 1000,
    "deep arrays": b"[" * DEEP,
    "deep arrays, closed": b"[" * DEEP + b"]" * DEEP,
    "deep objects": b'{"a":' * DEEP,
    "deep objects, closed": b'{"a":' * DEEP + b"1" + b"}" * DEEP,
    "form": b"prompt=x&max_tokens=3",
    "python": b"{'prompt': 'x'}",
    "trailing comma": b'{"prompt": "x",}',
    "a thousand digits": b'{"prompt": ' + b"9" * 1000 + b"}",
    "unfinished escape": b'{"prompt": "\\u12"}',
}
# As they stand in JSON: what no field of a valid body may be.
WRONG_VALUES = [
    b"NaN",
    b"Infinity",
    b"-Infinity",
    b"1e999",
    b"-1e308",
    b"1" + b"0" * 400,
    b"-9223372036854775809",
    b"18446744073709551616",
    b'"\\ud800"',
    b'"\\udfff\\ud800"',
    b"[" * DEEP + b"]" * DEEP,
    b'{"a":' * DEEP + b"1" + b"}" * DEEP,
    b"[[[1]]]",
    b'{"role": 1}',
    b"[null]",
    b'[{"role": "user", "content": {"a": 1}}]',
    b"-1",
    b"1.5",
    b"true",
]


def connect(server, seconds=SECONDS):
    """A connection whose every wait is limited."""
    url = urlsplit(server.url)
    return contextlib.closing(http.client.HTTPConnection(url.hostname, url.port, timeout=seconds))


def send(server, path, body, **headers):
    """Status and body of a POST, within the time."""
    given = {"content-type": "application/json", "authorization": f"Bearer {ADMIN_KEY}"}
    with connect(server) as connection:
        connection.request("POST", path, body, {**given, **{name.replace("_", "-"): v for name, v in headers.items()}})
        response = connection.getresponse()
        return response.status, response.read()


def works(server):
    """Nothing is left of what was sent, and a normal request is answered."""
    server.wait_idle()
    status, body = send(server, "/v1/completions", json.dumps(VALID["/v1/completions"]))
    assert status == 200
    assert json.loads(body)["usage"]["completion_tokens"] == 2


def refused(status, body, path):
    """Whether it is a client's error, told in the endpoint's shape."""
    assert 400 <= status < 500, (status, body[:300])
    error = json.loads(body)["error"]
    assert error if path.startswith("/generate") and status == 422 else error["message"]


@pytest.mark.parametrize("path", VALID)
def test_malformed_bodies_are_refused(server, path):
    for body in MALFORMED.values():
        if path == "/admin/scheduler" and body == b"{}":
            continue  # no change is a change that can be made
        refused(*send(server, path, body), path)
    works(server)


def fields(value, path=()):
    """The places of a body that a value can be put in."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield (*path, name)
            yield from fields(inner, (*path, name))
    if isinstance(value, list):
        for index, inner in enumerate(value):
            yield from fields(inner, (*path, index))


def with_value(body, place, raw):
    """A body as JSON with `raw` put at one place."""
    copy = json.loads(json.dumps(body))
    inner = copy
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = "@"
    return json.dumps(copy).encode().replace(b'"@"', raw)


@pytest.mark.parametrize("path", VALID)
def test_wrong_values_are_refused_in_every_field(server, path):
    for place in fields(VALID[path]):
        for raw in WRONG_VALUES:
            status, body = send(server, path, with_value(VALID[path], place, raw))
            assert 400 <= status < 500, (place, raw[:40], status, body[:300])
            refused(status, body, path)
    works(server)


@pytest.mark.parametrize("path", VALID)
def test_unknown_fields_are_refused_by_name(server, path):
    for raw in [b"1", b"null", b"[" * DEEP + b"]" * DEEP]:
        body = json.dumps({**VALID[path], "surely_unknown": "@"}).encode().replace(b'"@"', raw)
        status, answer = send(server, path, body)
        refused(status, answer, path)
        assert b"surely_unknown" in answer or raw[:1] == b"["
    works(server)


NAMES = """
    prompt messages max_tokens temperature top_p top_k n stop stream stream_options seed logprobs top_logprobs echo suffix
    logit_bias tools tool_choice inputs parameters tokens model user priority cache_salt stop_token_ids min_tokens bad_words
    allowed_token_ids prompt_logprobs response_format max_new_tokens truncate details chat_template_kwargs documents
    continue_final_message add_generation_prompt return_token_ids max_completion_tokens role content
"""
names = st.sampled_from(NAMES.split())
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.integers(-2, 3)
    | st.floats()
    | st.text(st.characters(), max_size=20)  # lone surrogates too
    | st.sampled_from(["user", "function", "auto", "\0", "<|end|>", "\u202e", "x" * 3000]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names | st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)


@pytest.mark.parametrize("path", [path for path in VALID if path != "/admin/scheduler"])
def test_generated_bodies_are_answered_or_refused(server, path):
    @settings(max_examples=120, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(changes=st.dictionaries(names, values, max_size=3))
    def answers(changes):
        body = {**VALID[path], **changes}
        if isinstance(body.get("n"), int) and not isinstance(body["n"], bool) and 4 < body["n"] < 20_000:
            body["n"] = 4  # as many as are asked for would be made
        status, answer = send(server, path, json.dumps(body))
        assert status < 500, (body, answer[:300])
        if status != 200:
            refused(status, answer, path)

    answers()
    works(server)


@pytest.mark.parametrize("path", VALID)
def test_giant_bodies_are_refused(server, path):
    giant = "x" * 4_000_000
    status, body = send(server, path, json.dumps(dict.fromkeys(VALID[path], giant)))
    if path != "/tokenize":  # which may be asked for any length that the body limit lets in
        refused(status, body, path)
    # Refused by its declared length, before the body has come; and once more has come than was not declared.
    head = request_head(path, f"Content-Length: {17 * 2**20}")
    answer = talk(server, head + b'"' + b"x" * 1000)
    assert answer.startswith(b"HTTP/1.1 413"), answer[:300]
    chunk = b"10000\r\n" + b"x" * 2**16 + b"\r\n"
    answer = talk(server, request_head(path, "Transfer-Encoding: chunked") + chunk * (16 * 16) + b"1\r\nx\r\n")
    assert answer.startswith(b"HTTP/1.1 413"), answer[:300]
    works(server)


@pytest.mark.parametrize("path", VALID)
def test_nul_and_control_characters_are_only_characters(server, path):
    strange = "".join(map(chr, range(32))) + "\x7f\ufeff\uffff\U0010ffff\u202e"
    body = json.loads(json.dumps(VALID[path]).replace("def f(x):", "@").replace("hello", "@"))
    status, answer = send(server, path, json.dumps(body).replace('"@"', json.dumps(strange)))
    assert status == 200, answer[:300]
    works(server)


@pytest.mark.parametrize(
    "content_type", ["text/plain", "application/x-www-form-urlencoded", "", "multipart/form-data", "\xff"]
)
def test_content_type_breaks_nothing(server, content_type):
    for path, body in VALID.items():
        status, answer = send(server, path, json.dumps(body), content_type=content_type)
        assert status == 200 or 400 <= status < 500, (path, status, answer[:300])
    works(server)


def talk(server, data, *, ends=False, seconds=SECONDS):
    """What the server answers to bytes on a bare socket, until it closes or is silent for a second after having spoken."""
    url = urlsplit(server.url)
    answer = b""
    with (
        socket.create_connection((url.hostname, url.port), timeout=seconds) as connection,
        contextlib.suppress(ConnectionError),
    ):
        connection.sendall(data)
        if ends:
            try:
                connection.shutdown(socket.SHUT_WR)
            except OSError as error:  # the server has closed already; what it said is still to be read
                if error.errno != errno.ENOTCONN:
                    raise
        while piece := connection.recv(65536):
            answer += piece
            connection.settimeout(1.0)
    return answer


def request_head(path, *headers):
    """The head of a raw POST."""
    fixed = ["Host: x", "Connection: close", "Content-Type: application/json", f"Authorization: Bearer {ADMIN_KEY}"]
    lines = [f"POST {path} HTTP/1.1", *fixed, *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


@pytest.mark.parametrize("path", [path for path in VALID if path != "/admin/scheduler"])
def test_chunked_bodies_are_read_as_any_other(server, path):
    body = json.dumps(VALID[path]).encode()
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"
    answer = talk(server, request_head(path, "Transfer-Encoding: chunked") + chunks)
    assert answer.startswith(b"HTTP/1.1 200"), answer[:300]
    broken = talk(server, request_head(path, "Transfer-Encoding: chunked") + b"zz\r\n" + body)
    assert broken.startswith(b"HTTP/1.1 400"), broken[:300]
    works(server)


@pytest.mark.parametrize("path", VALID)
def test_requests_that_are_cut_off_leave_nothing_behind(server, path):
    whole = request_head(path, "Content-Length: 1000") + json.dumps(VALID[path]).encode()
    for length in (1, 20, len(whole) // 2, len(whole) - 5, len(whole)):
        answer = talk(server, whole[:length], ends=True)
        assert answer == b"" or answer.startswith(b"HTTP/1.1 4"), answer[:300]
    works(server)


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"\x00" * 200,
        b"GET\r\n\r\n",
        b"POST /v1/completions HTTP/9.9\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: 99999999999999999999\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
        b"POST /v1/completions HTTP/1.1\r\n" + b"X: " + b"y" * 200_000 + b"\r\n\r\n",
        b"POST /v1/completions\xff HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}",
    ],
    ids=lambda data: repr(data[:60]),
)
def test_what_is_no_http_is_refused(server, data):
    answer = talk(server, data, ends=True)
    assert answer == b"" or answer.startswith(b"HTTP/1.1 4"), answer[:300]
    works(server)


@pytest.mark.parametrize("path", STREAMS)
def test_readers_that_go_away_in_the_middle_free_their_blocks(server, path):
    before = server.metrics()
    choose = random.Random(path)
    for _ in range(12):
        with connect(server) as connection:
            connection.request("POST", path, json.dumps(STREAMS[path]), {"content-type": "application/json"})
            response = connection.getresponse()
            assert response.status == 200
            response.read(choose.randint(1, 2000))  # wherever that is: inside an event too
    works(server)
    made = server.metrics()["vllm:generation_tokens_total"] - before["vllm:generation_tokens_total"]
    assert math.isfinite(made)
    assert made < 12 * 400  # they did not run to their end unread


@pytest.mark.parametrize("path", STREAMS)
def test_readers_that_never_read_a_byte_free_their_blocks(server, path):
    url = urlsplit(server.url)
    body = json.dumps(STREAMS[path]).encode()
    sockets = [socket.create_connection((url.hostname, url.port), timeout=SECONDS) for _ in range(6)]
    for connection in sockets:
        connection.sendall(request_head(path, f"Content-Length: {len(body)}") + body)
    time.sleep(0.2)
    for connection in sockets:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # closes with a reset
        connection.close()
    works(server)
