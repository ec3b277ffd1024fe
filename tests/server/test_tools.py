"""Tools through the whole server, with the official client: shown to the template, and read back from a model that calls them.

The bundled model calls nothing, so here the engine is made up: the application is the real one, the text is the test's.
"""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace

import openai
import pytest
from starlette.testclient import TestClient

from quire.engine.outputs import CompletionOutput, RequestOutput
from quire.server.app import make_app
from quire.server.metrics import ServerMetrics
from quire.server.output_stream import OutputStream
from quire.server.settings import ServerSettings
from quire.server.state import ServerState
from tests.engine.engines import demo_engine

TEMPLATES = {
    "hermes": "{% for tool in tools %}<tool_call>{{ tool | tojson }}{% endfor %}{% for m in messages %}{{ m.content }}{% endfor %}",
    "llama3": "<|python_tag|>{{ tools | tojson }}{% for m in messages %}{{ m.content }}{% endfor %}",
}
TEXTS = {
    "hermes": 'Let me look.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>',
    "llama3": '{"name": "weather", "parameters": {"city": "Zürich"}}; {"name": "time", "parameters": {}}',
}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}} for name in ("weather", "time")
]
MESSAGES = [{"role": "user", "content": "What is it like?"}]


class MadeUpEngine:
    """Says `text`, in pieces of three characters where it is streamed; keeps the prompts that it was given."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.tokenizer = demo_engine().tokenizer
        self.info = SimpleNamespace(max_model_len=2048, vocab_size=4096)
        self.scheduler_settings = None
        self.is_draining = False
        self.prompts: list[str] = []

    def check_serving(self) -> None:
        pass

    async def prepare(self, prompt, params, **_):
        self.prompts.append(self.tokenizer.decode(prompt, skip_special_tokens=False))
        return SimpleNamespace(request_id="r0", params=params, prompt_token_ids=tuple(prompt), choices=())

    def open(self, request) -> OutputStream:
        stream = OutputStream([request], lambda *_: None, None)
        self._speaking = asyncio.create_task(self._speak(stream, request))
        return stream

    async def _speak(self, stream: OutputStream, request) -> None:
        is_stream = request.params.output_kind.name == "DELTA"
        pieces = [self.text[i : i + 3] for i in range(0, len(self.text), 3)] if is_stream else [self.text]
        for position, piece in enumerate(pieces):
            is_last = position == len(pieces) - 1
            choice = CompletionOutput(0, piece, [5], finish_reason="stop" if is_last else None)
            stream.put(RequestOutput("r0", None, list(request.prompt_token_ids), [choice], is_last))
            await asyncio.sleep(0.001)


def client_of(engine: MadeUpEngine, template: str | None, parser: str = "auto") -> openai.OpenAI:
    settings = ServerSettings(access_log="none", tool_parser=parser)
    state = ServerState(settings, engine, ServerMetrics("vllm", "demo"), "demo", template)
    return openai.OpenAI(
        base_url="http://test/v1", api_key="none", max_retries=0, http_client=TestClient(make_app(state))
    )


@pytest.fixture(params=TEMPLATES)
def format_name(request: pytest.FixtureRequest) -> str:
    return request.param


def ask(client: openai.OpenAI, **more):
    return client.chat.completions.create(model="demo", messages=MESSAGES, **{"tools": TOOLS, **more})


def calls_of(message) -> list[tuple[str, dict]]:
    return [(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls or ()]


BOTH = [("weather", {"city": "Zürich"}), ("time", {})]


def test_tools_are_shown_to_the_template(format_name: str) -> None:
    engine = MadeUpEngine("nothing")
    ask(client_of(engine, TEMPLATES[format_name]))
    assert all(json.dumps(tool["function"]["name"]) in engine.prompts[0] for tool in TOOLS)
    assert engine.prompts[0].endswith(MESSAGES[0]["content"])


@pytest.mark.parametrize("choice", [{}, {"tool_choice": "auto"}])
def test_calls_are_read_back(format_name: str, choice: dict) -> None:
    answer = ask(client_of(MadeUpEngine(TEXTS[format_name]), TEMPLATES[format_name]), **choice).choices[0]
    assert answer.finish_reason == "tool_calls"
    assert calls_of(answer.message) == BOTH
    assert answer.message.content == ("Let me look." if format_name == "hermes" else None)
    assert len({call.id for call in answer.message.tool_calls}) == 2


def test_streamed_calls_add_up_to_the_whole(format_name: str) -> None:
    content, calls, reasons = "", {}, []
    for chunk in ask(client_of(MadeUpEngine(TEXTS[format_name]), TEMPLATES[format_name]), stream=True):
        for choice in chunk.choices:
            content += choice.delta.content or ""
            reasons += [choice.finish_reason] if choice.finish_reason else []
            for call in choice.delta.tool_calls or ():
                found = calls.setdefault(call.index, {"id": call.id, "name": call.function.name, "arguments": ""})
                found["arguments"] += call.function.arguments
    assert [(call["name"], json.loads(call["arguments"])) for call in calls.values()] == BOTH
    assert all(call["id"] for call in calls.values())
    assert reasons == ["tool_calls"]
    assert content == ("Let me look." if format_name == "hermes" else "")


def test_stream_helper_of_the_client_gathers_the_calls(format_name: str) -> None:
    client = client_of(MadeUpEngine(TEXTS[format_name]), TEMPLATES[format_name])
    with client.chat.completions.stream(model="demo", messages=MESSAGES, tools=TOOLS) as stream:
        message = stream.get_final_completion().choices[0].message
    assert calls_of(message) == BOTH


@pytest.mark.parametrize("more", [{"tool_choice": "none"}, {"tools": openai.omit}])
@pytest.mark.parametrize("is_stream", [False, True])
def test_text_stays_text_where_no_tool_may_be_called(format_name: str, more: dict, is_stream: bool) -> None:
    client = client_of(MadeUpEngine(TEXTS[format_name]), None, format_name)
    found = ask(client, stream=is_stream, **more)
    if is_stream:
        text = "".join(choice.delta.content or "" for chunk in found for choice in chunk.choices)
    else:
        assert found.choices[0].finish_reason == "stop"
        text = found.choices[0].message.content
    assert text == TEXTS[format_name]


def test_one_call_is_kept_where_no_parallel_ones_are_wanted(format_name: str) -> None:
    client = client_of(MadeUpEngine(TEXTS[format_name]), TEMPLATES[format_name])
    assert calls_of(ask(client, parallel_tool_calls=False).choices[0].message) == BOTH[:1]


def test_what_is_no_call_stays_content(format_name: str) -> None:
    client = client_of(MadeUpEngine('{"answer": 42} <tool_call>{"name": </tool_call>'), TEMPLATES[format_name])
    answer = ask(client).choices[0]
    assert answer.finish_reason == "stop"
    assert answer.message.content == '{"answer": 42} <tool_call>{"name": </tool_call>'
    assert not answer.message.tool_calls
