"""The official client against a real server: every endpoint, whole and streamed, and the law that served = offline."""

from __future__ import annotations

import openai
import pytest

from quire.engine import SamplingParams
from tests.engine.engines import demo_engine
from tests.server.conftest import ADMIN_KEY, Server

PROMPTS = ["def fibonacci(n):", "import os\n", "class Stack:\n    def push(self, item):"]
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "def add(a, b):"}]


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)


def offline(prompts: list, **params: object) -> list[list[str]]:
    """What the engine in this process makes of the same prompts."""
    outputs = demo_engine().generate(prompts, SamplingParams(**params), use_tqdm=False)
    return [[choice.text for choice in output.outputs] for output in outputs]


def chat_prompt(messages: list[dict], **kwargs: object) -> dict:
    tokenizer = demo_engine().tokenizer
    return {"prompt_token_ids": tokenizer.apply_chat_template(messages, **kwargs)}


# ---- completions


def test_completions_are_those_of_the_offline_engine(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="demo", prompt=PROMPTS, max_tokens=24, temperature=0)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert [[choice.text] for choice in answer.choices] == offline(PROMPTS, max_tokens=24, temperature=0)
    assert answer.usage.completion_tokens == 72
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 72


def test_seeded_choices_are_those_of_the_offline_engine(client: openai.OpenAI) -> None:
    params = {"max_tokens": 16, "temperature": 0.9, "seed": 11, "n": 3, "top_p": 0.9}
    answer = client.completions.create(model="demo", prompt=PROMPTS[:2], **params)
    expected = [text for texts in offline(PROMPTS[:2], **params) for text in texts]
    assert [choice.text for choice in answer.choices] == expected
    assert [choice.index for choice in answer.choices] == list(range(6))


def test_stream_adds_up_to_the_whole(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="demo", prompt=PROMPTS, max_tokens=20, temperature=0)
    stream = client.completions.create(
        model="demo",
        prompt=PROMPTS,
        max_tokens=20,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    )
    texts, reasons, usages = {}, {}, []
    for chunk in stream:
        usages.append(chunk.usage)
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    assert texts == {choice.index: choice.text for choice in whole.choices}
    assert reasons == dict.fromkeys(range(3), "length")
    assert usages[-1].completion_tokens == whole.usage.completion_tokens
    counts = [usage.completion_tokens for usage in usages]
    assert counts == sorted(counts)


def test_token_ids_are_prompts_and_come_back(client: openai.OpenAI) -> None:
    ids = demo_engine().tokenizer.encode(PROMPTS[0])
    answer = client.completions.create(
        model="demo", prompt=[ids, ids[:3]], max_tokens=5, temperature=0, extra_body={"return_token_ids": True}
    )
    assert [[choice.text] for choice in answer.choices] == offline([ids, ids[:3]], max_tokens=5, temperature=0)
    assert answer.choices[0].prompt_token_ids == ids
    assert demo_engine().tokenizer.decode(answer.choices[0].token_ids) == answer.choices[0].text
    one = client.completions.create(model="demo", prompt=ids, max_tokens=5, temperature=0)
    assert one.choices[0].text == answer.choices[0].text


def test_lm_evaluation_harness_finds_what_it_reads(client: openai.OpenAI) -> None:
    """Its requests for scoring: token ids, echo, logprobs; greedy is decided by equality with the largest of top_logprobs."""
    tokenizer = demo_engine().tokenizer
    greedy = demo_engine().generate(PROMPTS[0], SamplingParams(temperature=0, max_tokens=6), use_tqdm=False)[0]
    likely = [*greedy.prompt_token_ids, *greedy.outputs[0].token_ids]
    unlikely = [*greedy.prompt_token_ids, *tokenizer.encode("zzz qqq")]
    answer = client.completions.create(
        model="demo",
        prompt=[likely, unlikely],
        echo=True,
        logprobs=1,
        max_tokens=1,
        seed=1234,
        temperature=0,
    )
    verdicts = []
    for choice, ids in zip(answer.choices, [likely, unlikely], strict=True):
        begin = len(greedy.prompt_token_ids)
        numbers, tops = choice.logprobs.token_logprobs[begin:-1], choice.logprobs.top_logprobs[begin:-1]
        assert len(choice.logprobs.token_logprobs) == len(ids) + 1
        assert choice.logprobs.token_logprobs[0] is None
        assert all(number <= 0 for number in numbers)
        verdicts.append(all(number == max(top.values()) for number, top in zip(numbers, tops, strict=True)))
        assert "".join(choice.logprobs.tokens) == choice.text
        offsets = choice.logprobs.text_offset
        assert [choice.text[offset:].startswith(t) for offset, t in zip(offsets, choice.logprobs.tokens, strict=True)]
    assert verdicts == [True, False]


