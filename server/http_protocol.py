"""uvicorn's HTTP/1.1 with two limits that it lacks: on a head that never ends, and on a client that falls silent in a request.

Owns nothing of requests. A body's size is the middleware's matter, an idle connection's end uvicorn's own.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 64 * 1024  # of a request line with its headers, or of what stands between two pieces of a body
STALL_SECONDS = 75.0  # as long as an idle connection is kept


class HttpProtocol(HttpToolsProtocol):
    """One connection. The parser gathers a head until it is whole, however long it gets, so what brings no progress is counted here."""

    stall_seconds = STALL_SECONDS

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._num_bytes = 0  # since the parser last told of a head, a piece of a body or an end
        self._has_progressed = False
        self._last_active = self.loop.time()
        self._stall_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Starts to watch."""
        super().connection_made(transport)
        self._stall_timer = self.loop.call_later(self.stall_seconds, self._close_if_stalled)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stops to watch."""
        if self._stall_timer is not None:
            self._stall_timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Hands bytes to the parser; refuses the request when many of them in a row made nothing."""
        self._last_active = self.loop.time()
        self._has_progressed = False
        super().data_received(data)
        self._num_bytes = 0 if self._has_progressed else self._num_bytes + len(data)
        if self._num_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self._refuse()

    def _refuse(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.send_400_response(
                f"The head of the request is larger than {MAX_HEAD_BYTES} bytes; send fewer or shorter headers."
            )
        else:  # another answer is on its way, and nothing may be written into it
            self.transport.close()

    def on_headers_complete(self) -> None:
        """A head is whole."""
        self._has_progressed = True
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A piece of a body came."""
        self._has_progressed = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        """A request is whole."""
        self._has_progressed = True
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """An answer is out, and the connection idle from now on."""
        self._last_active = self.loop.time()
        super().on_response_complete()

    def _close_if_stalled(self) -> None:
        """Closes the connection unless it is being answered, or has lately moved; looks again later."""
        now = self.loop.time()
        is_answered = self.cycle is not None and not self.cycle.response_complete and not self.cycle.more_body
        if not is_answered and now - self._last_active >= self.stall_seconds:
            self.transport.close()
            return
        self._stall_timer = self.loop.call_later(self.stall_seconds, self._close_if_stalled)
