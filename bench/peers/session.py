"""One engine in a process of its own: starting it, asking it, ending it whatever it does."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from quire.bench.peers.quiet import peak_memory
from quire.kernels.errors import QuireError

CLOSE_SECONDS = 20.0
LOG_TAIL_LINES = 5


class PeerFailedError(QuireError):
    """An engine that could not be started, answered with an error, died or took too long; says which."""


class Session:
    """A driver's process. Its standard error goes to a file; the replies are JSON lines.

    It leads a process group, so that all it has started ends with it, and Ctrl-C on the terminal reaches only the one who measures.
    """

    def __init__(self, command: Sequence[str], log: Path) -> None:
        """Starts the process. Raises PeerFailedError where there is nothing to start."""
        self._log = log
        self.start_time = time.perf_counter()
        try:
            with log.open("ab") as errors:
                self._process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, start_new_session=True
                )
        except OSError as error:
            raise PeerFailedError(f"{command[0]} cannot be started: {error}") from error
        self._replies: queue.Queue[bytes | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.kill()

    @property
    def is_alive(self) -> bool:
        """Whether it can be asked anything more."""
        return self._process.poll() is None

    def ask(self, message: dict[str, Any], limit: float) -> dict[str, Any]:
        """Sends a message and gives the reply. Raises PeerFailedError for an error; an engine silent for `limit` seconds is killed."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._death() from None
        try:
            line = self._replies.get(timeout=limit)
        except queue.Empty:
            self.kill()
            raise PeerFailedError(f"no answer to {message['op']!r} within {limit:.0f} s; killed") from None
        if line is None:
            raise self._death()
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise PeerFailedError(reply["error"])
        return reply

    def peak_memory(self) -> int | None:
        """Bytes, of the process and what it has started; None where unknown."""
        return peak_memory(self._process.pid)

    def close(self) -> None:
        """Lets it end, and kills what has not after a while."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
            self._process.wait(CLOSE_SECONDS)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            pass  # killed below
        self.kill()

    def kill(self) -> None:
        """Ends the whole group at once."""
        with suppress(ProcessLookupError, PermissionError):  # all of it has ended
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._reader.join()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):  # an unsent rest
                pipe.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._replies.put(line)
        self._replies.put(None)

    def _death(self) -> PeerFailedError:
        status = self._process.wait()
        how = f"signal {-status}" if status < 0 else f"status {status}"
        return PeerFailedError(f"ended with {how}: {log_tail(self._log)}")


def log_tail(log: Path) -> str:
    """The last lines that say anything."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return " | ".join(lines[-LOG_TAIL_LINES:]) or f"{log} is empty"