def test_prompt_alone_is_scored_with_no_tokens_asked_for(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="demo", prompt=PROMPTS[0], max_tokens=0, echo=True, logprobs=2)
    choice = answer.choices[0]
    assert choice.text == PROMPTS[0]
    assert len(choice.logprobs.tokens) == answer.usage.prompt_tokens
    assert answer.usage.completion_tokens == 0


def test_echo_streams_the_prompt_first(client: openai.OpenAI) -> None:
    stream = client.completions.create(
        model="demo", prompt=PROMPTS[0], max_tokens=4, temperature=0, echo=True, stream=True
    )
    text = "".join(choice.text for chunk in stream for choice in chunk.choices)
    assert text == PROMPTS[0] + offline([PROMPTS[0]], max_tokens=4, temperature=0)[0][0]


def test_streamed_logprobs_are_those_of_the_whole(client: openai.OpenAI) -> None:
    arguments = {"model": "demo", "prompt": PROMPTS[0], "max_tokens": 8, "temperature": 0, "logprobs": 3}
    whole = client.completions.create(**arguments).choices[0].logprobs
    chunks = [c.choices[0].logprobs for c in client.completions.create(**arguments, stream=True) if c.choices]
    assert [t for chunk in chunks for t in chunk.tokens] == whole.tokens
    assert [o for chunk in chunks for o in chunk.text_offset] == whole.text_offset
    assert [n for chunk in chunks for n in chunk.token_logprobs] == pytest.approx(whole.token_logprobs, abs=1e-4)


def test_stop_strings_end_the_text_before_them(client: openai.OpenAI) -> None:
    whole = offline([PROMPTS[0]], max_tokens=30, temperature=0)[0][0]
    stop = whole[10:14]
    choice = client.completions.create(
        model="demo", prompt=PROMPTS[0], max_tokens=30, temperature=0, stop=[stop]
    ).choices[0]
    assert choice.text == whole[: whole.index(stop)]
    assert choice.finish_reason == "stop"
    assert choice.stop_reason == stop


def test_extras_of_vllm_are_honoured(client: openai.OpenAI) -> None:
    extra = {
        "top_k": 5,
        "min_p": 0.05,
        "repetition_penalty": 1.2,
        "ignore_eos": True,
        "min_tokens": 3,
        "bad_words": ["self"],
    }
    answer = client.completions.create(
        model="demo",
        prompt=PROMPTS[2],
        max_tokens=20,
        temperature=0.8,
        seed=5,
        extra_body={**extra, "prompt_logprobs": 1},
    )
    expected = offline([PROMPTS[2]], max_tokens=20, temperature=0.8, seed=5, **extra)
    assert [answer.choices[0].text] == expected[0]
    entries = answer.choices[0].prompt_logprobs
    assert entries[0] is None
    assert len(entries) == answer.usage.prompt_tokens


