"""What the server exports to Prometheus, under the names that dashboards and gateways already know.

Counters and gauges of the engine come from its newest reading; histograms are filled as requests go by. Speculative decoding is not
there yet, so its counters are left out: a zero would claim that it was tried.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from quire.engine.metrics import EngineStats
from quire.server.messages import EngineInfo, Progress

LABELS = ("model_name", "engine")
FINISH_REASONS = ("stop", "length", "abort", "error", "timeout")

_FIRST_TOKEN = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    1.5,
    2,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
    160,
    640,
)
_PER_TOKEN = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.4,
    0.5,
    0.75,
    1,
    2.5,
    5,
    10,
    40,
    80,
)
_REQUEST = (0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920)
_TOKENS = tuple(digit * 10**power for power in range(6) for digit in (1, 2, 5))
_STEP = tuple(2**power for power in range(15))
_CHOICES = (1, 2, 5, 10, 20)


@dataclass(frozen=True)
class FinishedRequest:
    """A request that has ended, and when what happened to it. Times in seconds of time.monotonic, None for what never was.

    `finish_reason` is stop, length, abort, error or timeout; the counts are over all `n` choices.
    """

    request_id: str
    finish_reason: str
    num_prompt_tokens: int
    num_cached_tokens: int
    num_generation_tokens: int
    n: int
    max_tokens: int | None
    arrival_time: float
    first_scheduled_time: float | None
    first_token_time: float | None
    finished_time: float
    num_preemptions: int


class ServerMetrics:
    """Owns the registry of one server. Every method is quick and called on the event loop."""

    def __init__(self, prefix: str, model_name: str) -> None:
        """`prefix` stands before every name, with a colon."""
        self._prefix = prefix
        self._values = (model_name, "0")
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a sample per series that no dashboard reads
        self.registry = CollectorRegistry()
        self._engine = _EngineCollector(prefix, self._values)
        self.registry.register(self._engine)
        histogram = self._histogram
        self._first_token = histogram("time_to_first_token_seconds", "Arrival to first token.", _FIRST_TOKEN)
        self._inter_token = histogram(
            "inter_token_latency_seconds", "From one output of a choice to the next.", _PER_TOKEN
        )
        self._per_token = histogram(
            "request_time_per_output_token_seconds", "Mean time per token after the first, by request.", _PER_TOKEN
        )
        self._e2e = histogram("e2e_request_latency_seconds", "Arrival to last token.", _REQUEST)
        self._queue = histogram("request_queue_time_seconds", "Arrival to the first step.", _REQUEST)
        self._inference = histogram("request_inference_time_seconds", "First step to last token.", _REQUEST)
        self._prefill = histogram("request_prefill_time_seconds", "First step to first token.", _REQUEST)
        self._decode = histogram("request_decode_time_seconds", "First token to last token.", _REQUEST)
        self._prompt_tokens = histogram("request_prompt_tokens", "Prompt tokens of a request.", _TOKENS)
        self._generation_tokens = histogram("request_generation_tokens", "Tokens generated for a request.", _TOKENS)
        self._n = histogram("request_params_n", "Choices asked for.", _CHOICES)
        self._max_tokens = histogram("request_params_max_tokens", "max_tokens asked for.", _TOKENS)
        self._step = histogram("iteration_tokens", "Tokens computed by a step.", _STEP, suffix="_total")
        self._finished = Counter(
            f"{prefix}:request_success",
            "Requests that ended, by reason.",
            (*LABELS, "finished_reason"),
            registry=self.registry,
        )
        for reason in FINISH_REASONS:
            self._finished.labels(*self._values, reason)
        self._http = Counter(
            f"{prefix}:http_requests",
            "HTTP requests answered.",
            (*LABELS, "method", "route", "status"),
            registry=self.registry,
        )
        self._http_seconds = Histogram(
            f"{prefix}:http_request_seconds",
            "Seconds from an HTTP request to the end of its answer.",
            (*LABELS, "route"),
            buckets=_REQUEST,
            registry=self.registry,
        )
        self._changes = Counter(
            f"{prefix}:scheduler_setting_changes",
            "Scheduler settings changed while serving.",
            (*LABELS, "setting"),
            registry=self.registry,
        )
        self._cache_info = Gauge(
            f"{prefix}:cache_config_info",
            "The KV cache's layout.",
            (*LABELS, "block_size", "num_gpu_blocks"),
            registry=self.registry,
        )

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], suffix: str = "") -> Histogram:
        metric = Histogram(f"{self._prefix}:{name}{suffix}", text, LABELS, buckets=buckets, registry=self.registry)
        return metric.labels(*self._values)

    def set_info(self, info: EngineInfo) -> None:
        """The engine is ready."""
        self._cache_info.labels(*self._values, str(info.block_size), str(info.num_kv_blocks)).set(1)

    def update_progress(self, progress: Progress) -> None:
        """Start-up has come further; only compiling counts, since it is what takes long."""
        if progress.phase == "ready":
            self._engine.progress = 1.0
        elif progress.phase == "compile" and progress.total:
            self._engine.progress = progress.done / progress.total
        else:
            self._engine.progress = 0.0

    def set_engine_up(self, is_up: bool) -> None:
        """Whether there is an engine that has not died."""
        self._engine.is_up = is_up

    def update_stats(self, stats: EngineStats) -> None:
        """The engine's newest reading."""
        self._engine.stats = stats

    def observe_first_token(self, seconds: float) -> None:
        """A request's first token came, `seconds` after it arrived."""
        self._first_token.observe(seconds)

    def observe_inter_token(self, seconds: float) -> None:
        """A choice had an output `seconds` after its last one."""
        self._inter_token.observe(seconds)

    def observe_step(self, num_tokens: int) -> None:
        """A step computed so many tokens."""
        self._step.observe(num_tokens)

    def observe_finished(self, request: FinishedRequest) -> None:
        """A request ended, in whatever way."""
        self._finished.labels(*self._values, request.finish_reason).inc()
        self._prompt_tokens.observe(request.num_prompt_tokens)
        self._generation_tokens.observe(request.num_generation_tokens)
        self._n.observe(request.n)
        if request.max_tokens is not None:
            self._max_tokens.observe(request.max_tokens)
        end = request.finished_time
        self._e2e.observe(end - request.arrival_time)
        if request.first_scheduled_time is None:
            return
        self._queue.observe(max(request.first_scheduled_time - request.arrival_time, 0.0))
        self._inference.observe(end - request.first_scheduled_time)
        if request.first_token_time is None:
            return
        self._prefill.observe(max(request.first_token_time - request.first_scheduled_time, 0.0))
        self._decode.observe(end - request.first_token_time)
        if request.num_generation_tokens > request.n:
            per_choice = request.num_generation_tokens / request.n
            self._per_token.observe((end - request.first_token_time) / (per_choice - 1))

    def count_http(self, method: str, route: str, status: int, seconds: float) -> None:
        """An HTTP request was answered; `route` is the template of its path, so that labels stay few."""
        self._http.labels(*self._values, method, route, str(status)).inc()
        self._http_seconds.labels(*self._values, route).observe(seconds)

    def count_change(self, setting: str) -> None:
        """A scheduler setting was changed while serving."""
        self._changes.labels(*self._values, setting).inc()

    def render(self) -> tuple[bytes, str]:
        """Everything in Prometheus' text format, and its content type."""
        return generate_latest(self.registry), CONTENT_TYPE_LATEST


