"""The laws of the engine: whatever the schedule, the tokens are those that a request gives when it runs alone."""

from dataclasses import replace

import numpy as np
import pytest

from quire.engine import RequestOutput, SamplingParams
from tests.engine.engines import XLA_KERNELS, check_idle, generate, tiny_engine, token_ids, windowed_engine

RNG = np.random.default_rng(11)


def _prompts() -> list[list[int]]:
    shared = RNG.integers(3, 101, 48).tolist()
    lengths = [1, 5, 31, 32, 33, 70, 100, 64]
    return [RNG.integers(3, 101, n).tolist() for n in lengths] + [shared + [7], shared + [8, 9], shared]


def _params(count: int) -> list[SamplingParams]:
    kinds = [
        {"temperature": 0.0},
        {"temperature": 0.9},
        {"temperature": 1.2, "top_k": 7, "top_p": 0.9},
        {"temperature": 0.0, "repetition_penalty": 1.4},
        {"temperature": 0.7, "min_p": 0.1, "presence_penalty": 0.5, "frequency_penalty": 0.3, "logit_bias": {5: 2.0}},
        {"temperature": 1.0, "min_tokens": 5, "stop_token_ids": [9, 10]},
    ]
    common = {"max_tokens": 24, "logprobs": 2, "detokenize": False, "ignore_eos": True}
    return [SamplingParams(**common, **kinds[idx % len(kinds)], seed=idx) for idx in range(count)]


PROMPTS = _prompts()
PARAMS = _params(len(PROMPTS))


@pytest.fixture(scope="module")
def alone() -> list[RequestOutput]:
    """Each request by itself, with nothing cached."""
    llm = tiny_engine(enable_prefix_caching=False)
    return [generate(llm, [prompt], [params])[0] for prompt, params in zip(PROMPTS, PARAMS, strict=True)]


