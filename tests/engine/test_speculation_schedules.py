"""Speculation under attack: whatever comes, goes, ends or runs short in the middle of a round, tokens and blocks are right."""

import functools
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from quire.engine import LLM, SamplingParams
from quire.engine.request import EngineCoreRequest
from tests.engine.draft_engines import assert_same, engine, greedy, without_drafts
from tests.engine.engines import check_idle, generate, serve_schedule

RNG = np.random.default_rng(37)
SHARED = RNG.integers(3, 101, 40).tolist()
NUM_KINDS = 10
PROMPTS = [(SHARED if idx % 3 == 0 else []) + RNG.integers(3, 101, 1 + 9 * idx).tolist() for idx in range(NUM_KINDS)]
PROMPTS[4] = [17, 18, 19] * 12
KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0, "num_speculative_tokens": 2},
    {"temperature": 0.8, "top_k": 9, "repetition_penalty": 1.2},
    {"temperature": 0.0, "num_speculative_tokens": 0},
]
PARAMS = [
    SamplingParams(max_tokens=4 + 18 * (idx % 4), seed=idx, ignore_eos=True, detokenize=False, **KINDS[idx % 4])
    for idx in range(NUM_KINDS)
]
ENGINES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "roomy": ("good", 3, {}),
    "tight": ("good", 3, {"num_kv_blocks": 14}),
    "tight, of itself": ("itself", 8, {"num_kv_blocks": 14}),
    "of itself, windowed": ("itself", 4, {"target": "windowed"}),
    "tight, of itself, in small tiles": (
        "itself",
        3,
        {"num_kv_blocks": 44, "block_size": 5, "tile_size": 8, "max_num_batched_tokens": 4 + 16},
    ),
    "tight, several steps": ("ngram", 8, {"num_kv_blocks": 14, "decode_steps_per_dispatch": 3}),
}
REQUESTS = list(zip(PROMPTS, PARAMS, strict=True))


@functools.cache
def alone(target: str) -> list[list[int]]:
    """What each kind gives without speculation."""
    outputs = generate(engine(target=target, enable_prefix_caching=False), PROMPTS, without_drafts(PARAMS))
    return [output.outputs[0].token_ids for output in outputs]


def assert_all_are_as_alone(name: str, arrivals: list[tuple[int, int]], aborts: dict[int, int]) -> None:
    draft, num_drafts, changes = ENGINES[name]
    llm = engine(draft, num_drafts, **changes)
    before = llm.stats()
    aborts = {arrival: when for arrival, when in aborts.items() if arrival < len(arrivals)}
    found = serve_schedule(llm, REQUESTS, arrivals, aborts)
    check_idle(llm)
    for arrival, (_, kind) in enumerate(arrivals):
        expected = alone(changes.get("target", "llama"))[kind]
        if arrival in aborts:
            assert found[arrival] == expected[: len(found[arrival])]
        else:
            assert found[arrival] == expected
    after = llm.stats()
    drafted, accepted = (
        getattr(after, counter) - getattr(before, counter) for counter in ("num_draft_tokens", "num_accepted_tokens")
    )
    assert accepted <= drafted
    # Where a window has taken blocks away before the draft model read them, it drafts from what it has.
    if draft == "itself" and "target" not in changes:
        assert accepted == drafted, "the target's own drafts are what it samples, whatever its cache went through"


ARRIVALS = st.lists(st.tuples(st.integers(0, 30), st.integers(0, NUM_KINDS - 1)), min_size=1, max_size=14)
ABORTS = st.dictionaries(st.integers(0, 13), st.integers(0, 45), max_size=4)


@pytest.mark.parametrize("name", ENGINES)
@settings(max_examples=12)
@given(arrivals=ARRIVALS, aborts=ABORTS)
@example(arrivals=[(0, 3), (0, 7), (0, 3), (0, 7), (2, 6), (9, 2)], aborts={})
@example(arrivals=[(0, 3), (1, 3), (2, 6), (3, 9), (4, 7), (5, 6)], aborts={0: 9, 2: 11})
def test_tokens_do_not_depend_on_who_else_comes_and_goes(
    name: str, arrivals: list[tuple[int, int]], aborts: dict[int, int]
) -> None:
    assert_all_are_as_alone(name, arrivals, aborts)