def test_usage_never_counts_what_is_not_shown(client: openai.OpenAI) -> None:
    stream = client.completions.create(
        model="demo",
        prompt=PROMPTS,
        max_tokens=0,
        echo=True,
        stream=True,
        extra_body={"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    )
    chunks = list(stream)
    assert {chunk.usage.completion_tokens for chunk in chunks} == {0}
    assert {choice.finish_reason for chunk in chunks for choice in chunk.choices} == {"length"}


def test_salted_prompts_share_nothing_with_others(client: openai.OpenAI) -> None:
    def cached(salt: str | None) -> int:
        extra = {} if salt is None else {"cache_salt": salt}
        answer = client.completions.create(
            model="demo", prompt=list(range(100, 180)), max_tokens=1, temperature=0, extra_body=extra
        )
        return answer.usage.prompt_tokens_details.cached_tokens

    assert [cached(salt) for salt in (None, "a", "b")] == [0, 0, 0]
    assert all(cached(salt) > 0 for salt in (None, "a", "b"))


def test_priority_is_taken_where_the_policy_knows_it(client: openai.OpenAI, server: Server) -> None:
    headers = {"Authorization": f"Bearer {ADMIN_KEY}"}
    server.post("/admin/scheduler", {"scheduling_policy": "priority"}, **headers)
    try:
        answer = client.completions.create(
            model="demo", prompt=PROMPTS[0], max_tokens=4, temperature=0, extra_body={"priority": 3}
        )
    finally:
        server.post("/admin/scheduler", {"scheduling_policy": "fcfs"}, **headers)
    assert [[answer.choices[0].text]] == offline(PROMPTS[:1], max_tokens=4, temperature=0)


# ---- chat


def test_chat_is_the_completion_of_its_template(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="demo", messages=MESSAGES, max_tokens=16, temperature=0)
    assert [answer.choices[0].message.content] == offline([chat_prompt(MESSAGES)], max_tokens=16, temperature=0)[0]
    assert answer.choices[0].message.role == "assistant"


def test_chat_streams_add_up_to_the_whole(client: openai.OpenAI) -> None:
    arguments = {"model": "demo", "messages": MESSAGES, "max_tokens": 16, "temperature": 0.7, "seed": 3, "n": 2}
    whole = client.chat.completions.create(**arguments)
    texts, roles, usage = {}, set(), None
    for chunk in client.chat.completions.create(**arguments, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
            roles.add((choice.index, choice.delta.role))
    assert texts == {choice.index: choice.message.content for choice in whole.choices}
    assert {(0, "assistant"), (1, "assistant")} <= roles
    assert usage.completion_tokens == whole.usage.completion_tokens


def test_stream_helper_of_the_client_works(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model="demo", messages=MESSAGES, max_tokens=8, temperature=0) as stream:
        text = "".join(event.delta for event in stream if event.type == "content.delta")
    assert [text] == offline([chat_prompt(MESSAGES)], max_tokens=8, temperature=0)[0]


def test_chat_logprobs_name_the_tokens_and_their_rivals(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="demo", messages=MESSAGES, max_tokens=6, temperature=0, logprobs=True, top_logprobs=4
    )
    content = answer.choices[0].logprobs.content
    assert "".join(entry.token for entry in content) == answer.choices[0].message.content
    for entry in content:
        assert len(entry.top_logprobs) == 4
        assert entry.logprob == max(top.logprob for top in entry.top_logprobs)
        assert bytes(entry.bytes).decode() == entry.token


def test_chat_brings_token_ids_and_prompt_logprobs_whole_and_streamed(client: openai.OpenAI) -> None:
    arguments = {"model": "demo", "messages": MESSAGES, "max_tokens": 4, "temperature": 0}
    extra = {"return_token_ids": True, "prompt_logprobs": 1}
    whole = client.chat.completions.create(**arguments, extra_body=extra)
    assert whole.prompt_token_ids == chat_prompt(MESSAGES)["prompt_token_ids"]
    assert demo_engine().tokenizer.decode(whole.choices[0].token_ids) == whole.choices[0].message.content
    assert whole.prompt_logprobs[0] is None
    assert len(whole.prompt_logprobs) == whole.usage.prompt_tokens
    chunks = list(client.chat.completions.create(**arguments, stream=True, extra_body=extra))
    assert chunks[0].prompt_token_ids == whole.prompt_token_ids
    assert chunks[0].prompt_logprobs[1].keys() == whole.prompt_logprobs[1].keys()
    assert len(chunks[0].prompt_logprobs) == len(whole.prompt_logprobs)
    streamed = [token for chunk in chunks for choice in chunk.choices for token in choice.token_ids or ()]
    assert streamed == whole.choices[0].token_ids


def test_final_message_is_continued(client: openai.OpenAI) -> None:
    messages = [*MESSAGES, {"role": "assistant", "content": "def add(a, b):\n    return"}]
    answer = client.chat.completions.create(
        model="demo",
        messages=messages,
        max_tokens=5,
        temperature=0,
        extra_body={"continue_final_message": True, "add_generation_prompt": False},
    )
    prompt = chat_prompt(messages, add_generation_prompt=False, continue_final_message=True)
    assert [answer.choices[0].message.content] == offline([prompt], max_tokens=5, temperature=0)[0]


def test_content_parts_are_text(client: openai.OpenAI) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "def add(a, b):"}]}]
    plain = [{"role": "user", "content": "def add(a, b):"}]
    texts = [
        client.chat.completions.create(model="demo", messages=m, max_tokens=5, temperature=0).choices[0].message.content
        for m in (parts, plain)
    ]
    assert texts[0] == texts[1]