def assert_same(found: list[RequestOutput], expected: list[RequestOutput]) -> None:
    """Equal tokens and ends; logprobs to 1e-4, since sums over differently shaped batches round differently."""
    assert token_ids(found) == token_ids(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.outputs[0].finish_reason == other.outputs[0].finish_reason
        for mine, theirs in zip(one.outputs[0].logprobs, other.outputs[0].logprobs, strict=True):
            assert mine.keys() == theirs.keys()
            values = [[entry[token].logprob for token in mine] for entry in (mine, theirs)]
            np.testing.assert_allclose(*values, atol=1e-4)


def test_outputs_are_worth_comparing(alone: list[RequestOutput]) -> None:
    """Guards the other laws: the tiny model does not merely repeat one token."""
    assert len({tuple(output.outputs[0].token_ids) for output in alone}) == len(alone)
    assert np.mean([len(set(output.outputs[0].token_ids)) for output in alone]) > 5


def test_batched_equals_alone(alone: list[RequestOutput]) -> None:
    assert_same(generate(tiny_engine(enable_prefix_caching=False), PROMPTS, PARAMS), alone)


def test_a_cached_prefix_equals_a_cold_one(alone: list[RequestOutput]) -> None:
    llm = tiny_engine()
    llm.core.scheduler.kv_cache.forget_prefixes()
    assert_same(generate(llm, PROMPTS, PARAMS), alone)
    warm = generate(llm, PROMPTS, PARAMS)
    assert_same(warm, alone)
    assert sum(output.num_cached_tokens for output in warm) > 200


@pytest.mark.parametrize(
    ("law", "settings"),
    [
        ("chunked prefill equals whole prefill", {"max_num_batched_tokens": 4 + 32}),
        ("small tiles equal large ones", {"tile_size": 8, "max_num_batched_tokens": 4 + 16}),
        ("synchronous scheduling equals asynchronous", {"async_scheduling": False}),
        ("several steps per dispatch equal one", {"decode_steps_per_dispatch": 3}),
        ("separate rectangles equal mixed ones", {"mixed_batches": False}),
        ("scanned layers equal unrolled ones", {"scan_layers": True}),
        ("scanned layers and scanned steps equal unrolled ones", {"scan_layers": True, "decode_steps_per_dispatch": 2}),
        ("one row equals many", {"max_num_seqs": 1}),
        ("an odd block size equals an even one", {"block_size": 5}),
        ("static batching equals continuous", {"batching": "static"}),
        ("windowed batching equals continuous", {"batching": "windowed", "batching_window": 0.01}),
        ("kernels of XLA equal native ones", {"kernels": XLA_KERNELS}),
        ("chunks by kernels of XLA equal the whole", {"kernels": XLA_KERNELS, "max_num_batched_tokens": 4 + 32}),
    ],
    ids=lambda value: value.replace(" ", "_") if isinstance(value, str) else "",
)
def test_tokens_do_not_depend_on_the_schedule(law: str, settings: dict, alone: list[RequestOutput]) -> None:
    assert_same(generate(tiny_engine(**settings), PROMPTS, PARAMS), alone)


@pytest.mark.parametrize("settings", [{"dtype": "bfloat16"}, {"dtype": "bfloat16", "quantization": "int8"}])
def test_with_native_kernels_tokens_do_not_depend_on_the_schedule_in_any_dtype(settings: dict) -> None:
    """Where a sum could round differently with the batch, bfloat16 would soon give another token. Batched = alone, chunked = whole."""
    llm = tiny_engine(enable_prefix_caching=False, **settings)
    if llm.core.plan.ops.fused_layer is None:
        pytest.skip("no native kernels here")
    alone = token_ids([generate(llm, [prompt], [params])[0] for prompt, params in zip(PROMPTS, PARAMS, strict=True)])
    assert token_ids(generate(llm, PROMPTS, PARAMS)) == alone
    narrow = tiny_engine(max_num_seqs=1, max_num_batched_tokens=1 + 16, tile_size=16, **settings)
    assert token_ids(generate(narrow, PROMPTS, PARAMS)) == alone


# Longer than what admission keeps free for running requests, or nobody would ever be preempted.
LONG = [replace(params, max_tokens=59) for params in PARAMS]


@pytest.fixture(scope="module")
def long_alone() -> list[RequestOutput]:
    return generate(tiny_engine(enable_prefix_caching=False), PROMPTS, LONG)


@pytest.mark.parametrize("settings", [{}, {"async_scheduling": False}, {"decode_steps_per_dispatch": 3}])
def test_preempted_requests_give_the_same_tokens(settings: dict, long_alone: list[RequestOutput]) -> None:
    llm = tiny_engine(num_kv_blocks=14, **settings)
    before = llm.stats().num_preemptions
    outputs = generate(llm, PROMPTS, LONG)
    assert llm.stats().num_preemptions > before, "the cache is meant to be too small"
    assert_same(outputs, long_alone)


def test_prompt_logprobs_do_not_depend_on_chunks_or_preemption() -> None:
    params = [SamplingParams(temperature=0.0, max_tokens=59, prompt_logprobs=1, detokenize=False, ignore_eos=True)] * 4
    prompts = [PROMPTS[5], PROMPTS[6], PROMPTS[7], PROMPTS[4]]
    expected = [generate(tiny_engine(), [p], [q])[0] for p, q in zip(prompts, params, strict=True)]
    chunked = generate(tiny_engine(max_num_batched_tokens=4 + 32), prompts, params)
    tight = tiny_engine(num_kv_blocks=14)
    before = tight.stats().num_preemptions
    preempted = generate(tight, prompts, params)
    assert tight.stats().num_preemptions > before
    for found in (chunked, preempted):
        for one, other, prompt in zip(found, expected, prompts, strict=True):
            assert one.prompt_logprobs[0] is None
            assert len(one.prompt_logprobs) == len(prompt) == len(other.prompt_logprobs)
            for mine, theirs, token_id in zip(
                one.prompt_logprobs[1:], other.prompt_logprobs[1:], prompt[1:], strict=True
            ):
                assert mine.keys() == theirs.keys()
                assert abs(mine[token_id].logprob - theirs[token_id].logprob) < 1e-4


def test_choices_of_one_prompt_differ_and_compute_it_once() -> None:
    llm = tiny_engine()
    llm.core.scheduler.kv_cache.forget_prefixes()
    before = llm.stats().num_real_tokens
    prompt = RNG.integers(3, 101, 96).tolist()
    params = SamplingParams(n=4, temperature=1.0, seed=1, max_tokens=8, detokenize=False, ignore_eos=True)
    output = generate(llm, [prompt], [params])[0]
    assert [choice.index for choice in output.outputs] == [0, 1, 2, 3]
    assert len({tuple(choice.token_ids) for choice in output.outputs}) == 4
    # The prompt once, the rest of its last block for each of the others, and the outputs.
    assert llm.stats().num_real_tokens - before <= 96 + 3 * 16 + 4 * 8


def test_closing_a_stream_early_frees_every_block() -> None:
    llm = tiny_engine()
    params = SamplingParams(temperature=0.0, max_tokens=50, detokenize=False, ignore_eos=True)
    stream = llm.stream(PROMPTS, params)
    for _ in range(5):
        next(stream)
    stream.close()
    llm.core.step()
    check_idle(llm)
    assert_same_tokens_after_abort(llm, params)


def assert_same_tokens_after_abort(llm, params: SamplingParams) -> None:
    """What an aborted step wrote late harms nobody."""
    prompts = [PROMPTS[6], PROMPTS[5]]
    fresh = [generate(tiny_engine(enable_prefix_caching=False), [prompt], [params])[0] for prompt in prompts]
    assert token_ids(generate(llm, prompts, [params] * 2)) == token_ids(fresh)


def test_lengths_are_clipped_to_max_model_len() -> None:
    llm = tiny_engine()
    prompt = RNG.integers(3, 101, 150).tolist()
    params = SamplingParams(temperature=0.0, max_tokens=100, detokenize=False, ignore_eos=True)
    output = generate(llm, [prompt], [params])[0].outputs[0]
    assert len(output.token_ids) == 10
    assert output.finish_reason == "length"
    unlimited = SamplingParams(temperature=0.0, max_tokens=None, detokenize=False, ignore_eos=True)
    assert generate(llm, [prompt], [unlimited])[0].outputs[0].token_ids == output.token_ids


def test_blocks_before_the_window_are_freed_and_change_nothing() -> None:
    llm = windowed_engine()
    assert llm.core.config.sliding_window == 20
    cold = windowed_engine(enable_prefix_caching=False)
    expected = [generate(cold, [p], [q])[0] for p, q in zip(PROMPTS, PARAMS, strict=True)]
    assert_same(generate(llm, PROMPTS, PARAMS), expected)
    warm = generate(llm, PROMPTS, PARAMS)
    assert_same(warm, expected)
    assert sum(output.num_cached_tokens for output in warm) > 0
    held = []
    params = SamplingParams(temperature=0.0, max_tokens=100, detokenize=False, ignore_eos=True)
    for _ in llm.stream([PROMPTS[3]], params):
        held.append(llm.core.scheduler.kv_cache.pool.num_used)
    check_idle(llm)
    # The window, the block it begins in, and the block that is being filled.
    assert max(held[10:]) <= 20 // 8 + 2
