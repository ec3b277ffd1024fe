"""`quire batch`: a file of requests in OpenAI's batch format, answered line by line, resumable at any moment.

Owns the workers that have the requests answered, and the server where the command runs one of its own. What is done is known
from the output file alone (`batch_files`): started again after whatever happened, the command asks only for the rest.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from quire.bench.openai_client import Answer, OpenAIClient
from quire.engine.arguments import add_engine_flags, engine_arguments
from quire.kernels.errors import InvalidConfigError, InvalidRequestError, NotServingError
from quire.server.batch_files import MAX_NAMED, BatchInput, BatchOutput, BatchRequest, Line, decode_line
from quire.server.remote import add_connection_flags, client_of
from quire.server.serve import Lifetime, loop_factory
from quire.server.settings import ServerSettings

EXIT_OK, EXIT_FAILED, EXIT_INTERRUPTED = 0, 1, 130
NUM_TRIES = 3  # of a line that the server fails on: it may be the line's fault
SYNC_SECONDS = 1.0  # what a power failure may cost; a killed process costs only what was not answered
FIRST_WAIT, LONGEST_WAIT = 0.25, 10.0  # between tries


def add_command(commands: Any) -> None:
    """Adds the command and its flags."""
    parser = commands.add_parser(
        "batch",
        help="answer a file of requests, resumably",
        description=(
            "Answer a file of requests in OpenAI's batch format (one JSON object a line: custom_id, method, url, body). Answers "
            "are appended to OUTPUT as they come. Started again after an interruption of any kind it goes on where it was: "
            "what has a line in OUTPUT, with success or an error, is not asked again. Without --url it runs a server of its own, "
            "with the settings of quire serve by default."
        ),
        epilog="Exit status: 0 all answered, 1 some failed or the server was lost, 2 nothing was run, 130 interrupted.",
    )
    parser.add_argument("input", type=Path, metavar="INPUT", help="file of requests")
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="file that answers are appended to")
    parser.add_argument(
        "--model",
        default=argparse.SUPPRESS,
        help="model of the own server: Hugging Face id, folder, demo or demo-draft (default: demo)",
    )
    parser.add_argument("--served-model-name", help="what the requests call it (default: as --model)")
    add_connection_flags(parser, url=None)
    parser.add_argument(
        "--concurrency", type=int, default=64, help="requests that are open at once (default: %(default)s)"
    )
    parser.add_argument(
        "--retry-seconds",
        type=float,
        default=60.0,
        help="how long a server that does not answer is waited for (default: %(default)g)",
    )
    add_engine_flags(parser)
    parser.set_defaults(run=run)


def run(namespace: argparse.Namespace) -> int:
    """Answers what is not answered yet."""
    if namespace.concurrency < 1 or not namespace.retry_seconds >= 0:
        raise InvalidConfigError("concurrency must be at least 1, and retry_seconds at least 0")
    _check_server_flags(namespace)
    if namespace.output.exists() and namespace.input.exists() and namespace.output.samefile(namespace.input):
        raise InvalidConfigError(f"the output would be appended to the input, {namespace.input}; name another file")
    batch = BatchInput.read(namespace.input)
    with BatchOutput(namespace.output, {request.custom_id for request in batch.requests}) as output:
        num_before = len(output.done)
        if num_before == len(batch.requests):
            print(
                f"{namespace.output}: all {num_before} requests were answered before; {output.num_failed} failed",
                file=sys.stderr,
            )
            return _exit_status(output)
        begin = time.monotonic()
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            status = runner.run(_serve_and_answer(namespace, batch, output))
        left = len(batch.requests) - len(output.done)
        print(
            f"{namespace.output}: {len(output.done) - num_before} answered in {time.monotonic() - begin:.1f} s"
            + (f", {num_before} were before" if num_before else "")
            + f"; {output.num_failed} failed"
            + (f"; {left} are left: the same command goes on with them" if left else ""),
            file=sys.stderr,
        )
    return status


def _exit_status(output: BatchOutput) -> int:
    """That of a batch of which nothing is left."""
    return EXIT_FAILED if output.num_failed else EXIT_OK


def _check_server_flags(namespace: argparse.Namespace) -> None:
    """Raises InvalidConfigError for flags that would be without effect."""
    given = sorted(engine_arguments(namespace))
    if namespace.url is None and namespace.api_key is not None:
        raise InvalidConfigError("api_key is for a server at --url; the own one takes requests of this command alone")
    if namespace.url is not None and (given or namespace.served_model_name):
        names = given + (["served_model_name"] if namespace.served_model_name else [])
        raise InvalidConfigError(
            f"the server at {namespace.url} is not for this command to set up; leave out {', '.join(names)}"
        )


async def _serve_and_answer(namespace: argparse.Namespace, batch: BatchInput, output: BatchOutput) -> int:
    if namespace.url is not None:
        async with client_of(namespace) as client:
            return await _Batch(namespace, batch, output, client).run()
    with tempfile.TemporaryDirectory(prefix="quire-batch-") as folder:
        settings = ServerSettings(
            uds=Path(folder) / "socket",
            served_model_name=namespace.served_model_name,
            access_log="none",
            max_queued_requests=0,
        )
        arguments = {"model": "demo", **engine_arguments(namespace)}
        lifetime = Lifetime(settings, arguments, verbose=namespace.verbose, is_private=True)
        async with client_of(namespace, uds=settings.uds) as client:
            return await _beside(lifetime, _Batch(namespace, batch, output, client))


async def _beside(lifetime: Lifetime, work: _Batch) -> int:
    """Runs a server for as long as the work takes. When the server ends first, the work cannot go on."""
    serving = asyncio.create_task(lifetime.run(), name="server")
    working = asyncio.create_task(work.run(), name="batch")
    try:
        await asyncio.wait({serving, working}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            working.cancel()
            await serving  # raises when the engine never got ready
            print("quire batch: the engine died; its last words are above", file=sys.stderr)
            return EXIT_FAILED
        return await working
    finally:
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)
        lifetime.stop()
        await asyncio.gather(serving, return_exceptions=True)


class _Batch:
    """The requests that are left, and the workers that have them answered."""

    def __init__(
        self, namespace: argparse.Namespace, batch: BatchInput, output: BatchOutput, client: OpenAIClient
    ) -> None:
        self._batch = batch
        self._output = output
        self._client = client
        self._retry_seconds: float = namespace.retry_seconds
        self._concurrency: int = namespace.concurrency
        self._left: Iterator[BatchRequest] = iter(
            [request for request in batch.requests if request.custom_id not in output.done]
        )
        self._last_answer = time.monotonic()
        self._is_interrupted = self._is_answering = False
        self._tasks: list[asyncio.Task[None]] = []

    async def run(self) -> int:
        """The exit status. Raises InvalidRequestError where the file asks for models that the server does not have."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._interrupt)
        file = os.open(self._batch.path, os.O_RDONLY)
        try:
            return await self._run(file)
        except NotServingError as error:
            print(f"quire batch: {error}", file=sys.stderr)
            return EXIT_INTERRUPTED if self._is_interrupted else EXIT_FAILED
        finally:
            os.close(file)
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)

    async def _run(self, file: int) -> int:
        start = asyncio.create_task(self._wait_until_ready())
        self._tasks = [start]
        await _all_of(self._tasks)
        if start.cancelled():
            return EXIT_INTERRUPTED
        self._is_answering = True
        total, done = len(self._batch.requests), len(self._output.done)
        with tqdm(total=total, initial=done, desc="requests", disable=None, dynamic_ncols=True) as bar:
            self._tasks = [
                asyncio.create_task(self._work(file, bar)) for _ in range(min(self._concurrency, total - done))
            ]
            syncing = asyncio.create_task(self._sync())
            try:
                await _all_of(self._tasks)
            finally:
                syncing.cancel()
        if self._is_interrupted and len(self._output.done) < total:
            return EXIT_INTERRUPTED
        return _exit_status(self._output)

    def _interrupt(self) -> None:
        """The first time lets open requests be answered; the second time does not."""
        if self._is_interrupted or not self._is_answering:
            for task in self._tasks:
                task.cancel()
        else:
            print("ending the open requests; once more to leave them", file=sys.stderr)
        self._is_interrupted = True

    async def _sync(self) -> None:
        while True:
            await asyncio.sleep(SYNC_SECONDS)
            await asyncio.to_thread(self._output.sync)

    async def _wait_until_ready(self) -> None:
        """Waits for a server that starts, for as long as it does; then sees to it that it has the models asked for."""
        wait = _Wait(self)
        while True:
            try:
                status, body = await self._client.get("/ready")
            except NotServingError as error:
                await wait.after(error)
                continue
            if status != 503:  # 404 too: other servers have no such page
                break
            if isinstance(body, dict) and body.get("status") == "starting":
                await asyncio.sleep(FIRST_WAIT)
                wait = _Wait(self)
            else:
                await wait.after(NotServingError(f"the server takes no requests: {body}"))
        status, body = await self._client.get("/v1/models")
        if status != 200:
            raise NotServingError(f"/v1/models was answered with {status}: {body}")
        served = {str(model["id"]) for model in body["data"]}
        if unknown := sorted(self._batch.models - served):
            raise InvalidRequestError(
                f"{self._batch.path} asks for {', '.join(map(repr, unknown[:MAX_NAMED]))}, and the server has "
                f"{', '.join(map(repr, sorted(served)))}; --served-model-name gives the own server's model another name"
            )

    async def _work(self, file: int, bar: tqdm[Any]) -> None:
        while not self._is_interrupted:
            request = next(self._left, None)
            if request is None:
                return
            line, _ = decode_line(os.pread(file, request.size, request.offset))
            request_id = uuid.uuid4().hex
            answer = await self._answer(line, request_id)
            self._output.append(line.custom_id, request_id, answer)
            bar.update()
            if self._output.num_failed:
                bar.set_postfix(failed=self._output.num_failed, refresh=False)

    async def _answer(self, line: Line, request_id: str) -> Answer:
        """The answer that counts. Raises NotServingError when nobody has answered for too long."""
        wait = _Wait(self)
        num_tries = 0
        while True:
            try:
                answer = await self._client.send(line.url, bytes(line.body), request_id)
            except NotServingError as error:
                await wait.after(error)
                continue
            if answer.status == 429:  # the server lives, and says when it has room
                self._last_answer = time.monotonic()
                await asyncio.sleep(FIRST_WAIT if answer.retry_after is None else answer.retry_after)
                continue
            if answer.status in (502, 503):
                await wait.after(NotServingError(f"the server takes no requests: {answer.body}"), answer.retry_after)
                continue
            self._last_answer = time.monotonic()
            num_tries += 1
            if answer.status < 500 or num_tries == NUM_TRIES:
                return answer
            await wait.after(None)

    def gives_up(self, since: float) -> bool:
        """Whether nobody was answered for too long, by now and since `since`."""
        return time.monotonic() - max(self._last_answer, since) > self._retry_seconds


class _Wait:
    """The pauses between the tries of one request, longer each time."""

    def __init__(self, batch: _Batch) -> None:
        self._batch = batch
        self._next = FIRST_WAIT
        self._since: float | None = None

    async def after(self, error: Exception | None, wanted: float | None = None) -> None:
        """Pauses, or raises `error` when it has lasted too long."""
        if self._since is None:
            self._since = time.monotonic()
        if error is not None and self._batch.gives_up(self._since):
            raise error
        await asyncio.sleep(min(self._next if wanted is None else wanted, LONGEST_WAIT))
        self._next = min(2 * self._next, LONGEST_WAIT)


async def _all_of(tasks: Iterable[asyncio.Task[None]]) -> None:
    """Waits for all tasks; when one fails the others are cancelled and its error raised. Cancelled ones have ended."""
    tasks = list(tasks)
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    finally:
        for task in tasks:
            task.cancel()
        found = await asyncio.gather(*tasks, return_exceptions=True)
    for result in found:
        if isinstance(result, BaseException) and not isinstance(result, asyncio.CancelledError):
            raise result
