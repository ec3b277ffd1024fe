"""Speculation cannot change the output: whatever drafts, and however many tokens, a request gives what it gives without."""

import dataclasses
import functools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.engine import LLM, RequestOutput, SamplingParams
from tests.engine.draft_engines import (
    DRAFTS,
    QuickBackend,
    assert_same,
    checkpoint,
    draft_config,
    engine,
    greedy,
    without_drafts,
)
from tests.engine.engines import XLA_KERNELS, generate

RNG = np.random.default_rng(29)
SHARED = RNG.integers(3, 101, 40).tolist()
KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0, "seed": 1},
    {"temperature": 1.5, "seed": 2, "top_k": 9, "top_p": 0.9, "logprobs": 3},
    {"temperature": 0.0, "repetition_penalty": 1.4, "logprobs": 0},
    {"temperature": 0.7, "seed": 3, "min_p": 0.1, "presence_penalty": 0.5, "frequency_penalty": 0.3},
    {"temperature": 1.0, "seed": 4, "min_tokens": 5, "stop_token_ids": list(range(3, 40))},
    {"temperature": 0.0, "stop_token_ids": list(range(50, 60)), "max_tokens": 60},
    {"temperature": 0.9, "seed": 5, "n": 3, "logprobs": 1, "max_tokens": 11},
    {"temperature": 0.8, "seed": 6, "allowed_token_ids": [4, 5, 6], "max_tokens": 30},
    {"temperature": 0.0, "logit_bias": {5: 3.0, 9: -50.0}, "prompt_logprobs": 2},
    {"temperature": 0.3, "seed": 7, "num_speculative_tokens": 1},
    {"temperature": 0.0, "num_speculative_tokens": 0, "logprobs": 2},
    {"temperature": 0.1, "seed": 8, "max_tokens": 1},
    {"temperature": 0.0, "max_tokens": 2},
    {"temperature": 0.0, "max_tokens": None},
]
PARAMS = [
    SamplingParams(**{"max_tokens": 17 + idx, "ignore_eos": True, "detokenize": False, **kind})
    for idx, kind in enumerate(KINDS)
]
LENGTHS = (1, 5, 31, 32, 33, 70, 2, 9, 40, 20, 64, 3, 8, 100, 130)
PROMPTS = [(SHARED if idx % 3 == 1 else []) + RNG.integers(3, 101, LENGTHS[idx]).tolist() for idx in range(len(PARAMS))]
PROMPTS[0], PROMPTS[3] = [7], [11, 12, 13, 14] * 9

FAST: list[tuple[str, int, dict[str, Any]]] = [
    ("good", 3, {}),
    ("bad", 4, {"max_num_batched_tokens": 4 + 32, "async_scheduling": False}),
    ("itself", 8, {"enable_prefix_caching": False}),
    ("other family", 2, {"mixed_batches": False}),
    ("ngram", 8, {"decode_steps_per_dispatch": 3}),
    ("good", 3, {"kernels": XLA_KERNELS, "scan_layers": True}),
    ("good", 6, {"tile_size": 8, "block_size": 5, "max_num_batched_tokens": 4 + 16}),
    ("good", 4, {"adaptive": True}),
    ("good", 3, {"target": "windowed"}),
]
MORE: list[tuple[str, int, dict[str, Any]]] = [
    ("good", 1, {"async_scheduling": False}),
    ("ngram", 2, {"kernels": XLA_KERNELS, "mixed_batches": False}),
    ("good", 5, {"kernels": XLA_KERNELS, "scan_layers": True, "decode_steps_per_dispatch": 3}),
    ("other family", 7, {"max_num_seqs": 1}),
    ("other family", 3, {"target": "windowed"}),
    ("ngram", 3, {"target": "windowed"}),
    ("good", 2, {"target": "windowed_and_full"}),
]
EVERY_SETTING: list[dict[str, Any]] = [
    {},
    {"adaptive": True},
    {"async_scheduling": False},
    {"decode_steps_per_dispatch": 3},
    {"mixed_batches": False},
    {"max_num_batched_tokens": 4 + 32},
    {"tile_size": 8, "block_size": 5},
    {"enable_prefix_caching": False},
    {"max_num_seqs": 1},
    {"kernels": XLA_KERNELS},
    {"kernels": XLA_KERNELS, "scan_layers": True, "decode_steps_per_dispatch": 2},
    {"target": "windowed"},
    {"target": "windowed", "kernels": XLA_KERNELS, "scan_layers": True},
    {"target": "windowed_and_full"},
]
EVERYTHING = [
    (draft, 1 + (3 * idx + jdx) % 8, changes)
    for idx, draft in enumerate(DRAFTS)
    for jdx, changes in enumerate(EVERY_SETTING)
]


