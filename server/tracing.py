"""OpenTelemetry traces of requests, where its packages are installed (extra `otel`) and a collector is named."""

from __future__ import annotations

import importlib.util
import time
from typing import Any

from quire.kernels.errors import InvalidConfigError
from quire.server.metrics import FinishedRequest

SPAN_NAME = "llm_request"


class Tracer:
    """Makes one span of each request once it has ended; the times in it are the engine's own."""

    def __init__(self, provider: Any) -> None:
        """`provider` is an opentelemetry.sdk.trace.TracerProvider, owned from here on."""
        self._provider = provider
        self._tracer = provider.get_tracer("quire")

    def record(self, request: FinishedRequest, traceparent: str | None) -> None:
        """Makes the span, below the one that the W3C header `traceparent` names."""
        from opentelemetry.trace import SpanKind, Status, StatusCode
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        # Requests carry time.monotonic; spans want the epoch, in nanoseconds.
        offset = time.time() - time.monotonic()
        context = TraceContextTextMapPropagator().extract({} if traceparent is None else {"traceparent": traceparent})
        span = self._tracer.start_span(
            SPAN_NAME, context, SpanKind.SERVER, start_time=int((request.arrival_time + offset) * 1e9)
        )
        span.set_attributes(_attributes(request))
        if request.finish_reason in ("error", "timeout"):
            span.set_status(Status(StatusCode.ERROR, request.finish_reason))
        span.end(int((request.finished_time + offset) * 1e9))

    def close(self) -> None:
        """Sends what is still to be sent."""
        self._provider.shutdown()


def make_tracer(endpoint: str | None) -> Tracer | None:
    """A tracer that sends to `endpoint` by OTLP over HTTP, None where none is named.

    Raises InvalidConfigError where the packages are missing.
    """
    if endpoint is None:
        return None
    if importlib.util.find_spec("opentelemetry") is None or importlib.util.find_spec("opentelemetry.sdk") is None:
        raise InvalidConfigError("otlp_endpoint needs OpenTelemetry's packages: pip install 'quire[otel]'")
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider(resource=Resource.create({"service.name": "quire"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    return Tracer(provider)


def _attributes(request: FinishedRequest) -> dict[str, str | int | float]:
    """Names of the semantic conventions for generative models, and those that vLLM's dashboards know."""
    found: dict[str, str | int | float] = {
        "gen_ai.request.id": request.request_id,
        "gen_ai.request.n": request.n,
        "gen_ai.response.finish_reason": request.finish_reason,
        "gen_ai.usage.prompt_tokens": request.num_prompt_tokens,
        "gen_ai.usage.completion_tokens": request.num_generation_tokens,
        "gen_ai.latency.e2e": request.finished_time - request.arrival_time,
        "quire.usage.cached_tokens": request.num_cached_tokens,
        "quire.num_preemptions": request.num_preemptions,
    }
    if request.max_tokens is not None:
        found["gen_ai.request.max_tokens"] = request.max_tokens
    if request.first_scheduled_time is not None:
        found["gen_ai.latency.time_in_queue"] = request.first_scheduled_time - request.arrival_time
    if request.first_token_time is not None:
        found["gen_ai.latency.time_to_first_token"] = request.first_token_time - request.arrival_time
    return found