@pytest.mark.slow
@pytest.mark.parametrize("name", ENGINES)
@settings(max_examples=400)
@given(arrivals=ARRIVALS, aborts=ABORTS)
def test_tokens_do_not_depend_on_who_else_comes_and_goes_for_long(
    name: str, arrivals: list[tuple[int, int]], aborts: dict[int, int]
) -> None:
    assert_all_are_as_alone(name, arrivals, aborts)


@pytest.mark.parametrize("name", [name for name in ENGINES if name.startswith("tight")])
def test_the_tight_engines_preempt_and_draft(name: str) -> None:
    """Guards the law above: its traffic is more than these engines hold, and they speculate all the same."""
    draft, num_drafts, changes = ENGINES[name]
    llm = engine(draft, num_drafts, **changes)
    before = llm.stats()
    kinds = [3, 7, 3, 7, 6, 2]
    found = serve_schedule(llm, REQUESTS, [(0, kind) for kind in kinds], {})
    after = llm.stats()
    assert after.num_preemptions > before.num_preemptions
    assert after.num_draft_rounds > before.num_draft_rounds
    assert list(found.values()) == [alone(changes.get("target", "llama"))[kind] for kind in kinds]


# ---- the ends of things

DRAFTERS = [
    ("good", 3, {}),
    ("itself", 8, {"num_kv_blocks": 14}),
    ("ngram", 8, {"num_kv_blocks": 14, "decode_steps_per_dispatch": 3}),
]
BY_DRAFTER = pytest.mark.parametrize("case", DRAFTERS, ids=lambda case: f"{case[0]}-{case[1]}")


def speculating(case: tuple[str, int, dict[str, Any]]) -> LLM:
    draft, num_drafts, changes = case
    return engine(draft, num_drafts, **changes)


def assert_as_without(
    case: tuple[str, int, dict[str, Any]], prompts: list[list[int]], params: list[SamplingParams]
) -> None:
    expected = generate(engine(enable_prefix_caching=False), prompts, without_drafts(params))
    assert_same(generate(speculating(case), prompts, params), expected)


@BY_DRAFTER
def test_a_stream_that_is_closed_in_a_round_leaves_nothing_behind(case: tuple[str, int, dict[str, Any]]) -> None:
    llm = speculating(case)
    for num_outputs in (1, 2, 3, 5, 9):
        stream = llm.stream([PROMPTS[idx] for idx in (5, 4, 3)], greedy(60))
        for _ in range(num_outputs):
            next(stream)
        stream.close()
        llm.core.step()
        check_idle(llm)
    assert_as_without(case, [PROMPTS[5], PROMPTS[4], PROMPTS[3]], [greedy(40)] * 3)


@BY_DRAFTER
def test_every_output_of_a_stream_goes_on_where_the_last_one_ended(case: tuple[str, int, dict[str, Any]]) -> None:
    expected = generate(engine(enable_prefix_caching=False), [PROMPTS[4]], [greedy(50)])[0].outputs[0].token_ids
    llm = speculating(case)
    seen: list[int] = []
    for output in llm.stream([PROMPTS[4]], greedy(50)):
        tokens = output.outputs[0].token_ids
        assert tokens[: len(seen)] == seen
        assert len(seen) < len(tokens) or output.finished
        seen = tokens
    assert seen == expected
    check_idle(llm)


@BY_DRAFTER
@pytest.mark.parametrize("prompt_len", [1, 139, *range(150, 160)])
def test_the_last_place_of_max_model_len_is_filled_and_none_beyond_it(
    case: tuple[str, int, dict[str, Any]], prompt_len: int
) -> None:
    """160 places: a round would reach beyond them, or there is no room for even one draft."""
    prompt = (PROMPTS[4] * 5)[:prompt_len]
    params = greedy(None)
    llm = speculating(case)
    output = generate(llm, [prompt], [params])[0].outputs[0]
    assert len(output.token_ids) == 160 - prompt_len
    assert output.finish_reason == "length"
    assert_as_without(case, [prompt] * 3, [params, greedy(1000), greedy(160 - prompt_len)])


