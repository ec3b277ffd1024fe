"""`quire serve` with speculation: the flag, the same answers, and what it exports."""

import json

import pytest

from quire.server.cli import EXIT_USAGE, main
from tests.server.conftest import Server, start_server

CONFIG = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1, "adaptive": False}
REQUEST = {"model": "demo", "prompt": "def add(a, b):\n    return a + b\n\ndef add(", "max_tokens": 40}
COUNTERS = {
    "drafts": "vllm:spec_decode_num_drafts_total",
    "drafted": "vllm:spec_decode_num_draft_tokens_total",
    "accepted": "vllm:spec_decode_num_accepted_tokens_total",
}
PER_POSITION = 'vllm:spec_decode_num_accepted_tokens_per_pos_total{position="%d"}'


@pytest.fixture(scope="module")
def speculating():
    with start_server("--speculative-config", json.dumps(CONFIG), "--sampling", "full") as started:
        yield started


@pytest.mark.parametrize("changes", [{"temperature": 0}, {"temperature": 1, "seed": 4, "top_p": 0.9, "logprobs": 2}])
def test_answers_are_those_of_a_server_without(speculating: Server, server: Server, changes: dict) -> None:
    answers = []
    for asked in (speculating, server):
        status, answer = asked.post("/v1/completions", {**REQUEST, **changes})
        assert status == 200, answer
        answers.append(answer["choices"][0])
    for choice in answers:
        (choice.get("logprobs") or {}).pop("top_logprobs", None)
    for one, other in zip(*((c.pop("logprobs") or {}).get("token_logprobs", []) for c in answers), strict=True):
        assert one == pytest.approx(other, abs=1e-4)
    assert answers[0] == answers[1]


def test_what_comes_of_drafts_is_exported_under_the_names_that_dashboards_know(speculating: Server) -> None:
    before = speculating.metrics()
    assert speculating.post("/v1/completions", {**REQUEST, "temperature": 0})[0] == 200
    speculating.wait_idle()
    after = speculating.metrics()
    grown = {name: after[metric] - before.get(metric, 0) for name, metric in COUNTERS.items()}
    assert 0 < grown["drafts"] <= grown["drafted"] <= 3 * grown["drafts"]
    assert 0 < grown["accepted"] <= grown["drafted"]
    per_pos = [after[PER_POSITION % idx] - before.get(PER_POSITION % idx, 0) for idx in range(3)]
    assert sum(per_pos) == grown["accepted"]
    assert per_pos == sorted(per_pos, reverse=True)
    assert PER_POSITION % 3 not in after
    assert 0 <= after["vllm:spec_decode_num_speculative_tokens"] <= 3
    assert after["vllm:recompilations_after_warmup_total"] == 0


def test_without_speculation_the_same_names_are_zero(server: Server) -> None:
    metrics = server.metrics()
    assert [metrics[name] for name in COUNTERS.values()] == [0, 0, 0]
    assert metrics["vllm:spec_decode_num_speculative_tokens"] == 0


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ("ngram", "speculative_config is a JSON object"),
        ('{"method": "medusa"}', "method='medusa' is not one of draft_model, ngram"),
        ('{"method": "ngram", "num_speculative_tokens": 99}', "from 1 to 16, not 99"),
        ('{"model": "/no/such/draft"}', "/no/such/draft"),
    ],
)
def test_a_wrong_flag_is_refused_with_what_is_allowed(config: str, reason: str, capsys) -> None:
    assert main(["generate", "demo", "-p", "x", "--speculative-config", config]) == EXIT_USAGE
    assert reason in capsys.readouterr().err