def name_of(case: Any) -> str:
    """What pytest calls a case."""
    if isinstance(case, dict):
        words = (f"{key}_{'xla' if key == 'kernels' else value}" for key, value in case.items())
        return "-".join(words) or "plain"
    return str(case).replace(" ", "_")


@functools.cache
def expected_of(target: str) -> list[RequestOutput]:
    """What the target gives by itself."""
    return generate(engine(target=target, enable_prefix_caching=False), PROMPTS, without_drafts(PARAMS))


def assert_speculation_changes_nothing(draft: str, num_drafts: int, changes: dict[str, Any]) -> None:
    llm = engine(draft, num_drafts, **changes)
    before = llm.stats()
    for _ in range(2):  # the second time what is cached of the prompts is used
        outputs = generate(llm, PROMPTS, PARAMS)
        assert_same(outputs, expected_of(changes.get("target", "llama")))
    after = llm.stats()
    assert after.num_draft_rounds > before.num_draft_rounds, "nothing was drafted"
    if draft != "bad":
        assert after.num_accepted_tokens > before.num_accepted_tokens, "nothing was accepted"
    assert after.num_accepted_tokens < after.num_draft_tokens or draft == "itself", "nothing was rejected"


def test_outputs_are_worth_comparing() -> None:
    """Guards the other laws: the outputs differ, end in every way, and do not merely repeat one token."""
    choices = [choice for output in expected_of("llama") for choice in output.outputs]
    assert len({tuple(choice.token_ids) for choice in choices}) == len(choices)
    assert np.mean([len(set(choice.token_ids)) for choice in choices]) > 5
    assert {choice.finish_reason for choice in choices} == {"stop", "length"}


@pytest.mark.parametrize(("draft", "num_drafts", "changes"), FAST, ids=name_of)
def test_tokens_with_speculation_are_those_without(draft: str, num_drafts: int, changes: dict[str, Any]) -> None:
    assert_speculation_changes_nothing(draft, num_drafts, changes)


@pytest.mark.slow
@pytest.mark.parametrize(("draft", "num_drafts", "changes"), [*MORE, *EVERYTHING], ids=name_of)
def test_tokens_with_speculation_are_those_without_in_every_setting(
    draft: str, num_drafts: int, changes: dict[str, Any]
) -> None:
    assert_speculation_changes_nothing(draft, num_drafts, changes)


LONG = [dataclasses.replace(params, max_tokens=59) for params in PARAMS[:8]]
LONG_PROMPTS = [PROMPTS[idx] for idx in (1, 5, 7, 3, 4, 9, 6, 10)]


@functools.cache
def long_expected() -> list[RequestOutput]:
    return generate(engine(enable_prefix_caching=False), LONG_PROMPTS, without_drafts(LONG))