# ---- the rest


def test_models_are_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").max_model_len == 512
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt-4")
    assert caught.value.code == "model_not_found"


def test_tokens_go_there_and_back(server: Server) -> None:
    _, found = server.post("/tokenize", {"prompt": PROMPTS[0], "return_token_strs": True})
    assert found["tokens"] == demo_engine().tokenizer.encode(PROMPTS[0])
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
    assert server.post("/detokenize", {"tokens": found["tokens"]})[1] == {"prompt": PROMPTS[0]}
    _, chat = server.post("/tokenize", {"messages": MESSAGES})
    assert chat["tokens"] == chat_prompt(MESSAGES)["prompt_token_ids"]


@pytest.mark.parametrize(
    ("change", "parameter"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"suffix": "end"}, "suffix"),
        ({"best_of": 4}, "best_of"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"guided_json": {"type": "object"}}, "guided_json"),
        ({"temprature": 1}, "temprature"),
        ({"logprobs": 21}, "logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"logit_bias": {"99999": 1}}, "logit_bias"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [[1], "a"]}, "prompt"),
        ({"prompt": [4096]}, "prompt"),
        ({"prompt": "x " * 600}, "prompt"),
        ({"priority": 3}, "priority"),
        ({"stop": [1]}, "stop"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(client: openai.OpenAI, change: dict, parameter: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.post("/completions", body={"model": "demo", "prompt": "x", **change}, cast_to=object)
    assert caught.value.param == parameter
    assert caught.value.type == "invalid_request_error"


@pytest.mark.parametrize(
    ("change", "parameter"),
    [
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format"),
        ({"tool_choice": "required", "tools": [{"type": "function", "function": {"name": "f"}}]}, "tool_choice"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 50}, "top_logprobs"),
        ({"chat_template": "{{ messages }}"}, "chat_template"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"echo": True}, "echo"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs"),
    ],
)
def test_what_chat_cannot_honour_is_refused_by_name(client: openai.OpenAI, change: dict, parameter: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.post("/chat/completions", body={"model": "demo", "messages": MESSAGES, **change}, cast_to=object)
    assert caught.value.param == parameter


def test_neutral_and_null_values_pass(client: openai.OpenAI) -> None:
    body = {
        "model": "demo",
        "prompt": "x",
        "max_tokens": 1,
        "suffix": None,
        "best_of": 1,
        "response_format": {"type": "text"},
        "user": "me",
        "stop": None,
        "logit_bias": None,
        "stream": None,
        "use_beam_search": False,
    }
    answer = client.post("/completions", body=body, cast_to=object)
    assert answer["usage"]["completion_tokens"] == 1