# Metric, attribute of EngineStats, what it is.
_GAUGES = (
    ("num_requests_running", "num_requests_running", "Requests that run."),
    ("num_requests_waiting", "num_requests_waiting", "Requests that wait to run."),
    ("kv_cache_usage_perc", "kv_cache_usage", "Share of the KV cache's blocks in use, 0 to 1."),
    ("spec_decode_num_speculative_tokens", "num_speculative_tokens", "Tokens drafted for each row of the last step."),
)
_COUNTERS = (
    ("prompt_tokens", "num_prompt_tokens", "Prompt tokens of requests let in."),
    ("prompt_tokens_cached", "num_prefix_hits", "Prompt tokens found in the prefix cache."),
    ("generation_tokens", "num_generation_tokens", "Tokens generated."),
    ("num_preemptions", "num_preemptions", "Requests whose blocks were taken away."),
    ("prefix_cache_queries", "num_prefix_queries", "Tokens looked up in the prefix cache."),
    ("prefix_cache_hits", "num_prefix_hits", "Tokens found in the prefix cache."),
    ("spec_decode_num_drafts", "num_draft_rounds", "Times that drafts of a request were verified."),
    ("spec_decode_num_draft_tokens", "num_draft_tokens", "Tokens drafted."),
    ("spec_decode_num_accepted_tokens", "num_accepted_tokens", "Drafted tokens that the model would have sampled too."),
    ("padding_tokens", "num_padding_tokens", "Tokens computed in vain to fill a shape."),
    ("device_idle_seconds", "idle_seconds", "Seconds in which the device had nothing to do."),
    ("compile_seconds", "compile_seconds", "Seconds spent compiling."),
    ("recompilations_after_warmup", "num_recompilations", "Programs compiled while serving; each is a defect."),
)


class _EngineCollector(Collector):
    """Makes samples of the engine's newest reading when asked."""

    def __init__(self, prefix: str, values: tuple[str, str]) -> None:
        self._prefix = prefix
        self._values = values
        self.stats: EngineStats | None = None
        self.progress = 0.0
        self.is_up = True

    def collect(self) -> Iterable[Metric]:
        """The gauges and counters, zero before the first reading."""
        stats = self.stats
        for name, field, text in _GAUGES:
            yield self._gauge(name, text, 0 if stats is None else getattr(stats, field))
        yield self._gauge("warmup_progress", "Share of the shapes that are compiled.", self.progress)
        yield self._gauge("engine_up", "1 unless the engine has died.", float(self.is_up))
        lora = GaugeMetricFamily(
            f"{self._prefix}:lora_requests_info",
            "LoRA adapters in use: none, they are not supported.",
            labels=(*LABELS, "max_lora", "running_lora_adapters", "waiting_lora_adapters"),
        )
        lora.add_metric((*self._values, "0", "", ""), 1)
        yield lora
        for name, field, text in _COUNTERS:
            yield self._counter(name, text, (), ((), 0 if stats is None else getattr(stats, field)))
        accepted = () if stats is None else stats.num_accepted_per_pos
        yield self._counter(
            "spec_decode_num_accepted_tokens_per_pos",
            "Drafts accepted at each position.",
            ("position",),
            *(((str(position),), count) for position, count in enumerate(accepted)),
        )
        warm_up, serving = (0, 0) if stats is None else (stats.num_compilations, stats.num_recompilations)
        yield self._counter(
            "compilations", "Programs compiled.", ("phase",), (("warmup",), warm_up), (("serving",), serving)
        )

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(f"{self._prefix}:{name}", text, labels=LABELS)
        family.add_metric(self._values, value)
        return family

    def _counter(
        self, name: str, text: str, labels: tuple[str, ...], *samples: tuple[tuple[str, ...], float]
    ) -> Metric:
        family = CounterMetricFamily(f"{self._prefix}:{name}", text, labels=(*LABELS, *labels))
        for values, value in samples:
            family.add_metric((*self._values, *values), value)
        return family