@pytest.mark.parametrize(
    ("draft", "num_drafts", "changes"),
    [
        ("good", 3, {}),
        ("ngram", 8, {"decode_steps_per_dispatch": 3}),
        pytest.param("good", 1, {"async_scheduling": False}, marks=pytest.mark.slow),
        pytest.param("itself", 8, {"decode_steps_per_dispatch": 2}, marks=pytest.mark.slow),
        pytest.param("bad", 5, {"enable_prefix_caching": False}, marks=pytest.mark.slow),
        pytest.param("good", 4, {"adaptive": True, "mixed_batches": False}, marks=pytest.mark.slow),
    ],
    ids=name_of,
)
def test_preempted_requests_give_the_same_tokens(draft: str, num_drafts: int, changes: dict[str, Any]) -> None:
    llm = engine(draft, num_drafts, num_kv_blocks=14, **changes)
    before = llm.stats()
    assert_same(generate(llm, LONG_PROMPTS, LONG), long_expected())
    after = llm.stats()
    assert after.num_preemptions > before.num_preemptions, "the cache is meant to be too small"
    assert after.num_draft_rounds > before.num_draft_rounds


def test_penalties_and_truncation_together_ban_no_token_that_is_allowed() -> None:
    """XLA computes the penalized logits of one step more than once, in kernels that round differently."""
    params = [
        SamplingParams(
            temperature=temperature,
            top_k=1,
            frequency_penalty=penalty,
            allowed_token_ids=[1],
            seed=0,
            max_tokens=24,
            detokenize=False,
        )
        for temperature in (0.3, 1.0)
        for penalty in (0.6, 0.1, -0.7)
    ]
    for outputs in (
        generate(engine("good", 3, kernels=XLA_KERNELS, scan_layers=True), [[0]] * len(params), params),
        generate(engine("good", 3), [[0]] * len(params), params),
    ):
        assert [output.outputs[0].token_ids for output in outputs] == [[1] * 24] * len(params)


# ---- random requests, in engines of every kind


@st.composite
def sampling_params(draw: st.DrawFn) -> SamplingParams:
    """Anything that a request may ask for without a tokenizer."""
    some_tokens = st.lists(st.integers(0, 100), min_size=1, max_size=12, unique=True)
    temperature = draw(st.sampled_from([0.0, 0.0, 0.3, 0.8, 1.0, 1.5]))
    max_tokens = draw(st.integers(1, 30))
    allowed = draw(st.none() | some_tokens)
    return SamplingParams(
        temperature=temperature,
        seed=draw(st.integers(0, 3)),
        n=draw(st.sampled_from([1, 1, 2])) if temperature else 1,
        top_k=draw(st.sampled_from([0, 0, 1, 5, 40])),
        top_p=draw(st.sampled_from([1.0, 1.0, 0.9, 0.5])),
        min_p=draw(st.sampled_from([0.0, 0.0, 0.1])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.0, 1.3, 0.7])),
        presence_penalty=draw(st.sampled_from([0.0, 0.0, 1.0, -0.5])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.0, 0.6, -0.3])),
        logit_bias=draw(
            st.none() | st.dictionaries(st.integers(0, 100), st.sampled_from([-100.0, -2.0, 4.0]), max_size=4)
        ),
        allowed_token_ids=allowed,
        stop_token_ids=draw(st.just([]) | some_tokens),
        max_tokens=max_tokens,
        min_tokens=draw(st.integers(0, max_tokens)) if allowed is None else 0,
        ignore_eos=draw(st.booleans()),
        logprobs=draw(st.sampled_from([None, None, 0, 3, 20])),
        prompt_logprobs=draw(st.sampled_from([None, None, None, 1])),
        num_speculative_tokens=draw(st.sampled_from([None, None, None, 0, 1, 2])),
        detokenize=False,
    )


PROMPT = st.lists(st.integers(0, 100), min_size=1, max_size=90) | st.tuples(
    st.lists(st.integers(0, 100), min_size=1, max_size=4), st.integers(2, 20)
).map(lambda part: part[0] * part[1])
REQUESTS = st.lists(st.tuples(PROMPT, sampling_params()), min_size=1, max_size=6)
# Those that the laws above have made already, the tight ones among them.
ENGINES: list[tuple[str, int, dict[str, Any]]] = [
    ("good", 3, {}),
    ("good", 3, {"num_kv_blocks": 14}),
    ("ngram", 8, {"num_kv_blocks": 14, "decode_steps_per_dispatch": 3}),
    ("itself", 8, {"enable_prefix_caching": False}),
    ("other family", 2, {"mixed_batches": False}),
    ("good", 4, {"adaptive": True}),
    ("good", 3, {"target": "windowed"}),
]


