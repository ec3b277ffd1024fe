"""`quire batch`: a file of requests in OpenAI's batch format, answered line by line, resumable at any moment.

The output file is the only record of what is done: each answer is appended to it as one whole line as soon as it is
there. Started again after whatever happened, the command reads what is there and asks only for the rest.
"""

from __future__ import annotations

import argparse
import asyncio
import fcntl
import os
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from tqdm import tqdm

from quire.bench.openai_client import Answer, OpenAIClient
from quire.engine.arguments import add_engine_flags, engine_arguments
from quire.kernels.errors import InvalidConfigError, InvalidRequestError, NotServingError
from quire.server.remote import add_connection_flags, client_of
from quire.server.serve import Lifetime, loop_factory
from quire.server.settings import ServerSettings

PATHS = ("/v1/chat/completions", "/v1/completions")
EXIT_OK, EXIT_FAILED, EXIT_INTERRUPTED = 0, 1, 130
_BAD_JSON = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
MAX_NAMED = 5  # lines of a bad file that an error names
NUM_TRIES = 3  # of a line that the server fails on: it may be the line's fault
SYNC_SECONDS = 1.0  # what a power failure may cost; a killed process costs only what was not answered
FIRST_WAIT, LONGEST_WAIT = 0.25, 10.0  # between tries


class _Line(msgspec.Struct, forbid_unknown_fields=True):
    """One line of the input."""

    custom_id: str
    method: str
    url: str
    body: msgspec.Raw


class _Body(msgspec.Struct):
    """What has to be known of a body before it is sent."""

    model: str | None = None
    stream: bool | None = None


class _Response(msgspec.Struct):
    """What has to be known of an answer."""

    status_code: int


class _Done(msgspec.Struct):
    """What has to be known of a line of the output."""

    custom_id: str
    response: _Response


@dataclass(frozen=True)
class BatchRequest:
    """A line of the input, by its place in the file: bodies are read when they are sent."""

    custom_id: str
    offset: int
    size: int


@dataclass(frozen=True)
class BatchInput:
    """A whole input file: its requests in order, and the names of the models they ask for."""

    path: Path
    requests: tuple[BatchRequest, ...]
    models: frozenset[str]

    @classmethod
    def read(cls, path: Path) -> BatchInput:
        """Looks at every line. Raises InvalidRequestError that names the first bad ones, InvalidConfigError for no file."""
        requests: dict[str, BatchRequest] = {}
        models, problems, num_bad = set(), [], 0
        for number, offset, text in _lines(path):
            try:
                line, body = _decode(text)
                if line.custom_id in requests:
                    raise InvalidRequestError(f"custom_id {line.custom_id!r} is that of an earlier line too")
            except InvalidRequestError as error:
                num_bad += 1
                if num_bad <= MAX_NAMED:
                    problems.append(f"line {number}: {error}")
                continue
            requests[line.custom_id] = BatchRequest(line.custom_id, offset, len(text))
            if body.model is not None:
                models.add(body.model)
        if num_bad:
            more = f"\n... and {num_bad - MAX_NAMED} more" if num_bad > MAX_NAMED else ""
            raise InvalidRequestError(f"{path} has bad lines, so nothing was run:\n" + "\n".join(problems) + more)
        if not requests:
            raise InvalidRequestError(
                f'{path} holds no request; a line is {{"custom_id": "1", "method": "POST", "url": "{PATHS[0]}", "body": {{...}}}}'
            )
        return cls(path, tuple(requests.values()), frozenset(models))


def _lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Number, offset and bytes of each line that is not blank."""
    offset = 0
    try:
        with path.open("rb") as file:
            for number, text in enumerate(file, 1):
                if text.strip():
                    yield number, offset, text
                offset += len(text)
    except OSError as error:
        raise InvalidConfigError(f"{path} cannot be read: {error}") from error


def _decode(text: bytes) -> tuple[_Line, _Body]:
    try:
        line = msgspec.json.decode(text, type=_Line)
    except _BAD_JSON as error:
        raise InvalidRequestError(str(error)) from error
    try:
        body = msgspec.json.decode(line.body, type=_Body)
    except _BAD_JSON as error:
        raise InvalidRequestError(f"body: {error}") from error
    if line.method != "POST":
        raise InvalidRequestError(f"method is {line.method!r}, and must be POST")
    if line.url not in PATHS:
        raise InvalidRequestError(f"url is {line.url!r}, and must be one of {', '.join(PATHS)}")
    if body.stream:
        raise InvalidRequestError("a batch is not streamed; leave stream out of the body")
    return line, body


class BatchOutput:
    """The output file: what is done, and where more is appended. Use it as a context manager.

    Raises InvalidConfigError where the file cannot be written, another batch writes it, or it is not the output of
    this input.
    """

    def __init__(self, path: Path, known: Collection[str]) -> None:
        self.done: set[str] = set()
        self.num_failed = 0
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise InvalidConfigError(f"{path} cannot be written: {error}") from error
        self._needs_sync = False
        try:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise InvalidConfigError(f"another quire batch is writing {path}; wait for it or stop it") from error
            os.ftruncate(self._file, self._read(path, known))
        except BaseException:
            os.close(self._file)
            raise

    def _read(self, path: Path, known: Collection[str]) -> int:
        """Notes what is done; the size of the file without a last line that was not written to its end."""
        whole = 0
        for number, offset, text in _lines(path):
            if not text.endswith(b"\n"):
                break
            try:
                found = msgspec.json.decode(text, type=_Done)
            except _BAD_JSON as error:
                raise InvalidConfigError(
                    f"line {number} of {path} is none that quire batch wrote ({error}); name another file for the output"
                ) from error
            if found.custom_id not in known:
                raise InvalidConfigError(
                    f"{path} holds an answer to {found.custom_id!r}, which is not in the input; it belongs to another batch"
                )
            self._note(found.custom_id, found.response.status_code)
            whole = offset + len(text)
        return whole

    def append(self, custom_id: str, request_id: str, answer: Answer) -> None:
        """Writes one answer. Raises OSError, after which the file may end in a part of a line, which the next run drops."""
        line = {
            "id": f"batch_req_{request_id}",
            "custom_id": custom_id,
            "response": {"status_code": answer.status, "request_id": request_id, "body": answer.body},
            "error": None,
        }
        rest = memoryview(msgspec.json.encode(line) + b"\n")
        while rest:
            rest = rest[os.write(self._file, rest) :]
        self._note(custom_id, answer.status)
        self._needs_sync = True

    def _note(self, custom_id: str, status: int) -> None:
        self.done.add(custom_id)
        self.num_failed += status != 200

    @property
    def status(self) -> int:
        """The exit status of a batch that is done."""
        return EXIT_FAILED if self.num_failed else EXIT_OK

    def sync(self) -> None:
        """Has the disk keep what was written."""
        if self._needs_sync:
            self._needs_sync = False
            os.fsync(self._file)

    def __enter__(self) -> BatchOutput:
        return self

    def __exit__(self, *_: object) -> None:
        self.sync()
        os.close(self._file)


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
            return output.status
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
        return self._output.status

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
            line, _ = _decode(os.pread(file, request.size, request.offset))
            request_id = uuid.uuid4().hex
            answer = await self._answer(line, request_id)
            self._output.append(line.custom_id, request_id, answer)
            bar.update()
            if self._output.num_failed:
                bar.set_postfix(failed=self._output.num_failed, refresh=False)

    async def _answer(self, line: _Line, request_id: str) -> Answer:
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
