"""What stands before every endpoint: TLS, keys, request ids, limits, CORS, the access log, traces. One server has all of it."""

import http.client
import http.server
import json
import os
import re
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import trustme
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.server.conftest import ADMIN_KEY, Server, start_server

MAX_BODY_BYTES = 4096
MAX_PROMPT_TOKENS = 50
KEYS = {"flag": "key-of-the-flag", "file": "key-of-the-file", "environment": "schlüssel"}
ORIGIN = "https://app.example"
BODY = {"model": "demo", "prompt": "def f(x):", "max_tokens": 3, "temperature": 0}


class Collector(http.server.ThreadingHTTPServer):
    """Keeps the spans that are sent to it by OTLP over HTTP."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.spans = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def endpoint(self):
        return f"http://127.0.0.1:{self.server_port}/v1/traces"

    def wait_for(self, trace_id, seconds=20):
        """The span of a trace, and its attributes as a dict."""
        deadline = time.monotonic() + seconds
        while True:
            for span in self.spans:
                if span.trace_id.hex() == trace_id:
                    values = {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in span.attributes}
                    return span, values
            assert time.monotonic() < deadline, "no such span came"
            time.sleep(0.05)


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        sent = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["content-length"])))
        self.server.spans += [s for r in sent.resource_spans for scope in r.scope_spans for s in scope.spans]
        self.send_response(200)
        self.end_headers()

    def log_message(self, *arguments):
        """Says nothing: the test reads what was sent."""


@dataclass
class Front:
    """The server with its certificate authority and its collector."""

    server: Server
    authority: Path
    collector: Collector

    def get(self, path, key=KEYS["flag"], **headers):
        return self.server.get(path, **({"authorization": f"Bearer {key}"} if key else {}), **headers)

    def post(self, path, body, key=KEYS["flag"], **headers):
        return self.server.post(path, body, authorization=f"Bearer {key}", **headers)

    def connect(self):
        port = int(self.server.url.rpartition(":")[2])
        return http.client.HTTPSConnection("127.0.0.1", port, timeout=30, context=ssl.create_default_context())

    def log_entry(self, request_id):
        """The access log's entry of one request, once it is there."""
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            for line in self.server.log.read_text().splitlines():
                if line.startswith("{") and json.loads(line)["request_id"] == request_id:
                    return json.loads(line)
            time.sleep(0.02)
        raise AssertionError(f"no entry of {request_id}")


