"""The server's half of the engine: starts its process, hands requests over, turns tokens into text, notices its death."""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from quire.engine.input_processor import InputProcessor, ProcessedRequest, Prompt
from quire.engine.metrics import EngineStats
from quire.engine.output_processor import OutputProcessor
from quire.engine.sampling_params import SamplingParams
from quire.engine.tokenizer import Tokenizer
from quire.kernels.errors import (
    EngineDeadError,
    InvalidConfigError,
    InvalidRequestError,
    NotServingError,
    QueueFullError,
    QuireError,
)
from quire.kernels.sampling.rows import SamplingMode
from quire.server.engine_state import EngineObserver, EngineState, SchedulerSettings
from quire.server.messages import (
    HEADER,
    Abort,
    Configure,
    Configured,
    EngineInfo,
    Failed,
    FromEngine,
    Outputs,
    Progress,
    Ready,
    Rejected,
    Start,
    Stop,
    Submit,
    ToEngine,
    TokenOutput,
    decode_from_engine,
    error_of,
    frame,
    stats_of,
)
from quire.server.metrics import FinishedRequest
from quire.server.output_stream import OutputStream
from quire.server.settings import ServerSettings

logger = logging.getLogger(__name__)

STOP_SECONDS = 5.0
# Text shorter than this is tokenized on the spot: another thread would cost more than it saves.
INLINE_PROMPT_CHARS = 2000
MAX_RETRY_SECONDS = 60

TRACEPARENT: ContextVar[str | None] = ContextVar("quire_traceparent", default=None)
"""The W3C traceparent header of the HTTP request that is being answered."""


@dataclass
class _Tracked:
    """A request that is with the engine, and when what happened to it. Times in seconds of time.monotonic."""

    request: ProcessedRequest
    stream: OutputStream
    traceparent: str | None
    last_token_times: dict[str, float]
    num_tokens: int = 0
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finish_reason: str | None = None


