"""Tool calls read back from a model's text as it comes, in the two formats that open models were trained on.

    Hermes    <tool_call>{"name": "f", "arguments": {...}}</tool_call>, any number, with text around them
    Llama 3   the whole answer is {"name": "f", "parameters": {...}}, several separated by ";", perhaps after <|python_tag|>

What may be the beginning of a call is held back until it is one or is not, and a call comes out whole: a piece that was sent
could not be taken back when the rest turns out to be no JSON. Text that is no call is given back as it was. However a text is
cut into pieces, the content and the calls are those of the whole.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import msgspec

OPEN, CLOSE = "<tool_call>", "</tool_call>"
PYTHON_TAG = "<|python_tag|>"
# How Llama 3's templates tell the model what a call looks like.
LLAMA3_INSTRUCTION = '{"name": function name, "parameters"'
# What a call of Llama 3 may begin with; "type" is "function" where the model repeats how its tools were described.
FIRST_KEYS = ('"name"', '"parameters"', '"arguments"', '"type"')


@dataclass(frozen=True)
class ToolCallDelta:
    """A call, or a further piece of its arguments; `id` and `name` come with the first piece."""

    index: int
    id: str | None
    name: str | None
    arguments: str


@dataclass(frozen=True)
class ParsedDelta:
    """What a piece of text brought: content for the reader, and calls."""

    content: str = ""
    calls: tuple[ToolCallDelta, ...] = ()


class ToolParser(Protocol):
    """Reads one choice. Never raises: what cannot be read is content."""

    def feed(self, text: str) -> ParsedDelta:
        """Takes the next piece of text in."""
        ...

    def finish(self) -> ParsedDelta:
        """The text has ended: whatever was held back is decided."""
        ...


def make_tool_parser(name: str, chat_template: str | None) -> ToolParser | None:
    """A parser of the format `name`: hermes, llama3, none, or auto, which looks for the format's marks in the template.

    None where calls are not looked for: with none, and with auto for a template that has no known mark.
    """
    if name == "auto":
        name = _format_of(chat_template or "")
    if name == "hermes":
        return HermesParser()
    return Llama3Parser() if name == "llama3" else None


def _format_of(template: str) -> str:
    if OPEN in template:
        return "hermes"
    return "llama3" if PYTHON_TAG in template or LLAMA3_INSTRUCTION in template else "none"


class _WrittenCall(msgspec.Struct):
    """A call as models write it. Raw keeps the arguments as they were written, numbers and escapes included."""

    name: str
    arguments: msgspec.Raw = msgspec.Raw(b"")
    parameters: msgspec.Raw = msgspec.Raw(b"")


def _call(index: int, text: str) -> ToolCallDelta | None:
    """The call that a JSON text stands for, None where it stands for none."""
    try:
        written = msgspec.json.decode(text.encode(), type=_WrittenCall)
    except (ValueError, RecursionError):  # no JSON, not of that shape, a string that is no Unicode, nested too deeply
        return None
    arguments = (bytes(written.arguments) or bytes(written.parameters)).decode()
    if not arguments.startswith("{"):
        return None
    return ToolCallDelta(index, f"call_{uuid.uuid4().hex[:24]}", written.name, arguments)


def _json_error(text: str) -> str:
    """Why a text is no JSON value; empty where it is one."""
    try:
        json.loads(text)
    except RecursionError:
        return "nested too deeply"
    except ValueError as error:
        return str(error)
    return ""


def _num_held_back(text: str, mark: str) -> int:
    """How many of the last characters may be the beginning of `mark`."""
    most = min(len(text), len(mark) - 1)
    return next((count for count in range(most, 0, -1) if mark.startswith(text[-count:])), 0)


class HermesParser:
    """Content flows through; a call comes out when its closing mark is there.

    White space around calls belongs to the format and is left out; in front of anything else it is content.
    """

    def __init__(self) -> None:
        self._text = ""  # not decided yet; begins with OPEN while a call is read
        self._search_from = 0  # where in it a closing mark may still be found
        self._space = ""  # white space that is content unless a call, or the end after a call, follows
        self._is_after_call = False
        self._num_calls = 0

    def feed(self, text: str) -> ParsedDelta:
        """Takes the next piece of text in."""
        self._text += text
        return self._gather(has_ended=False)

    def finish(self) -> ParsedDelta:
        """A call whose closing mark was cut off counts if its JSON is whole."""
        parsed = self._gather(has_ended=True)
        space, self._space = "" if self._is_after_call else self._space, ""
        return ParsedDelta(parsed.content + space, parsed.calls)

    def _gather(self, has_ended: bool) -> ParsedDelta:
        content: list[str] = []
        calls: list[ToolCallDelta] = []
        for part in self._parts(has_ended):
            if isinstance(part, ToolCallDelta):
                calls.append(part)
                self._space, self._is_after_call = "", True
            else:
                content.append(self._without_last_space(part))
        return ParsedDelta("".join(content), tuple(calls))

    def _without_last_space(self, part: str) -> str:
        part = self._space + part
        solid = part.rstrip()
        self._space = part[len(solid) :]
        self._is_after_call = self._is_after_call and not solid
        return solid

    def _parts(self, has_ended: bool) -> Iterator[str | ToolCallDelta]:
        """Takes what is decided off the front of the text."""
        while self._text:
            if not self._text.startswith(OPEN):
                begin = self._text.find(OPEN)
                if begin < 0:
                    begin = len(self._text) - (0 if has_ended else _num_held_back(self._text, OPEN))
                if begin == 0:
                    return
                yield self._take(begin)
            elif (part := self._next_call(has_ended)) is not None:
                yield part
            else:
                return

    def _next_call(self, has_ended: bool) -> str | ToolCallDelta | None:
        """The call at the front, its text where it is none, None while its end is not there."""
        start = max(self._search_from, len(OPEN))
        while (end := self._text.find(CLOSE, start)) >= 0:
            body = self._text[len(OPEN) : end]
            # A closing mark inside a string is part of the arguments.
            if not _json_error(body).startswith("Unterminated string"):
                return self._decide(body, end + len(CLOSE))
            start = self._search_from = end + 1
        self._search_from = max(start, len(self._text) - len(CLOSE) + 1)
        if not has_ended:
            return None
        whole = _call(self._num_calls, self._text[len(OPEN) :])
        if whole is not None:
            return self._decide(self._text[len(OPEN) :], len(self._text))
        # A quote is missing somewhere: the call ends where it seems to, and what follows may be others.
        first = self._text.find(CLOSE)
        return self._take(len(self._text) if first < 0 else first + len(CLOSE))

    def _decide(self, body: str, end: int) -> str | ToolCallDelta:
        call = _call(self._num_calls, body)
        text = self._take(end)
        if call is None:
            return text
        self._num_calls += 1
        return call

    def _take(self, end: int) -> str:
        text, self._text, self._search_from = self._text[:end], self._text[end:], 0
        return text


class Llama3Parser:
    """An answer that begins like a call is held back until its end, since only the whole tells whether it is one."""

    def __init__(self) -> None:
        self._text = ""
        self._is_content = False

    def feed(self, text: str) -> ParsedDelta:
        """Takes the next piece of text in."""
        if self._is_content:
            return ParsedDelta(text)
        self._text += text
        if _may_begin_call(self._text):
            return ParsedDelta()
        self._is_content = True
        text, self._text = self._text, ""
        return ParsedDelta(text)

    def finish(self) -> ParsedDelta:
        """The calls of the whole text, or the text."""
        text, self._text = self._text, ""
        calls = _llama3_calls(text.strip().removeprefix(PYTHON_TAG).strip())
        return ParsedDelta("", calls) if calls else ParsedDelta(text)


def _may_begin_call(text: str) -> bool:
    """Whether the text is the beginning of a call, as far as it goes."""
    text = text.lstrip()
    if PYTHON_TAG.startswith(text[: len(PYTHON_TAG)]):
        text = text[len(PYTHON_TAG) :].lstrip()
    key = text[1:].lstrip()
    return not text or (text[0] == "{" and any(known.startswith(key[: len(known)]) for known in FIRST_KEYS))


def _llama3_calls(text: str) -> tuple[ToolCallDelta, ...]:
    """Every value of `{...}; {...}` as a call; none where one of them is not."""
    decoder, calls = json.JSONDecoder(), list[ToolCallDelta]()
    while text:
        try:
            _, end = decoder.raw_decode(text)
        except (ValueError, RecursionError):
            return ()
        call = _call(len(calls), text[:end])
        rest = text[end:].lstrip()
        if call is None or (rest and rest[0] != ";"):
            return ()
        calls.append(call)
        text = rest[1:].lstrip()
    return tuple(calls)
