"""`quire complete` and `quire chat`: a running server from the command line."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

from quire.backends.environment import api_keys
from quire.bench.openai_client import OpenAIClient
from quire.kernels.errors import InvalidRequestError, QuireError

DEFAULT_URL = "http://127.0.0.1:8000"
_HELP = "/reset forgets what was said, /exit (or Ctrl-D) ends, Ctrl-C ends an answer; anything else is sent"
_FLAGS: tuple[tuple[str, type, str], ...] = (
    ("max_tokens", int, "most tokens to generate"),
    ("temperature", float, "0 takes the most likely token"),
    ("top_p", float, "sample among the most likely tokens that make up this share"),
    ("top_k", int, "sample among so many of the most likely tokens"),
    ("seed", int, "seed of the sampling"),
)


def add_connection_flags(parser: argparse.ArgumentParser, url: str | None = DEFAULT_URL) -> None:
    """The flags that say which server is meant; `client_of` reads them."""
    shown = "the server" if url is None else f"the server (default: {url})"
    parser.add_argument("--url", default=url, help=shown)
    parser.add_argument("--api-key", help="key that the server asks for (default: the first of $QUIRE_API_KEYS)")


def client_of(namespace: argparse.Namespace, *, uds: Path | None = None, timeout: float | None = None) -> OpenAIClient:
    """The client of the server that the flags name."""
    key = namespace.api_key or next(iter(api_keys()), None)
    return OpenAIClient(namespace.url or DEFAULT_URL, key, uds=uds, timeout=timeout)


def add_command(commands: Any) -> None:
    """Adds both commands and their flags."""
    complete = commands.add_parser(
        "complete",
        help="complete prompts on a running server",
        description="Complete prompts on a running server (of quire, or any other with OpenAI's API).",
    )
    complete.add_argument(
        "-p",
        "--prompt",
        action="append",
        dest="prompts",
        help="a prompt; may be given several times (default: standard input)",
    )
    complete.add_argument("--json", action="store_true", help="print the server's answer instead of text")
    chat = commands.add_parser(
        "chat",
        help="talk to the model of a running server",
        description=f"Talk to the model of a running server. {_HELP}.",
    )
    chat.add_argument("-p", "--prompt", help="say this, print the answer and end (default: a conversation)")
    chat.add_argument("--system", help="the system message")
    for parser, run in ((complete, _run_complete), (chat, _run_chat)):
        add_connection_flags(parser)
        parser.add_argument("--uds", type=Path, help="unix socket of the server, in place of --url")
        parser.add_argument("--model", help="name of the model (default: the first that the server lists)")
        parser.add_argument("--stop", action="append", help="a string to stop at; may be given several times")
        parser.add_argument("--params", default="{}", help="more parameters of the request, as a JSON object")
        for name, kind, text in _FLAGS:
            parser.add_argument("--" + name.replace("_", "-"), type=kind, dest=name, help=text)
        parser.set_defaults(run=run)
    # As `quire generate` has them: the same prompt gives the same text here and there.
    complete.set_defaults(max_tokens=128, temperature=0.0)


def _parameters(namespace: argparse.Namespace) -> dict[str, Any]:
    try:
        extra = json.loads(namespace.params)
    except json.JSONDecodeError as error:
        raise InvalidRequestError(f"--params is no JSON object ({error}): {namespace.params!r}") from error
    if not isinstance(extra, dict):
        raise InvalidRequestError(f"--params is no JSON object: {namespace.params!r}")
    if extra.get("stream") is not None:
        raise InvalidRequestError("--params: what is streamed is not for the caller to say; leave `stream` out")
    names = [name for name, _, _ in _FLAGS] + ["stop"]
    given = {name: value for name in names if (value := getattr(namespace, name)) is not None}
    return given | extra


def _read_input() -> str:
    if sys.stdin.isatty():
        print("reading the prompt from standard input; end it with Ctrl-D", file=sys.stderr)
    text = sys.stdin.read()
    if not text:
        raise InvalidRequestError("standard input is empty; give a prompt with --prompt")
    return text


def _run_complete(namespace: argparse.Namespace) -> int:
    prompts = namespace.prompts or [_read_input()]
    return asyncio.run(_complete(namespace, prompts, _parameters(namespace)))


async def _complete(namespace: argparse.Namespace, prompts: list[str], parameters: dict[str, Any]) -> int:
    path = "/v1/completions"
    async with client_of(namespace, uds=namespace.uds) as client:
        body = {"model": namespace.model or await client.model(), "prompt": prompts, **parameters}
        num_choices = body.get("n") or 1
        if namespace.json:
            print(json.dumps(await client.post(path, body), ensure_ascii=False))
            return 0
        if len(prompts) == num_choices == 1:
            print(prompts[0], end="", flush=True)
            async for data in client.stream(path, {**body, "stream": True}):
                for choice in json.loads(data)["choices"]:
                    print(choice["text"], end="", flush=True)
            print()
            return 0
        choices = (await client.post(path, body))["choices"]
    for choice in sorted(choices, key=lambda found: found["index"]):
        prompt_idx, choice_idx = divmod(choice["index"], num_choices)
        print(f"--- {prompt_idx + 1}" + (f".{choice_idx + 1}" if num_choices > 1 else ""))
        print(prompts[prompt_idx] + choice["text"])
    return 0


def _run_chat(namespace: argparse.Namespace) -> int:
    parameters = _parameters(namespace)
    if (parameters.get("n") or 1) != 1:
        raise InvalidRequestError("a conversation has one answer to each message; leave `n` out")
    with _Chat(namespace, parameters) as chat:
        if namespace.prompt is not None:
            return chat.answer(namespace.prompt)
        if not sys.stdin.isatty():
            return chat.answer(_read_input())
        return chat.converse()


class _Chat:
    """One conversation: what was said so far, and the connection that it is held over."""

    def __init__(self, namespace: argparse.Namespace, parameters: dict[str, Any]) -> None:
        self._parameters = parameters
        self._first = [] if namespace.system is None else [{"role": "system", "content": namespace.system}]
        self._messages: list[dict[str, Any]] = list(self._first)
        self._client = client_of(namespace, uds=namespace.uds)
        self._model: str | None = namespace.model
        self._runner = asyncio.Runner()
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> _Chat:
        self._stack.enter_context(self._runner)
        self._runner.run(self._client.__aenter__())
        self._stack.callback(lambda: self._runner.run(self._client.__aexit__()))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def converse(self) -> int:
        """Reads messages and prints answers until the end of the input."""
        self._find_model()
        print(f"{self._model}: {_HELP}", file=sys.stderr)
        for text in _messages_of_terminal():
            if text == "/reset":
                self._messages = list(self._first)
                print("forgotten", file=sys.stderr)
            elif text == "/help":
                print(_HELP, file=sys.stderr)
            else:
                try:
                    self.answer(text)
                except QuireError as error:  # the conversation goes on: the server may be back, or the next message fit
                    print(f"quire chat: {error}", file=sys.stderr)
        return 0

    def answer(self, text: str) -> int:
        """Says `text`, prints the answer; what was said before is sent along. An answer that fails leaves no trace."""
        self._find_model()
        messages = [*self._messages, {"role": "user", "content": text}]
        pieces: list[str] = []
        try:
            self._runner.run(self._print_answer(messages, pieces))
        except KeyboardInterrupt:
            print(" [ended]")
            if not sys.stdin.isatty():
                raise
        self._messages = [*messages, {"role": "assistant", "content": "".join(pieces)}]
        return 0

    def _find_model(self) -> None:
        if self._model is None:
            self._model = self._runner.run(self._client.model())

    async def _print_answer(self, messages: list[dict[str, Any]], pieces: list[str]) -> None:
        body = {"model": self._model, "messages": messages, "stream": True, **self._parameters}
        reason = None
        async for choice in _choices(self._client, body):
            delta = choice["delta"]
            if content := delta.get("content"):
                pieces.append(content)
                print(content, end="", flush=True)
            for call in delta.get("tool_calls") or ():
                if name := call["function"].get("name"):
                    print(f"[calls {name}] ", end="")
                print(call["function"].get("arguments") or "", end="", flush=True)
            reason = choice.get("finish_reason") or reason
        print()
        if reason == "length":
            print("[cut: no tokens were left; --max-tokens or the model's length]", file=sys.stderr)


async def _choices(client: OpenAIClient, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    # Closed at once when the answer is interrupted, so that the server need not go on with it.
    async with contextlib.aclosing(client.stream("/v1/chat/completions", body)) as events:
        async for data in events:
            for choice in json.loads(data)["choices"]:
                yield choice


def _messages_of_terminal() -> Iterator[str]:
    """What is typed, until /exit or the end of the input. Ctrl-C drops the line."""
    with contextlib.suppress(ImportError):  # not on every system; without it lines cannot be edited
        import readline  # noqa: F401
    while True:
        try:
            text = input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            continue
        if text.strip() == "/exit":
            return
        if text.strip():
            yield text.strip()