@pytest.fixture(scope="module")
def front(tmp_path_factory) -> Iterator[Front]:
    folder = tmp_path_factory.mktemp("front")
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    authority.cert_pem.write_to_path(folder / "authority.pem")
    certificate.private_key_pem.write_to_path(folder / "key.pem")
    certificate.cert_chain_pems[0].write_to_path(folder / "certificate.pem")
    (folder / "keys").write_text(f"# one a line\n\n{KEYS['file']}\n")
    collector = Collector()
    flags = {
        "ssl-certfile": folder / "certificate.pem",
        "ssl-keyfile": folder / "key.pem",
        "api-key": KEYS["flag"],
        "api-key-file": folder / "keys",
        "admin-key": ADMIN_KEY,
        "cors-origin": ORIGIN,
        "root-path": "/models/small",
        "max-body-bytes": MAX_BODY_BYTES,
        "max-prompt-tokens": MAX_PROMPT_TOKENS,
        "access-log": "json",
        "otlp-endpoint": collector.endpoint,
        "sampling": "random",
    }
    env = {"QUIRE_API_KEYS": f"another,{KEYS['environment']}", "OTEL_BSP_SCHEDULE_DELAY": "100"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSL_CERT_FILE", str(folder / "authority.pem"))
        arguments = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
        with start_server(*arguments, env=env) as server:
            yield Front(server, folder / "authority.pem", collector)
    collector.shutdown()
    collector.server_close()


@pytest.mark.parametrize("key", ["", "wrong", ADMIN_KEY, KEYS["flag"][:-1], KEYS["flag"] + "x", "schlussel"])
def test_without_an_api_key_only_what_shows_the_state_is_open(front: Front, key: str):
    for path in ("/", "/health", "/ready", "/metrics", "/version", "/openapi.json"):
        assert front.get(path, key)[0] == 200, path
    for path in ("/v1/models", "/v1/completions", "/tokenize", "/generate", "/info", "/no/such/path"):
        status, body = front.get(path, key)
        assert status == 401, path
        assert json.loads(body)["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize("source", sorted(KEYS))
def test_keys_of_every_source_are_taken(front: Front, source: str):
    # The bytes of a header are UTF-8, which http.client is told in latin-1.
    key = KEYS[source].encode().decode("latin-1")
    assert front.get("/v1/models", key)[0] == 200
    assert front.server.get("/v1/models", authorization=f"bearer {key}")[0] == 200
    assert front.server.get("/v1/models", authorization=f"Basic {key}")[0] == 401


def test_the_admin_key_alone_opens_the_admin_endpoint(front: Front):
    assert front.get("/admin/scheduler", ADMIN_KEY)[0] == 200
    assert front.get("/admin/scheduler", KEYS["flag"])[0] == 401
    assert front.get("/admin/scheduler", "")[0] == 401


def test_a_request_keeps_its_id_in_answer_and_log(front: Front):
    connection = front.connect()
    headers = {"authorization": f"Bearer {KEYS['flag']}", "x-request-id": "from-the-gateway-7"}
    connection.request("POST", "/v1/completions", json.dumps(BODY), {**headers, "content-type": "application/json"})
    answer = connection.getresponse()
    num_bytes = len(answer.read())
    assert answer.headers["x-request-id"] == "from-the-gateway-7"
    entry = front.log_entry("from-the-gateway-7")
    assert (entry["method"], entry["status"], entry["bytes"]) == ("POST", 200, num_bytes)
    assert entry["path"].endswith("/v1/completions")
    assert 0 < entry["seconds"] < 30


@pytest.mark.parametrize("given", ["", "a b", "x" * 129, "line\tbreak"])
def test_an_id_that_could_harm_a_log_is_replaced(front: Front, given: str):
    connection = front.connect()
    connection.request("GET", "/health", headers={"x-request-id": given})
    answer = connection.getresponse()
    answer.read()
    assert re.fullmatch("[0-9a-f]{32}", answer.headers["x-request-id"])


def test_every_line_of_the_access_log_is_json_and_holds_no_key(front: Front):
    assert front.get("/v1/models?api_key=" + KEYS["file"])[0] == 200
    log = front.server.log.read_text()
    entries = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    assert all(
        {"time", "client", "method", "path", "status", "seconds", "bytes", "request_id"} == set(e) for e in entries
    )
    assert len(entries) > 0
    assert not any(key in log for key in (*KEYS.values(), ADMIN_KEY))


def test_a_body_beyond_the_limit_is_refused_whether_declared_or_not(front: Front):
    headers = {"authorization": f"Bearer {KEYS['flag']}", "content-type": "application/json"}
    fitting = json.dumps({**BODY, "user": "x"}).encode()
    fitting += b" " * (MAX_BODY_BYTES - len(fitting))
    for body, status in ((fitting, 200), (fitting + b" ", 413)):
        for content in (body, iter([body[:1000], body[1000:]])):  # with a length, and in chunks
            connection = front.connect()
            connection.request("POST", "/v1/completions", content, headers)
            answer = connection.getresponse()
            found = json.loads(answer.read())
            assert answer.status == status, found
            if status == 413:
                assert found["error"]["code"] == "body_too_large"
                assert str(MAX_BODY_BYTES) in found["error"]["message"]
            connection.close()


def test_a_prompt_beyond_the_limit_is_refused(front: Front):
    assert front.post("/v1/completions", {**BODY, "prompt": [5] * MAX_PROMPT_TOKENS})[0] == 200
    status, body = front.post("/v1/completions", {**BODY, "prompt": [5] * (MAX_PROMPT_TOKENS + 1)})
    assert status == 400
    assert body["error"]["param"] == "prompt"
    assert str(MAX_PROMPT_TOKENS) in body["error"]["message"]


def test_pages_of_the_named_origin_may_call_and_no_others(front: Front):
    def headers_of(method, origin, **headers):
        connection = front.connect()
        connection.request(method, "/v1/completions", headers={"origin": origin, **headers})
        answer = connection.getresponse()
        answer.read()
        return answer.status, answer.headers

    asked = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    status, headers = headers_of("OPTIONS", ORIGIN, **asked)
    assert (status, headers["access-control-allow-origin"]) == (200, ORIGIN)
    assert "authorization" in headers["access-control-allow-headers"]
    assert headers_of("GET", ORIGIN)[1]["access-control-allow-origin"] == ORIGIN  # also on what is refused
    assert headers_of("OPTIONS", "https://evil.example", **asked)[0] == 400
    assert headers_of("GET", "https://evil.example")[1]["access-control-allow-origin"] is None


def test_the_path_before_the_proxy_is_in_the_document_and_not_in_the_labels(front: Front):
    assert json.loads(front.get("/openapi.json")[1])["servers"] == [{"url": "/models/small"}]
    assert front.get("/v1/models")[0] == 200
    assert front.get("/v1/made-up-by-a-client")[0] == 404
    metrics = front.get("/metrics")[1]
    assert re.search(r'http_requests_total\{[^}]*handler="/v1/models"[^}]*\}', metrics), metrics
    assert "made-up-by-a-client" not in metrics


def test_commands_trust_the_authority_they_are_given(front: Front):
    def complete(**env):
        return subprocess.run(
            [sys.executable, "-P", "-m", "quire.server.cli", "complete", "--url", front.server.url]
            + ["-p", BODY["prompt"], "--max-tokens", "3", "--temperature", "0"],
            capture_output=True,
            text=True,
            timeout=60,
            env={**os.environ, "QUIRE_API_KEYS": KEYS["file"], **env},
        )

    text = front.post("/v1/completions", BODY)[1]["choices"][0]["text"]
    assert complete().stdout == f"{BODY['prompt']}{text}\n"
    distrustful = complete(SSL_CERT_FILE="/dev/null")
    assert distrustful.returncode == 2
    assert "certificate" in distrustful.stderr
    assert "Traceback" not in distrustful.stderr
    assert "key" in complete(QUIRE_API_KEYS="wrong").stderr


def test_a_request_is_one_span_below_the_callers(front: Front):
    trace_id, parent_id = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    begin = time.time()
    status, body = front.post("/v1/completions", BODY, traceparent=f"00-{trace_id}-{parent_id}-01")
    assert status == 200
    span, attributes = front.collector.wait_for(trace_id)
    assert (span.name, span.parent_span_id.hex()) == ("llm_request", parent_id)
    assert begin - 0.1 <= span.start_time_unix_nano / 1e9 <= span.end_time_unix_nano / 1e9 <= time.time() + 0.1
    assert attributes["gen_ai.usage.prompt_tokens"] == body["usage"]["prompt_tokens"]
    assert attributes["gen_ai.usage.completion_tokens"] == body["usage"]["completion_tokens"] == 3
    assert attributes["gen_ai.response.finish_reason"] == "length"
    waited, first, whole = (
        attributes[f"gen_ai.latency.{name}"] for name in ("time_in_queue", "time_to_first_token", "e2e")
    )
    assert 0 <= waited <= first <= whole