class EngineClient:
    """Owns the engine process and every open request. Lives on one event loop; only `prepare` uses other threads."""

    def __init__(
        self,
        arguments: dict[str, Any],
        settings: ServerSettings,
        tokenizer: Tokenizer | None,
        observer: EngineObserver,
        *,
        record_trace: Callable[[FinishedRequest, str | None], None] | None = None,
        log_level: str = "WARNING",
    ) -> None:
        """`arguments` are the engine's settings as `LLM` takes them."""
        self.tokenizer = tokenizer
        self.info: EngineInfo | None = None
        self.stats: EngineStats | None = None
        self.state = EngineState.STARTING
        self.progress = Progress()
        self.failure: QuireError | None = None
        self.scheduler_settings: SchedulerSettings | None = None
        self.num_queued_requests = 0
        self.num_queued_tokens = 0
        self.ended = asyncio.Event()
        self.is_draining = False
        self._arguments = arguments
        self._settings = settings
        self._observer = observer
        self._record_trace = record_trace
        self._log_level = log_level
        self._restarts_left = settings.engine_restarts
        self._queue_limits = (settings.max_queued_requests, settings.max_queued_tokens)
        self._inputs: InputProcessor | None = None
        self._outputs = OutputProcessor(tokenizer)
        self._requests: dict[str, _Tracked] = {}
        self._by_core_id: dict[str, _Tracked] = {}
        self._numbers = itertools.count()
        self._answers: dict[int, asyncio.Future[Configured]] = {}
        self._first_token_times: deque[float] = deque(maxlen=64)
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="prepare")
        self._process: subprocess.Popen[bytes] | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._task: asyncio.Task[None] | None = None
        self._is_stopping = False

    # ---- the process

    async def start(self) -> None:
        """Starts the engine process; returns at once, while it loads and compiles."""
        self._task = asyncio.create_task(self._supervise(), name="engine")

    async def stop(self) -> None:
        """Ends the process, with whatever it does. Never leaves one behind."""
        self._is_stopping = True
        if self._process is not None:
            self._send(Stop())
            await asyncio.get_running_loop().run_in_executor(None, _end, self._process)
        if self._task is not None:
            await self._task
        self._threads.shutdown(wait=False, cancel_futures=True)

    @property
    def process_id(self) -> int | None:
        """The engine's process, None while there is none."""
        return None if self._process is None else self._process.pid

    async def _supervise(self) -> None:
        """Runs the engine until it ends, and again while restarts are left; `ended` is set after the last time."""
        while True:
            failure = await self._run()
            if self._is_stopping:
                break
            was_ready = self.state is EngineState.READY
            self._die(failure)
            if not self._restarts_left or not was_ready:
                break
            self._restarts_left -= 1
            logger.error("starting the engine again; %d restarts are left after this one", self._restarts_left)
            self.state, self.progress = EngineState.STARTING, Progress()
        self.ended.set()

    async def _run(self) -> QuireError:
        """One life of the engine process; why it ended."""
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-P", "-m", "quire.server.engine_process", str(theirs.fileno()), self._log_level]
        self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        theirs.close()
        reader, self._writer = await asyncio.open_connection(sock=ours)
        self._send(Start(self._arguments))
        failure: QuireError | None = None
        try:
            while True:
                header = await reader.readexactly(HEADER.size)
                message = decode_from_engine(await reader.readexactly(*HEADER.unpack(header)))
                if isinstance(message, Failed):
                    failure = error_of(message.error, message.message)
                self._handle(message)
        except (asyncio.IncompleteReadError, ConnectionError):
            status = await asyncio.get_running_loop().run_in_executor(None, _end, self._process)
            self._writer.close()
        return failure or EngineDeadError(f"the engine process ended unexpectedly, {_describe_status(status)}")

    def _die(self, failure: QuireError) -> None:
        """Every open request fails; nothing is left of them."""
        self.state, self.failure = EngineState.DEAD, failure
        logger.error("the engine died: %s", failure)
        for tracked in list(self._requests.values()):
            self._finish(tracked, "error")
            tracked.stream.fail(EngineDeadError(f"the engine died while the request ran: {failure}"))
        self._outputs = OutputProcessor(self.tokenizer)
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(EngineDeadError(str(failure)))
        self._answers.clear()

    def _send(self, message: ToEngine) -> None:
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(frame(message))

    # ---- requests in

    def check_serving(self) -> None:
        """Raises NotServingError while the engine starts or the server drains, EngineDeadError once it is dead."""
        if self.is_draining:
            raise NotServingError("the server is about to stop and takes no more requests; send this one to another")
        self.check_alive()

    def check_alive(self) -> None:
        """Raises NotServingError while the engine starts, EngineDeadError once it is dead."""
        if self.state is EngineState.DEAD:
            raise EngineDeadError(f"the engine is dead: {self.failure}")
        if self.state is EngineState.STARTING:
            progress = self.progress
            so_far = f" ({progress.phase} {progress.done} of {progress.total})" if progress.total else ""
            raise NotServingError(f"the server is starting{so_far}; /ready tells when it is done")

    async def prepare(
        self, prompt: Prompt, params: SamplingParams, *, priority: int = 0, cache_salt: str | None = None
    ) -> ProcessedRequest:
        """Tokenizes a prompt and checks the whole request; nothing is queued yet.

        Raises InvalidRequestError naming the parameter, NotServingError or EngineDeadError.
        """
        self.check_serving()
        assert self._inputs is not None
        if priority and self.scheduler_settings is not None and self.scheduler_settings.scheduling_policy != "priority":
            raise InvalidRequestError(
                "priority is of no effect in order of arrival; the server must run with --scheduling-policy priority",
                parameter="priority",
            )
        request_id = f"r{next(self._numbers)}"
        inputs = self._inputs

        def process() -> ProcessedRequest:
            return inputs.process(request_id, prompt, params, priority=priority, cache_salt=cache_salt)

        text = prompt.get("prompt") if isinstance(prompt, dict) else prompt
        if isinstance(text, str) and len(text) < INLINE_PROMPT_CHARS:
            request = process()
        else:
            request = await asyncio.get_running_loop().run_in_executor(self._threads, process)
        most, count = self._settings.max_prompt_tokens, len(request.prompt_token_ids)
        if most and count > most:
            raise InvalidRequestError(
                f"the prompt has {count} tokens, and this server takes at most {most}; shorten it", parameter="prompt"
            )
        return request

    def open(self, *requests: ProcessedRequest) -> OutputStream:
        """Hands prepared requests to the engine, all or none.

        Raises QueueFullError, NotServingError or EngineDeadError; InvalidRequestError for more than the queue could ever hold.
        """
        self.check_serving()
        self._check_queue(requests)
        stream = OutputStream(requests, self._abort, self._settings.request_timeout or None)
        traceparent = TRACEPARENT.get()
        for request in requests:
            self._outputs.add(request)
            tracked = _Tracked(request, stream, traceparent, {})
            self._requests[request.request_id] = tracked
            self._count_queued(tracked, 1)
            for choice in request.choices:
                self._by_core_id[choice.request_id] = tracked
                self._send(Submit.of(choice))
        return stream

    @property
    def num_open_requests(self) -> int:
        """Requests whose last output has not come."""
        return len(self._requests)

    def _check_queue(self, requests: tuple[ProcessedRequest, ...]) -> None:
        num_new = sum(len(request.choices) for request in requests)
        new_tokens = sum(len(request.prompt_token_ids) for request in requests)
        for what, new, queued, limit in (
            ("requests", num_new, self.num_queued_requests, self._queue_limits[0]),
            ("prompt tokens", new_tokens, self.num_queued_tokens, self._queue_limits[1]),
        ):
            if limit and new > limit:
                raise InvalidRequestError(
                    f"{new} {what} at once are more than the queue holds, {limit}; send them in parts",
                    parameter="prompt",
                )
            if limit and queued + new > limit:
                raise QueueFullError(
                    f"the queue is full: {queued} {what} wait and {limit} may; try again later",
                    retry_after=self._retry_after(),
                )

    def _retry_after(self) -> int:
        """Seconds in which the queue will have emptied at the rate at which requests lately came to their first token."""
        times = self._first_token_times
        if len(times) < 2:
            return 1
        seconds = self.num_queued_requests * (time.monotonic() - times[0]) / len(times)
        return min(max(math.ceil(seconds), 1), MAX_RETRY_SECONDS)

    def _count_queued(self, tracked: _Tracked, sign: int) -> None:
        self.num_queued_requests += sign * len(tracked.request.choices)
        self.num_queued_tokens += sign * len(tracked.request.prompt_token_ids)

    def _abort(self, stream: OutputStream, reason: str) -> None:
        for request_id in stream.open_ids:
            tracked = self._requests.get(request_id)
            if tracked is not None:
                _, core_ids = self._outputs.abort(request_id)
                self._send(Abort(core_ids))
                self._finish(tracked, reason)

    def fail_all(self, error: Exception) -> None:
        """Ends every open request with `error`, as a server does that has drained for long enough."""
        for stream in {id(tracked.stream): tracked.stream for tracked in self._requests.values()}.values():
            self._abort(stream, "abort")
            stream.fail(error)

    # ---- messages from the engine

    def _handle(self, message: FromEngine) -> None:
        if isinstance(message, Outputs):
            self._take_outputs(message)
        elif isinstance(message, Progress):
            self.progress = message
            self._observer.update_progress(message)
        elif isinstance(message, Ready):
            self._become_ready(message)
        elif isinstance(message, Rejected):
            self._take_rejection(message)
        elif isinstance(message, Configured):
            answer = self._answers.pop(message.number, None)
            if answer is not None and not answer.done():
                answer.set_result(message)

    def _become_ready(self, message: Ready) -> None:
        info = self.info = message.info
        self._inputs = InputProcessor(
            self.tokenizer,
            vocab_size=info.vocab_size,
            max_model_len=info.max_model_len,
            eos_token_ids=info.eos_token_ids,
            seed=int(self._arguments.get("seed", 0)),
            most_sampling=SamplingMode[info.sampling.upper()],
        )
        self._take_settings(message.settings)
        self.stats = stats_of(message.stats)
        self.progress = Progress("ready", info.num_programs, info.num_programs, "")
        self.state, self.failure = EngineState.READY, None
        self._observer.set_info(info)
        self._observer.update_progress(self.progress)
        self._observer.update_stats(self.stats)

    def _take_outputs(self, message: Outputs) -> None:
        if message.stats is not None:
            self.stats = stats_of(message.stats)
            self._observer.update_stats(self.stats)
        if message.num_step_tokens:
            self._observer.observe_step(message.num_step_tokens)
        now = time.monotonic()
        core_outputs = []
        for wire in message.outputs:
            tracked = self._by_core_id.get(wire.request_id)
            if tracked is not None:  # else it was ended while its next token was on its way
                self._note_times(tracked, wire, now)
                core_outputs.append(wire.output())
        outputs, finished_core_ids = self._outputs.process(core_outputs)
        if finished_core_ids:
            self._send(Abort(finished_core_ids, has_finished=True))
        for output in outputs:
            tracked = self._requests[output.request_id]
            tracked.num_tokens = sum(len(choice.token_ids) for choice in output.outputs) + (
                tracked.num_tokens if tracked.request.params.output_kind.name == "DELTA" else 0
            )
            if output.finished:
                self._finish(tracked, str(output.outputs[-1].finish_reason))
            tracked.stream.put(output)

    def _note_times(self, tracked: _Tracked, wire: TokenOutput, now: float) -> None:
        tracked.num_preemptions = max(tracked.num_preemptions, wire.num_preemptions)
        tracked.num_cached_tokens = max(tracked.num_cached_tokens, wire.num_cached_tokens)
        tracked.first_scheduled_time = tracked.first_scheduled_time or wire.first_scheduled_time
        if not wire.new_token_ids:
            return
        last = tracked.last_token_times.get(wire.request_id)
        tracked.last_token_times[wire.request_id] = now
        if last is not None:
            self._observer.observe_inter_token(now - last)
        if tracked.first_token_time is None:
            tracked.first_token_time = now
            self._first_token_times.append(now)
            self._count_queued(tracked, -1)
            self._observer.observe_first_token(now - tracked.request.arrival_time)

    def _take_rejection(self, message: Rejected) -> None:
        tracked = self._by_core_id.get(message.request_id)
        if tracked is not None:
            error = error_of(message.error, message.message, message.parameter)
            stream = tracked.stream
            self._abort(stream, "error")
            stream.fail(error)

    def _finish(self, tracked: _Tracked, reason: str) -> None:
        """Forgets a request and reports it."""
        request = tracked.request
        del self._requests[request.request_id]
        for choice in request.choices:
            self._by_core_id.pop(choice.request_id, None)
        if tracked.first_token_time is None:
            self._count_queued(tracked, -1)
        finished = FinishedRequest(
            request_id=request.request_id,
            finish_reason=reason,
            num_prompt_tokens=len(request.prompt_token_ids),
            num_cached_tokens=tracked.num_cached_tokens,
            num_generation_tokens=tracked.num_tokens,
            n=request.params.n,
            max_tokens=request.params.max_tokens,
            arrival_time=request.arrival_time,
            first_scheduled_time=tracked.first_scheduled_time,
            first_token_time=tracked.first_token_time,
            finished_time=time.monotonic(),
            num_preemptions=tracked.num_preemptions,
        )
        self._observer.observe_finished(finished)
        if self._record_trace is not None:
            self._record_trace(finished, tracked.traceparent)

    # ---- settings

    async def configure(self, changes: dict[str, Any]) -> SchedulerSettings:
        """Changes scheduler settings, all or none; what holds now. Raises InvalidConfigError naming the setting."""
        self.check_alive()
        limits = {name: changes[name] for name in ("max_queued_requests", "max_queued_tokens") if name in changes}
        for name, value in limits.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise InvalidConfigError(f"{name} must be a whole number of at least 0, not {value!r}")
        number = next(self._numbers)
        answer: asyncio.Future[Configured] = asyncio.get_running_loop().create_future()
        self._answers[number] = answer
        self._send(Configure(number, {name: value for name, value in changes.items() if name not in limits}))
        configured = await answer
        if configured.message is not None:
            raise InvalidConfigError(configured.message)
        self._queue_limits = (
            limits.get("max_queued_requests", self._queue_limits[0]),
            limits.get("max_queued_tokens", self._queue_limits[1]),
        )
        return self._take_settings(configured.settings)

    def _take_settings(self, engine_settings: dict[str, Any]) -> SchedulerSettings:
        requests, tokens = self._queue_limits
        self.scheduler_settings = SchedulerSettings(
            **engine_settings, max_queued_requests=requests, max_queued_tokens=tokens
        )
        return self.scheduler_settings


def _end(process: subprocess.Popen[bytes]) -> int:
    """Waits a little for a process to end, then kills it; its status."""
    try:
        return process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def _describe_status(status: int) -> str:
    return f"killed by signal {-status}" if status < 0 else f"with status {status}"
