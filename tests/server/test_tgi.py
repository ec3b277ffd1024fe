"""TGI's endpoints over HTTP: its client, its rules for sampling, its streams and its errors."""

from __future__ import annotations

import json
import urllib.request

import huggingface_hub
import pytest
from huggingface_hub import InferenceClient

PROMPT = "def fibonacci(n):\n"


def ask(server, **parameters):
    """The answer of /generate, which must be 200."""
    status, answer = server.post("/generate", {"inputs": PROMPT, "parameters": parameters})
    assert status == 200, answer
    return answer


def stream(server, path="/generate_stream", inputs=PROMPT, **body):
    """The events of a stream."""
    request = urllib.request.Request(
        server.url + path,
        data=json.dumps({"inputs": inputs, **body}).encode(),
        headers={"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = response.read().decode().split("\n\n")
    return [json.loads(line.removeprefix("data:")) for line in lines if line]


def refusal(server, path="/generate", inputs=PROMPT, **parameters):
    """The error of a request that must be refused as invalid."""
    status, answer = server.post(path, {"inputs": inputs, "parameters": parameters})
    assert status == 422, answer
    assert answer["error_type"] == "validation"
    return answer["error"]


def test_hugging_face_client_reads_the_answer_and_the_stream(server, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)  # it would refuse even this server
    client = InferenceClient(model=server.url + "/generate")
    text = client.text_generation(PROMPT, max_new_tokens=12)
    assert text == ask(server, max_new_tokens=12)["generated_text"]
    whole = client.text_generation(PROMPT, max_new_tokens=12, details=True, decoder_input_details=True, top_n_tokens=2)
    assert whole.generated_text == text
    assert whole.details.generated_tokens == len(whole.details.tokens) == len(whole.details.top_tokens) == 12
    assert "".join(token.text for token in whole.details.prefill) == PROMPT
    events = list(client.text_generation(PROMPT, max_new_tokens=12, details=True, stream=True))
    assert "".join(event.token.text for event in events) == events[-1].generated_text == text
    assert [event.token.id for event in events] == [token.id for token in whole.details.tokens]
    assert events[-1].details.input_length == len(whole.details.prefill)
    assert list(client.text_generation(PROMPT, max_new_tokens=12, stream=True)) == [e.token.text for e in events]


def test_stream_in_the_body_is_the_same_as_generate_stream(server):
    parameters = {"max_new_tokens": 6}
    events = stream(server, parameters=parameters)
    assert events == stream(server, "/generate", parameters=parameters, stream=True)
    assert [event["index"] for event in events] == [1, 2, 3, 4, 5, 6]
    assert [event["generated_text"] is None for event in events] == [True] * 5 + [False]
    assert [event["details"] is None for event in events] == [True] * 5 + [False]
    assert all(event["token"]["logprob"] <= 0 for event in events)


def test_token_texts_of_a_stream_make_up_the_text_where_characters_take_several_tokens(server):
    body = {"parameters": {"max_new_tokens": 60, "temperature": 50.0, "seed": 3, "return_full_text": True}}
    events = stream(server, inputs="# Zürich ☃ ", **body)
    shown = "".join(event["token"]["text"] for event in events if not event["token"]["special"])
    assert "# Zürich ☃ " + shown == events[-1]["generated_text"]


def test_greedy_unless_a_parameter_would_change_the_distribution(server):
    greedy = ask(server, max_new_tokens=16, details=True)
    assert greedy["details"]["seed"] is None
    for neutral in ({"do_sample": False, "temperature": 1.0}, {"top_p": 1.0}, {"top_k": 0}, {"seed": 7}):
        assert ask(server, max_new_tokens=16, details=True, **neutral) == greedy
    for sampled in ({"do_sample": True}, {"temperature": 5.0}, {"top_k": 50}, {"top_p": 0.99}):
        details = ask(server, max_new_tokens=16, details=True, **sampled)["details"]
        again = ask(server, max_new_tokens=16, details=True, seed=details["seed"], **sampled)["details"]
        assert again == details
    assert ask(server, max_new_tokens=16, do_sample=True, temperature=20.0, seed=1) != greedy["generated_text"]


def test_penalties_change_the_answer(server):
    plain = ask(server, max_new_tokens=48)
    assert ask(server, max_new_tokens=48, repetition_penalty=2.0) != plain
    assert ask(server, max_new_tokens=48, frequency_penalty=2.0) != plain


def test_truncate_keeps_the_last_tokens_and_full_text_the_whole_prompt(server):
    prefill = ask(server, max_new_tokens=1, decoder_input_details=True)["details"]["prefill"]
    assert prefill[0]["logprob"] is None
    cut = ask(server, max_new_tokens=1, decoder_input_details=True, truncate=3, return_full_text=True)
    assert [token["id"] for token in cut["details"]["prefill"]] == [token["id"] for token in prefill[-3:]]
    assert cut["generated_text"] == PROMPT + cut["details"]["tokens"][0]["text"]
    assert ask(server, max_new_tokens=1, truncate=10_000) == ask(server, max_new_tokens=1)


def test_finish_reason_says_what_ended_the_text(server):
    text = ask(server, max_new_tokens=40)["generated_text"]
    assert ask(server, max_new_tokens=40, details=True)["details"]["finish_reason"] == "length"
    stop = text[len(text) // 2 :][:4]
    stopped = ask(server, max_new_tokens=40, stop=[stop], details=True)
    assert stopped["details"]["finish_reason"] == "stop_sequence"
    assert stopped["generated_text"] == text[: text.index(stop) + len(stop)]
    events = stream(server, parameters={"max_new_tokens": 40, "stop": [stop]})
    assert events[-1]["generated_text"] == stopped["generated_text"]
    assert "".join(event["token"]["text"] for event in events) == stopped["generated_text"]


def test_top_tokens_are_the_likeliest_in_order(server):
    details = ask(server, max_new_tokens=5, details=True, top_n_tokens=3)["details"]
    for token, top in zip(details["tokens"], details["top_tokens"], strict=True):
        logprobs = [found["logprob"] for found in top]
        assert len(top) == 3
        assert logprobs == sorted(logprobs, reverse=True)
        assert top[0] == token  # greedy


def test_default_is_as_many_tokens_as_fit_up_to_a_hundred(server):
    assert ask(server, details=True)["details"]["generated_tokens"] <= 100
    longest = server.get("/info")[1]
    most = json.loads(longest)["max_total_tokens"]
    prompt = "x = 1\n" * most
    status, answer = server.post(
        "/generate", {"inputs": prompt, "parameters": {"truncate": most - 2, "details": True, "stop": []}}
    )
    assert status == 200
    assert answer["details"]["generated_tokens"] <= 2


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("best_of", 2),
        ("typical_p", 0.9),
        ("watermark", True),
        ("adapter_id", "x"),
        ("grammar", {"type": "json", "value": {}}),
        ("temperature", -1.0),
        ("top_p", 1.5),
        ("repetition_penalty", 0.0),
        ("frequency_penalty", 3.0),
        ("max_new_tokens", 0),
        ("max_new_tokens", 512),
        ("truncate", 0),
        ("seed", 2**64),
        ("stop", "text"),
        ("top_n_tokens", 21),
        ("details", 1),
        ("unknown", 1),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(server, name, value):
    assert name in refusal(server, **{name: value, "details": True} if name == "top_n_tokens" else {name: value})


def test_neutral_values_of_what_is_refused_pass(server):
    neutral = {"best_of": 1, "typical_p": None, "watermark": False, "adapter_id": None, "grammar": None}
    assert ask(server, max_new_tokens=2, **neutral) == ask(server, max_new_tokens=2)


def test_invalid_requests_are_refused_in_tgis_shape(server):
    assert "decoder_input_details" in refusal(server, "/generate_stream", decoder_input_details=True)
    assert "empty" in refusal(server, inputs="")
    assert "inputs" in refusal(server, inputs="x" * 20_000)
    status, answer = server.post("/generate", b"{")
    assert (status, answer["error_type"]) == (422, "validation")


def test_info_describes_the_model(server):
    status, body = server.get("/info")
    info = json.loads(body)
    assert status == 200
    assert info["model_id"] == json.loads(server.get("/v1/models")[1])["data"][0]["id"]
    assert (info["max_total_tokens"], info["max_input_tokens"], info["model_dtype"]) == (512, 511, "float32")