def assert_requests_are_unchanged(
    case: tuple[str, int, dict[str, Any]], requests: list[tuple[list[int], SamplingParams]]
) -> None:
    draft, num_drafts, changes = case
    prompts, params = [prompt for prompt, _ in requests], [params for _, params in requests]
    # Of the same kernels: where a penalty makes two tokens equal, it is rounding that decides between them.
    kernels = {name: changes[name] for name in ("target", "kernels", "scan_layers") if name in changes}
    plain = engine(**{"target": "llama", **kernels}, enable_prefix_caching=False)
    expected = generate(plain, prompts, without_drafts(params))
    assert_same(generate(engine(draft, num_drafts, **changes), prompts, params), expected)


@settings(max_examples=40)
@given(case=st.sampled_from(ENGINES), requests=REQUESTS)
def test_no_request_can_tell_that_there_is_speculation(
    case: tuple[str, int, dict[str, Any]], requests: list[tuple[list[int], SamplingParams]]
) -> None:
    assert_requests_are_unchanged(case, requests)


@pytest.mark.slow
@settings(max_examples=1500)
@given(case=st.sampled_from([*ENGINES, *FAST, *MORE]), requests=REQUESTS)
def test_no_request_can_tell_that_there_is_speculation_of_any_kind(
    case: tuple[str, int, dict[str, Any]], requests: list[tuple[list[int], SamplingParams]]
) -> None:
    assert_requests_are_unchanged(case, requests)


# ---- texts: the bundled pair


@functools.cache
def demo_engine(speculative_config: str | None, **changes: Any) -> LLM:
    return LLM(
        "demo",
        backend=QuickBackend(),
        speculative_config=speculative_config,
        **{"max_num_seqs": 4, "max_model_len": 256, "dtype": "float32", **changes},
    )


STORY = "Once upon a time there was a little girl. She"
TEXTS: list[dict[str, Any]] = [
    {"temperature": 0.0, "max_tokens": 40},
    {"temperature": 1.0, "seed": 3, "max_tokens": 40, "stop": ["the", "and"]},
    {"temperature": 0.8, "seed": 5, "max_tokens": 40, "stop": [" a", ".\n"], "include_stop_str_in_output": True},
    {"temperature": 0.0, "max_tokens": 40, "bad_words": ["the", " was", " and"]},
    {"temperature": 0.7, "seed": 8, "max_tokens": 90, "n": 2, "logprobs": 2},
    {"temperature": 0.9, "seed": 9, "max_tokens": 60, "stop": ["e"], "min_tokens": 9},
]


@pytest.mark.parametrize(
    "config",
    [
        '{"method": "draft_model", "model": "demo-draft", "num_speculative_tokens": 4, "adaptive": false}',
        '{"method": "ngram", "num_speculative_tokens": 5, "adaptive": false, "prompt_lookup_min": 1}',
    ],
    ids=["demo-draft", "ngram"],
)
def test_texts_with_speculation_are_those_without(config: str) -> None:
    """Stop strings within a round, bad words, and the end of a text, by models that know what they say."""
    params = [SamplingParams(**kind) for kind in TEXTS]
    expected = demo_engine(None).generate([STORY] * len(params), params, use_tqdm=False)
    llm = demo_engine(config)
    before = llm.stats()
    found = llm.generate([STORY] * len(params), params, use_tqdm=False)
    assert_same(found, expected)
    assert {choice.finish_reason for output in found for choice in output.outputs} == {"stop", "length"}
    after = llm.stats()
    assert after.num_accepted_tokens > before.num_accepted_tokens
    assert_counted(found, before, after)


# ---- what is counted


