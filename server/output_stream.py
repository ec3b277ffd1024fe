"""What an endpoint holds of its requests while they run: an iterator of their outputs that ends, fails and aborts cleanly."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import TracebackType

from quire.engine.input_processor import ProcessedRequest
from quire.engine.outputs import CompletionOutput, RequestOutput
from quire.engine.sampling_params import RequestOutputKind
from quire.kernels.errors import RequestTimeoutError


class OutputStream:
    """The outputs of one or several requests, in the order in which they come.

    Use it as `async with ... as outputs: async for output in outputs`. It ends when every request has; leaving the context earlier
    aborts what is open. A consumer that is slower than the engine finds the deltas of a request merged, so that what is kept
    for it never exceeds the text itself. Owned by the event loop's thread.
    """

    def __init__(
        self,
        requests: Sequence[ProcessedRequest],
        abort: Callable[[OutputStream, str], None],
        timeout: float | None,
    ) -> None:
        """`abort(stream, reason)` ends what is still open; `timeout` is in seconds, None for none."""
        self.requests = tuple(requests)
        self.open_ids = {request.request_id for request in requests}
        self._is_delta = {
            request.request_id: request.params.output_kind is RequestOutputKind.DELTA for request in requests
        }
        self._abort = abort
        self._pending: dict[str, RequestOutput] = {}
        self._error: Exception | None = None
        self._wake = asyncio.Event()
        self._timer = None
        if timeout:
            self._timer = asyncio.get_running_loop().call_later(timeout, self._expire, timeout)

    def put(self, output: RequestOutput) -> None:
        """Adds an output; called by the engine client."""
        request_id = output.request_id
        earlier = self._pending.get(request_id)
        if earlier is not None and self._is_delta[request_id]:
            output = merged(earlier, output)
        self._pending[request_id] = output
        if output.finished:
            self.open_ids.discard(request_id)
        self._wake.set()

    def fail(self, error: Exception) -> None:
        """Makes the iterator raise `error` once it has given what came before."""
        if self._error is None and self.open_ids:
            self._error = error
            self._wake.set()

    def _expire(self, timeout: float) -> None:
        if self.open_ids:
            self._abort(self, "timeout")
            self.fail(
                RequestTimeoutError(
                    f"the request took longer than {timeout:g} seconds; ask for fewer tokens, or for more time"
                )
            )

    def __aiter__(self) -> OutputStream:
        return self

    async def __anext__(self) -> RequestOutput:
        while not self._pending:
            if self._error is not None:
                raise self._error
            if not self.open_ids:
                raise StopAsyncIteration
            self._wake.clear()
            await self._wake.wait()
        return self._pending.pop(next(iter(self._pending)))

    async def __aenter__(self) -> OutputStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Aborts what is open; nothing comes any more."""
        if self._timer is not None:
            self._timer.cancel()
        if self.open_ids:
            self._abort(self, "abort")
            self.open_ids.clear()


def merged(earlier: RequestOutput, later: RequestOutput) -> RequestOutput:
    """Two deltas of a request as one."""
    choices = {choice.index: choice for choice in earlier.outputs}
    for choice in later.outputs:
        before = choices.get(choice.index)
        choices[choice.index] = choice if before is None else _merged_choice(before, choice)
    prompt_logprobs = earlier.prompt_logprobs if later.prompt_logprobs is None else later.prompt_logprobs
    return replace(later, outputs=list(choices.values()), prompt_logprobs=prompt_logprobs)


def _merged_choice(earlier: CompletionOutput, later: CompletionOutput) -> CompletionOutput:
    logprobs = None
    if earlier.logprobs is not None and later.logprobs is not None:
        logprobs = earlier.logprobs + later.logprobs
    return replace(
        later, text=earlier.text + later.text, token_ids=earlier.token_ids + later.token_ids, logprobs=logprobs
    )
