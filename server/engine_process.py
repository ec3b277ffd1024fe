"""The engine's own process: EngineCore in a loop, fed through a socket that it inherits.

    python -P -m quire.server.engine_process FD

Three threads: the main one steps the engine and does nothing else that could wait; one reads messages into a queue; one encodes
and writes what came of the steps. The end of the socket is the server's death, and this process ends with it at once, whatever it
is doing, so that no orphan keeps a device.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import logging
import os
import queue
import signal
import socket
import sys
import threading
import time
from typing import Any

from quire.engine.config import EngineConfig
from quire.engine.core import EngineCore
from quire.kernels.errors import InvalidConfigError, InvalidRequestError, OutOfBlocksError, QuireError
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
    decode_to_engine,
    frame,
)

logger = logging.getLogger(__name__)

STATS_SECONDS = 0.1
# How long to sleep when requests wait for a batching window to pass and nothing runs.
WINDOW_SECONDS = 0.001
PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Channel:
    """The engine's end of the socket. Owns the reading and the writing thread; `inbox` has the messages in order."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self.inbox: queue.SimpleQueue[ToEngine] = queue.SimpleQueue()
        self._outbox: queue.SimpleQueue[FromEngine | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, name="read", daemon=True).start()
        self._writer = threading.Thread(target=self._write, name="write", daemon=True)
        self._writer.start()

    def send(self, message: FromEngine) -> None:
        """Queues a message; never waits."""
        self._outbox.put(message)

    def close(self) -> None:
        """Writes what is queued, then ends."""
        self._outbox.put(None)
        self._writer.join(timeout=5.0)

    def _read(self) -> None:
        stream = self._connection.makefile("rb")
        try:
            while len(header := stream.read(HEADER.size)) == HEADER.size:
                self.inbox.put(decode_to_engine(stream.read(*HEADER.unpack(header))))
        except OSError as error:
            logger.info("the server's connection failed: %s", error)
        _exit_now()

    def _write(self) -> None:
        while (message := self._outbox.get()) is not None:
            try:
                self._connection.sendall(frame(message))
            except OSError as error:
                logger.info("the server's connection failed: %s", error)
                _exit_now()


def _exit_now() -> None:
    """Ends the process without waiting for the device or for other threads."""
    os._exit(0)


class EngineLoop:
    """Takes messages in and steps the engine while it has work."""

    def __init__(self, core: EngineCore, channel: Channel) -> None:
        self._core = core
        self._channel = channel
        self._num_tokens_seen = 0
        self._stats_due = 0.0

    def run(self) -> None:
        """Serves until Stop. An error of a step is raised: the engine cannot go on after it."""
        while self._take_messages():
            if self._core.has_work:
                self._step()

    def _take_messages(self) -> bool:
        """Handles what has come, waiting for a message when there is nothing to compute; False after Stop."""
        inbox = self._channel.inbox
        while True:
            try:
                message = inbox.get(block=not self._core.has_work)
            except queue.Empty:
                return True
            if isinstance(message, Stop):
                return False
            self._handle(message)

    def _handle(self, message: ToEngine) -> None:
        if isinstance(message, Submit):
            self._submit(message)
        elif isinstance(message, Abort):
            for request_id in message.request_ids:
                self._core.abort_request(request_id, has_finished=message.has_finished)
            if not self._core.has_work:
                self._channel.send(Outputs([], 0, dataclasses.asdict(self._core.stats())))
        elif isinstance(message, Configure):
            self._configure(message)

    def _submit(self, message: Submit) -> None:
        try:
            self._core.add_request(message.request())
        except (InvalidRequestError, OutOfBlocksError) as error:
            parameter = error.parameter if isinstance(error, InvalidRequestError) else "max_tokens"
            self._channel.send(Rejected(message.request_id, type(error).__name__, str(error), parameter))

    def _configure(self, message: Configure) -> None:
        refusal = None
        try:
            self._core.configure(message.changes)
        except InvalidConfigError as error:
            refusal = str(error)
        self._channel.send(Configured(message.number, dataclasses.asdict(self._core.settings), refusal))

    def _step(self) -> None:
        outputs = self._core.step()
        num_tokens = self._core.runner.counters.num_real_tokens
        num_step_tokens, self._num_tokens_seen = num_tokens - self._num_tokens_seen, num_tokens
        now = time.perf_counter()
        stats = None
        if now >= self._stats_due or not self._core.has_work:
            stats = dataclasses.asdict(self._core.stats())
            self._stats_due = now + STATS_SECONDS
        if outputs or num_step_tokens or stats:
            self._channel.send(Outputs([TokenOutput.of(output) for output in outputs], num_step_tokens, stats))
        if not outputs and not self._core.is_busy:
            time.sleep(WINDOW_SECONDS)


def _ready(core: EngineCore, config: EngineConfig) -> Ready:
    resolved, capabilities = core.config, core.capabilities
    info = EngineInfo(
        model=config.model.model,
        vocab_size=core.model.vocab_size,
        max_model_len=resolved.max_model_len,
        eos_token_ids=tuple(core.model.eos_token_ids),
        block_size=resolved.block_size,
        num_kv_blocks=resolved.num_kv_blocks,
        max_num_seqs=resolved.max_num_seqs,
        max_num_batched_tokens=resolved.max_num_batched_tokens,
        dtype=resolved.dtype,
        platform=capabilities.platform,
        device_kind=capabilities.device_kind,
        sampling=config.device.sampling,
        scheduling_policy=config.scheduler.scheduling_policy,
        enable_prefix_caching=resolved.enable_prefix_caching,
        num_programs=core.runner.num_programs,
        ready_seconds=core.ready_seconds,
    )
    return Ready(info, dataclasses.asdict(core.settings), dataclasses.asdict(core.stats()))


def _serve(channel: Channel) -> None:
    start = channel.inbox.get()
    assert isinstance(start, Start), f"the first message is {type(start).__name__}"
    config = EngineConfig.from_arguments(**start.arguments)

    def progress(phase: str, done: int, total: int, what: str) -> None:
        channel.send(Progress(phase, done, total, what))

    core = EngineCore(config, progress)
    set_aside_what_stays()
    channel.send(_ready(core, config))
    EngineLoop(core, channel).run()


def set_aside_what_stays() -> None:
    """Takes everything that is there once the engine is ready out of garbage collection.

    It stays as long as the process, and looking through it all would stop the loop for a quarter of a second now and then.
    """
    gc.collect()
    gc.freeze()


def _die_with_parent() -> None:
    """Linux kills this process when the server's goes, also where a stuck device keeps the reading thread from noticing."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def main(arguments: list[str]) -> int:
    """Runs the engine on the socket whose file descriptor is given; 1 after a failure, which was sent to the server."""
    _die_with_parent()
    # The server decides when to stop: a Ctrl-C in its terminal reaches this process too.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(
        level=arguments[1] if len(arguments) > 1 else "WARNING", format="%(levelname)s %(name)s: %(message)s"
    )
    channel = Channel(socket.socket(fileno=int(arguments[0])))
    try:
        _serve(channel)
    except BaseException as error:
        message = str(error) if isinstance(error, QuireError) else f"{type(error).__name__}: {error}"
        channel.send(Failed(type(error).__name__, message))
        channel.close()
        if not isinstance(error, QuireError):
            logger.exception("the engine failed")
        return 1
    channel.close()
    return 0


if __name__ == "__main__":
    _status: Any = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads of the device's runtime may outlive the interpreter's end by seconds; nothing is left for them to do.
    os._exit(_status)
