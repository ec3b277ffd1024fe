"""The two files of a batch: requests in OpenAI's batch format, and their answers.

The output file is the only record of what is done: each answer is appended to it as one whole line as soon as it is there,
and whoever opens it again finds out what is left.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from quire.bench.openai_client import Answer
from quire.kernels.errors import InvalidConfigError, InvalidRequestError

PATHS = ("/v1/chat/completions", "/v1/completions")
MAX_NAMED = 5  # lines of a bad file that an error names
_BAD_JSON = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


class Line(msgspec.Struct, forbid_unknown_fields=True):
    """One line of the input."""

    custom_id: str
    method: str
    url: str
    body: msgspec.Raw


class Body(msgspec.Struct):
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
                line, body = decode_line(text)
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


def decode_line(text: bytes) -> tuple[Line, Body]:
    """A line of the input, and what has to be known of its body. Raises InvalidRequestError for one that cannot be run."""
    try:
        line = msgspec.json.decode(text, type=Line)
    except _BAD_JSON as error:
        raise InvalidRequestError(str(error)) from error
    try:
        body = msgspec.json.decode(line.body, type=Body)
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
