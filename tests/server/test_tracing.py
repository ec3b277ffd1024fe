"""Traces: one span per request, with the engine's own times, below the caller's span."""

from __future__ import annotations

import signal
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from quire.kernels.errors import InvalidConfigError
from quire.server import tracing
from quire.server.metrics import FinishedRequest
from quire.server.tracing import Tracer, make_tracer
from tests.server.conftest import start_server

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def tracer(exporter: InMemorySpanExporter) -> Tracer:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return Tracer(provider)


def finished() -> FinishedRequest:
    now = time.monotonic()
    return FinishedRequest("r1", "stop", 10, 4, 20, 1, 32, now - 2.0, now - 1.5, now - 1.0, now, 0)


def test_span_has_the_requests_times_and_counts(tracer: Tracer, exporter: InMemorySpanExporter) -> None:
    tracer.record(finished(), PARENT)
    (span,) = exporter.get_finished_spans()
    assert (span.end_time - span.start_time) / 1e9 == pytest.approx(2.0, abs=0.01)
    assert abs(span.end_time / 1e9 - time.time()) < 5
    assert f"{span.context.trace_id:032x}" == PARENT.split("-")[1]
    assert f"{span.parent.span_id:016x}" == PARENT.split("-")[2]
    assert span.attributes["gen_ai.usage.prompt_tokens"] == 10
    assert span.attributes["gen_ai.usage.completion_tokens"] == 20
    assert span.attributes["gen_ai.latency.time_in_queue"] == pytest.approx(0.5, abs=0.01)
    assert span.attributes["gen_ai.latency.time_to_first_token"] == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("parent", [None, "", "nonsense", "00-0-0-0"])
def test_span_is_its_own_root_without_a_parent(
    tracer: Tracer, exporter: InMemorySpanExporter, parent: str | None
) -> None:
    tracer.record(finished(), parent)
    (span,) = exporter.get_finished_spans()
    assert span.parent is None


def test_request_that_never_ran_is_an_error_without_times(tracer: Tracer, exporter: InMemorySpanExporter) -> None:
    tracer.record(replace(finished(), finish_reason="error", first_scheduled_time=None, first_token_time=None), None)
    (span,) = exporter.get_finished_spans()
    assert span.status.status_code is StatusCode.ERROR
    assert "gen_ai.latency.time_to_first_token" not in span.attributes


def test_no_collector_no_tracer_and_no_packages_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert make_tracer(None) is None
    monkeypatch.setattr(tracing.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(InvalidConfigError, match="otel"):
        make_tracer("http://127.0.0.1:4318/v1/traces")


def test_server_sends_the_spans_of_its_requests_before_it_ends() -> None:
    received: list[bytes] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Collector) as collector:
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        with start_server("--otlp-endpoint", f"http://127.0.0.1:{collector.server_port}/v1/traces") as server:
            assert server.post("/v1/completions", {"prompt": "x", "max_tokens": 2}, traceparent=PARENT)[0] == 200
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(timeout=30) == 0
        collector.shutdown()
    sent = b"".join(received)
    assert bytes.fromhex(PARENT.split("-")[1]) in sent
    assert b"llm_request" in sent