def assert_counted(outputs: list[RequestOutput], before: Any, after: Any) -> None:
    """What the outputs say of drafts is what the engine counted, and each position is accepted no more often than the one before it."""
    for name in ("num_draft_rounds", "num_draft_tokens", "num_accepted_tokens"):
        assert sum(getattr(output.metrics, name) for output in outputs) == getattr(after, name) - getattr(before, name)
    positions = len(after.num_accepted_per_pos)
    per_pos = np.subtract(after.num_accepted_per_pos, before.num_accepted_per_pos)
    counted = [
        np.pad(o.metrics.num_accepted_per_pos, (0, positions - len(o.metrics.num_accepted_per_pos))) for o in outputs
    ]
    np.testing.assert_array_equal(np.sum(counted, axis=0), per_pos)
    assert per_pos.sum() == after.num_accepted_tokens - before.num_accepted_tokens
    for counts in (per_pos, *counted):
        assert (np.diff(counts) <= 0).all()


@pytest.mark.parametrize("draft", ["good", "ngram"])
def test_outputs_and_engine_count_alike(draft: str) -> None:
    llm = engine("good", 3) if draft == "good" else engine("ngram", 8, decode_steps_per_dispatch=3)
    before = llm.stats()
    outputs = generate(llm, PROMPTS, PARAMS)
    after = llm.stats()
    assert_counted(outputs, before, after)
    for output, params in zip(outputs, PARAMS, strict=True):
        assert output.metrics is not None
        if params.num_speculative_tokens is not None:
            assert output.metrics.num_draft_tokens <= params.num_speculative_tokens * output.metrics.num_draft_rounds


@pytest.mark.parametrize("max_tokens", range(1, 24))
def test_tokens_are_a_round_each_and_the_accepted_drafts(max_tokens: int) -> None:
    """One token comes of the prompt, and the last one of a step without drafts where it is all that is missing."""
    output = generate(engine("good", 3), [PROMPTS[1]], [greedy(max_tokens, temperature=0.9, seed=4)])[0]
    metrics = output.metrics
    assert metrics is not None
    plain = max_tokens - 1 - metrics.num_draft_rounds - metrics.num_accepted_tokens
    assert plain in (0, 1)
    assert metrics.num_draft_tokens <= 3 * metrics.num_draft_rounds


def test_the_target_accepts_every_draft_of_its_own() -> None:
    llm = engine("itself", 8, enable_prefix_caching=False)
    before = llm.stats()
    generate(llm, PROMPTS, PARAMS)
    after = llm.stats()
    drafted = after.num_draft_tokens - before.num_draft_tokens
    assert drafted > 100
    assert after.num_accepted_tokens - before.num_accepted_tokens == drafted


def test_more_drafts_than_a_request_wants_are_not_made() -> None:
    llm = engine("good", 3)
    for wanted, most in ((0, 0), (1, 1), (2, 2), (50, 3), (None, 3)):
        metrics = generate(llm, [PROMPTS[5]], [greedy(31, num_speculative_tokens=wanted)])[0].metrics
        assert metrics is not None
        assert bool(metrics.num_draft_rounds) == (most > 0)
        assert len(metrics.num_accepted_per_pos) == most
        assert metrics.num_draft_tokens <= most * metrics.num_draft_rounds


def test_the_draft_of_a_target_is_read_from_its_own_folder() -> None:
    """Guards the laws above: the drafts are as good as their names say."""
    accepted = {}
    for draft in ("itself", "good", "bad"):
        llm = LLM(
            str(checkpoint()),
            tokenizer="demo",
            backend=QuickBackend(),
            speculative_config=draft_config(draft, 2),
            max_num_seqs=1,
            max_model_len=160,
            dtype="float32",
        )
        metrics = generate(llm, [PROMPTS[5]], [greedy(80, temperature=1.0, seed=1)])[0].metrics
        assert metrics is not None
        accepted[draft] = metrics.num_accepted_tokens / metrics.num_draft_tokens
    assert accepted["itself"] == 1 > accepted["good"] > 2 * accepted["bad"]