@BY_DRAFTER
def test_fewer_tokens_than_a_round_brings(case: tuple[str, int, dict[str, Any]]) -> None:
    prompts = [PROMPTS[4], PROMPTS[0][:1], PROMPTS[5]]
    for max_tokens in range(1, 11):
        params = [greedy(max_tokens), greedy(max_tokens, temperature=1.0, seed=2), greedy(max_tokens, logprobs=2)]
        assert_as_without(case, prompts, params)


@BY_DRAFTER
def test_many_requests_on_few_slots(case: tuple[str, int, dict[str, Any]]) -> None:
    kinds = [idx % NUM_KINDS for idx in range(3 * NUM_KINDS)]
    params = [
        SamplingParams(temperature=idx % 2, seed=idx, max_tokens=1 + 7 * idx % 23, detokenize=False)
        for idx in range(len(kinds))
    ]
    assert_as_without(case, [PROMPTS[kind] for kind in kinds], params)


@BY_DRAFTER
def test_the_first_and_the_last_token_of_the_vocabulary_are_drafted_like_others(
    case: tuple[str, int, dict[str, Any]],
) -> None:
    edges = {"allowed_token_ids": [0, 100]}
    params = [greedy(40, **edges), greedy(40, temperature=1.0, seed=3, **edges), greedy(40, allowed_token_ids=[100])]
    assert_as_without(case, [[0], [100] * 9, [0, 100] * 20], params)


@BY_DRAFTER
@pytest.mark.parametrize("num_tokens", range(1, 9))
def test_a_stop_token_ends_a_round_where_it_stands(case: tuple[str, int, dict[str, Any]], num_tokens: int) -> None:
    """The n-th token of a text is made a stop token: the rest of its round is thrown away."""
    full = (
        generate(engine(enable_prefix_caching=False), [PROMPTS[5]], [greedy(20, temperature=1.0, seed=12)])[0]
        .outputs[0]
        .token_ids
    )
    stop = full[num_tokens - 1]
    output = generate(speculating(case), [PROMPTS[5]], [greedy(20, temperature=1.0, seed=12, stop_token_ids=[stop])])[
        0
    ].outputs[0]
    assert output.token_ids == full[: full.index(stop) + 1]
    assert (output.finish_reason, output.stop_reason) == ("stop", stop)


@pytest.mark.parametrize("draft", ["good", "ngram"])
def test_the_fewest_blocks_do(draft: str) -> None:
    """A cache of one request at full length, and no block for a draft beyond it."""
    case = (draft, 6, {"num_kv_blocks": 1 + 160 // 16, "block_size": 16})
    llm = speculating(case)
    assert llm.core.scheduler.kv_cache.pool.num_usable == 10
    prompts = [PROMPTS[5], PROMPTS[4], PROMPTS[3], [9]]
    assert_as_without(case, prompts, [greedy(None), greedy(100, temperature=0.9, seed=1), greedy(70), greedy(None)])
    assert llm.stats().num_preemptions > 0


@BY_DRAFTER
def test_aborts_in_every_step_of_a_round_free_what_was_kept_for_drafts(case: tuple[str, int, dict[str, Any]]) -> None:
    llm = speculating(case)
    core = llm.core
    for num_steps in range(8):
        names = [f"gone-{num_steps}-{idx}" for idx in range(3)]
        for name, prompt in zip(names, (PROMPTS[5], PROMPTS[4], PROMPTS[3]), strict=True):
            core.add_request(EngineCoreRequest(name, tuple(prompt), greedy(60, seed=1), time.monotonic()))
        for _ in range(num_steps):
            core.step()
        for name in names:
            assert core.abort_request(name)
            core.scheduler.check()
        while core.has_work:
            assert core.step() == []
        check_idle(llm)
