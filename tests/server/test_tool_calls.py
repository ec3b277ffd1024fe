"""Tool calls in a model's text: whatever the pieces, the same calls and the same content, and nothing lost."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.server.tool_calls import CLOSE, OPEN, PYTHON_TAG, make_tool_parser

WEATHER = '{"name": "weather", "arguments": {"city": "Zürich", "days": 3}}'
TIME = '{"name": "time", "arguments": {}}'


def parse(name, pieces):
    """Content, and (name, arguments) of each call, of a text that comes in pieces."""
    parser = make_tool_parser(name, None)
    parts = [parser.feed(piece) for piece in pieces] + [parser.finish()]
    calls, ids = [], []
    for part in parts:
        for call in part.calls:
            if call.id is not None:
                assert call.index == len(calls)
                assert re.fullmatch("call_[0-9a-f]{24}", call.id)
                ids.append(call.id)
                calls.append([call.name, ""])
            calls[call.index][1] += call.arguments
    assert len(set(ids)) == len(ids)
    return "".join(part.content for part in parts), [tuple(call) for call in calls]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
arguments = st.dictionaries(st.text() | st.sampled_from([OPEN, CLOSE, PYTHON_TAG]), json_values, max_size=3)
fragments = st.sampled_from(
    [
        OPEN,
        CLOSE,
        PYTHON_TAG,
        WEATHER,
        TIME,
        "{",
        "}",
        '"',
        "\\",
        ";",
        "<tool",
        "\n",
        " ",
        '{"name"',
        "text",
        "é",
        "[" * 50,
    ]
)
texts = st.lists(fragments | st.text(max_size=5), max_size=12).map("".join)


@st.composite
def cut(draw, whole):
    """A text, and the same in pieces."""
    text = draw(whole)
    places = sorted(draw(st.lists(st.integers(0, len(text)), max_size=8)))
    return text, [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


@pytest.mark.parametrize("name", ["hermes", "llama3"])
@given(data=st.data())
def test_pieces_give_what_the_whole_gives(name, data):
    text, pieces = data.draw(cut(texts))
    assert parse(name, pieces) == parse(name, [text]) == parse(name, list(text))


@pytest.mark.parametrize("name", ["hermes", "llama3"])
@given(text=texts)
def test_every_character_is_content_or_part_of_a_call(name, text):
    content, calls = parse(name, [text])
    left = text
    for _, written in calls:
        assert written in left
        left = left.replace(written, "", 1)
    solid = "".join(content.split())
    assert len(solid) <= len("".join(left.split()))
    if not calls:
        assert content == text


@pytest.mark.parametrize("name", ["hermes", "llama3"])
@given(text=st.text().filter(lambda text: OPEN not in text and not text.lstrip().startswith(("{", "<|python_tag|>"))))
def test_text_without_marks_passes_unchanged(name, text):
    assert parse(name, [text]) == (text, [])
    assert parse(name, list(text)) == (text, [])


@given(made=st.lists(st.tuples(st.text(min_size=1), arguments), min_size=1, max_size=3), data=st.data())
def test_hermes_calls_come_back_as_they_were_written(made, data):
    bodies = [json.dumps({"name": name, "arguments": found}) for name, found in made]
    text = "I look.\n" + "\n".join(f"{OPEN}\n{body}\n{CLOSE}" for body in bodies)
    content, calls = parse("hermes", data.draw(cut(st.just(text)))[1])
    assert content == "I look."
    assert [(name, json.loads(written)) for name, written in calls] == made


@given(made=st.lists(st.tuples(st.text(min_size=1), arguments), min_size=1, max_size=3), data=st.data())
def test_llama3_calls_come_back_as_they_were_written(made, data):
    text = "; ".join(json.dumps({"name": name, "parameters": found}) for name, found in made)
    text = data.draw(st.sampled_from(["", "\n\n", PYTHON_TAG])) + text
    content, calls = parse("llama3", data.draw(cut(st.just(text)))[1])
    assert content == ""
    assert [(name, json.loads(written)) for name, written in calls] == made


@pytest.mark.parametrize(
    "body",
    [
        "",
        "{",
        '{"name": "f"}',
        '{"name": 3, "arguments": {}}',
        '{"name": "f", "arguments": [1]}',
        '{"name": "f", "arguments": {"a": NaN}}',
        '{"name": "\\ud800", "arguments": {}}',
        '{"name": "f", "arguments": {"a": }}',
        '{"name": "f, "arguments": {}}',
        '[{"name": "f", "arguments": {}}]',
        "[" * 100_000,
        '{"name": "f", "arguments": ' + '{"a": ' * 100_000,
    ],
    ids=lambda body: body[:30],
)
def test_a_malformed_call_is_content_and_the_next_one_a_call(body):
    malformed = OPEN + body + CLOSE
    assert parse("hermes", [malformed]) == (malformed, [])
    content, calls = parse("hermes", [f"{malformed}{OPEN}{TIME}{CLOSE}"])
    assert (content, calls) == (malformed, [("time", "{}")])
    assert parse("llama3", [body]) == (body, [])


def test_hermes_calls_keep_the_text_before_between_and_after():
    text = f"Before.\n\n{OPEN}\n{WEATHER}\n{CLOSE}\n{OPEN}{TIME}{CLOSE}\nAfter.\n"
    content, calls = parse("hermes", [text])
    assert content == "Before.\nAfter.\n"
    assert calls == [("weather", '{"city": "Zürich", "days": 3}'), ("time", "{}")]


def test_a_call_without_its_closing_mark_counts_when_its_json_is_whole():
    assert parse("hermes", [f"{OPEN}\n{TIME}"]) == ("", [("time", "{}")])
    assert parse("hermes", [f"{OPEN}\n{TIME[:-1]}"]) == (f"{OPEN}\n{TIME[:-1]}", [])


def test_numbers_and_escapes_of_arguments_are_not_rewritten():
    written = '{"big": 123456789012345678901234567890, "exact": 1.10, "far": 1e999, "sign": "\\u00e9\\n"}'
    assert parse("hermes", [f'{OPEN}{{"name": "f", "arguments": {written}}}{CLOSE}']) == ("", [("f", written)])


def test_llama3_takes_what_its_model_writes_around_a_call():
    assert parse("llama3", ['{"type": "function", "name": "f", "parameters": {"a": 1}}']) == ("", [("f", '{"a": 1}')])
    assert parse("llama3", [f'{PYTHON_TAG}{{"name": "f", "arguments": {{}}}}']) == ("", [("f", "{}")])
    followed = '{"name": "f", "parameters": {}} is what I would call'
    assert parse("llama3", [followed]) == (followed, [])


@pytest.mark.parametrize(("name", "text"), [("hermes", "a < b"), ("llama3", "a {"), ("llama3", '{"answer": 4')])
def test_what_can_be_no_call_is_not_held_back(name, text):
    assert make_tool_parser(name, None).feed(text).content == text


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("... within <tool_call></tool_call> XML tags ...", f"{OPEN}{TIME}{CLOSE}"),
        ("{{ '<|python_tag|>' + call }}", '{"name": "time", "parameters": {}}'),
        (
            'Respond in the format {"name": function name, "parameters": dictionary}.',
            '{"name": "time", "parameters": {}}',
        ),
    ],
)
def test_auto_finds_the_format_in_the_template(template, text):
    parser = make_tool_parser("auto", template)
    calls = parser.feed(text).calls + parser.finish().calls
    assert [call.name for call in calls] == ["time"]


@pytest.mark.parametrize(("name", "template"), [("none", OPEN), ("auto", None), ("auto", '"parameters": x')])
def test_there_is_no_parser_where_no_format_is_known(name, template):
    assert make_tool_parser(name, template) is None
