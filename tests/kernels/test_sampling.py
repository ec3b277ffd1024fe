"""The sampling op against a numpy oracle: what each parameter keeps, how often each token comes, and the laws.

What draws tokens is run for every implementation that the machine can run; what looks into the reference, for it alone.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from scipy import special, stats

from quire.kernels.sampling import Logprobs, SamplingMode, SamplingRows, compute_logprobs
from quire.kernels.sampling.logits import MASKED
from quire.kernels.sampling.reference import filter_logits
from tests.kernels.sampling_implementations import NAMES, compiled
from tests.kernels.sampling_oracle import Params, kept, pack, probabilities, processed_logits

# One chance in ten thousand per check; the draws are fixed, so a check that passes once always passes.
MIN_P_VALUE = 1e-4
VOCAB_SIZE = 37
FULL, RANDOM, GREEDY = SamplingMode.FULL, SamplingMode.RANDOM, SamplingMode.GREEDY

run_filter = jax.jit(filter_logits)
run_logprobs = jax.jit(compute_logprobs, static_argnames="k")
every_implementation = pytest.mark.parametrize("op", NAMES)


def draw(op: str, logits: np.ndarray, rows: SamplingRows | None, mode: SamplingMode = FULL) -> np.ndarray:
    return np.asarray(compiled(op)(jnp.asarray(logits, jnp.float32), rows, mode=mode, num_logprobs=0).token_ids)


def logprobs_of(op: str, logits: np.ndarray, token_ids: np.ndarray, k: int) -> Logprobs:
    """The logprobs of given tokens: `compute_logprobs`, or a greedy row that is allowed nothing else."""
    if op == "reference":
        return run_logprobs(logits, token_ids, k=k)
    params = [Params(temperature=0.0, allowed=(int(token_id),)) for token_id in token_ids]
    found = compiled(op)(logits, pack(params, logits.shape[1]), mode=FULL, num_logprobs=k)
    assert np.array_equal(found.token_ids, token_ids)
    return found.logprobs


def random_only(rows: SamplingRows) -> SamplingRows:
    return SamplingRows(rows.temperature, rows.key, rows.position)


def take_rows(rows: SamplingRows, idx: list[int]) -> SamplingRows:
    return jax.tree.map(lambda leaf: leaf[np.array(idx)], rows)


def some_logits(seed: int = 0, num_rows: int | None = None, vocab_size: int = VOCAB_SIZE) -> np.ndarray:
    shape = (vocab_size,) if num_rows is None else (num_rows, vocab_size)
    return np.random.default_rng(seed).normal(0, 2, shape).astype(np.float32)


def filtered(logits: np.ndarray, params: list[Params]) -> np.ndarray:
    """What the op draws from, [len(params), V]; always run with 16 rows, so that few programs are compiled."""
    idx = np.arange(16) % len(params)
    rows = pack([params[i] for i in idx], logits.shape[1])
    return np.asarray(run_filter(jnp.asarray(logits[idx], jnp.float32), rows))[: len(params)]


def kept_by_op(logits: np.ndarray, params: list[Params]) -> np.ndarray:
    return filtered(logits, params) > MASKED * 1e-3


EVERYTHING = Params(
    temperature=1.3,
    top_k=12,
    top_p=0.9,
    min_p=0.02,
    repetition_penalty=1.3,
    presence_penalty=0.4,
    frequency_penalty=0.3,
    prompt=(1, 2, 3, 3),
    output=(4, 5, 4, 6),
    logit_bias={7: 2.5, 30: -3.0, 4: 1.0},
    allowed=tuple(range(VOCAB_SIZE - 3)),
    min_tokens=6,
    stop_ids=(0, 9),
    bad_words=((11,), (4, 6, 12), (5, 13)),
)
CASES = {
    "nothing": Params(),
    "temperature": Params(temperature=0.6),
    "high temperature": Params(temperature=5.0),
    "top_k": Params(top_k=5),
    "top_k of 1": Params(top_k=1),
    "top_p": Params(top_p=0.7),
    "min_p": Params(min_p=0.1),
    "repetition_penalty": Params(repetition_penalty=1.8, prompt=(1, 2, 2, 3), output=(4, 5, 4)),
    "presence_penalty": Params(presence_penalty=1.5, prompt=(1, 2, 2, 3), output=(4, 5, 4)),
    "frequency_penalty": Params(frequency_penalty=0.8, prompt=(1, 2, 2, 3), output=(4, 5, 4)),
    "negative penalties": Params(presence_penalty=-1.0, frequency_penalty=-0.5, output=(4, 5, 4)),
    "logit_bias": Params(logit_bias={3: 4.0, 5: -100.0, VOCAB_SIZE - 1: 2.0}),
    "allowed": Params(allowed=(0, 2, 31, 32, VOCAB_SIZE - 1)),
    "min_tokens": Params(min_tokens=3, stop_ids=(1, 2), output=(8, 9)),
    "min_tokens reached": Params(min_tokens=2, stop_ids=(1, 2), output=(8, 9)),
    "bad_words": Params(bad_words=((3,), (8, 9, 4), (7, 9, 5)), output=(8, 9)),
    "truncations together": Params(temperature=2.0, top_k=20, top_p=0.8, min_p=0.01),
    "everything": EVERYTHING,
}


@every_implementation
@pytest.mark.parametrize(
    "truncation", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}], ids=lambda each: next(iter(each))
)
def test_the_likeliest_token_is_kept_whatever_the_penalties(op: str, truncation: dict[str, float]) -> None:
    """A compiler may compute penalized logits more than once, and need not round them alike each time."""
    params = [
        Params(
            temperature=0.3,
            allowed=(1,),
            output=(1,) * count,
            repetition_penalty=1.1,
            presence_penalty=0.3,
            frequency_penalty=penalty,
            **truncation,
        )
        for count in range(1, 24)
        for penalty in (0.6, 0.1, -0.7, 1.9, 0.333333)
    ]
    logits = some_logits(5, num_rows=len(params))
    assert (draw(op, logits, pack(params, VOCAB_SIZE)) == 1).all()


@every_implementation
@pytest.mark.parametrize("mode", SamplingMode)
@pytest.mark.parametrize("used", [(), (4,), (0, 3, 7, 17), tuple(range(18))], ids=len)
def test_used_rows_are_sampled_as_if_there_were_no_others(op: str, mode: SamplingMode, used: tuple[int, ...]) -> None:
    logits = some_logits(3, num_rows=len(CASES))
    rows = None if mode == GREEDY else pack(list(CASES.values()), VOCAB_SIZE)
    num_logprobs = 5 if mode == FULL else 0
    expected = compiled(op)(jnp.asarray(logits), rows, mode=mode, num_logprobs=num_logprobs)
    is_used = np.isin(np.arange(len(CASES)), used)
    logits[~is_used] = np.nan
    found = compiled(op)(jnp.asarray(logits), rows, mode=mode, num_logprobs=num_logprobs, is_used=jnp.asarray(is_used))
    for mine, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(mine[is_used], theirs[is_used])
    assert ((found.token_ids >= 0) & (found.token_ids < VOCAB_SIZE)).all(), "they are indices for somebody"


@pytest.mark.parametrize("name", CASES)
def test_each_parameter_keeps_what_the_oracle_keeps(name: str) -> None:
    logits = np.stack([some_logits(seed) for seed in range(8)])
    expected = np.stack([kept(row, CASES[name]) for row in logits])
    assert np.array_equal(kept_by_op(logits, [CASES[name]] * 8), expected)


@every_implementation
@pytest.mark.parametrize("name", CASES)
def test_tokens_come_as_often_as_the_oracle_says(name: str, op: str) -> None:
    num_draws = 4096
    logits = some_logits(3)
    # Half of the draws differ in seed and half in position.
    half = num_draws // 2
    params = [dataclasses.replace(CASES[name], seed=i if i < half else -1) for i in range(num_draws)]
    positions = [9] * half + list(range(half))
    tokens = draw(op, np.tile(logits, (num_draws, 1)), pack(params, VOCAB_SIZE, positions=positions))
    counts = np.bincount(tokens, minlength=VOCAB_SIZE)
    expected = probabilities(logits, CASES[name]) * num_draws
    assert not counts[expected == 0].any()
    # Tokens too rare for a chi-square are counted as one.
    rare = expected < 5
    pooled = np.append(counts[~rare], counts[rare].sum())
    pooled_expected = np.append(expected[~rare], expected[rare].sum())
    if (~rare).sum() > 1:
        used = pooled_expected > 0
        assert stats.chisquare(pooled[used], pooled_expected[used]).pvalue > MIN_P_VALUE


token = st.integers(0, VOCAB_SIZE - 1)
tokens_up_to = partial(st.lists, token)
any_params = st.builds(
    Params,
    temperature=st.floats(0.3, 4.0),
    seed=st.integers(),
    top_k=st.integers(-1, VOCAB_SIZE + 5),
    top_p=st.floats(0.05, 1.0),
    min_p=st.one_of(st.just(0.0), st.floats(0.001, 0.9)),
    repetition_penalty=st.floats(0.5, 2.0),
    presence_penalty=st.floats(-2, 2),
    frequency_penalty=st.floats(-2, 2),
    prompt=tokens_up_to(min_size=1, max_size=12).map(tuple),
    output=tokens_up_to(max_size=12).map(tuple),
    logit_bias=st.dictionaries(token, st.floats(-5, 5), max_size=4),
    allowed=st.one_of(st.none(), tokens_up_to(min_size=10, max_size=30, unique=True).map(tuple)),
    min_tokens=st.integers(0, 12),
    stop_ids=tokens_up_to(max_size=3, unique=True).map(tuple),
    bad_words=st.lists(tokens_up_to(min_size=1, max_size=4).map(tuple), max_size=3).map(tuple),
)


@hypothesis_settings(max_examples=40)
@given(st.lists(any_params, min_size=8, max_size=8), st.integers(0, 1000))
def test_any_mixture_of_parameters_keeps_what_the_oracle_keeps(params: list[Params], seed: int) -> None:
    logits = some_logits(seed, num_rows=8)
    found = kept_by_op(logits, params)
    for row in range(8):
        assume(np.isfinite(processed_logits(logits[row], params[row])).any())
        assert found[row].any()
        # A token within rounding of a boundary may fall on either side.
        assert not (found[row] & ~kept(logits[row], params[row], slack=1e-5)).any()
        assert not (kept(logits[row], params[row], slack=-1e-5) & ~found[row]).any()


@hypothesis_settings(max_examples=20)
@given(st.lists(any_params, min_size=8, max_size=8), st.integers(0, 1000))
def test_any_mixture_of_parameters_gives_the_logits_of_the_oracle(params: list[Params], seed: int) -> None:
    logits = some_logits(seed, num_rows=8)
    found = filtered(logits, params)
    for row, p in enumerate(params):
        stays = found[row] > MASKED * 1e-3
        expected = processed_logits(logits[row], p) / p.temperature
        np.testing.assert_allclose(found[row][stays], expected[stays], rtol=1e-5, atol=1e-5)


@every_implementation
@hypothesis_settings(max_examples=20)
@given(st.lists(any_params, min_size=8, max_size=8), st.integers(0, 1000))
def test_a_greedy_row_takes_the_largest_processed_logit(op: str, params: list[Params], seed: int) -> None:
    logits = some_logits(seed, num_rows=8)
    greedy = [dataclasses.replace(p, temperature=0.0) for p in params]
    tokens = draw(op, logits, pack(greedy, VOCAB_SIZE))
    for row, p in enumerate(greedy):
        expected = processed_logits(logits[row], p)
        assume(np.isfinite(expected).any())
        assert expected[tokens[row]] >= expected.max() - 1e-5


MIXED = [
    Params(temperature=0.0),
    Params(temperature=1.0, seed=1),
    EVERYTHING,
    dataclasses.replace(EVERYTHING, temperature=0.0),
    Params(temperature=2.0, seed=4, top_k=3),
    Params(temperature=1.0, seed=-5, top_p=0.5),
]


@every_implementation
@pytest.mark.parametrize("vocab_size", [VOCAB_SIZE, 256])
def test_a_row_gives_the_same_token_in_any_batch(vocab_size: int, op: str) -> None:
    many = [dataclasses.replace(MIXED[i % 6], seed=i // 6) for i in range(64)]
    positions = [i % 7 for i in range(64)]
    logits = some_logits(5, num_rows=64, vocab_size=vocab_size)
    rows = pack(many, vocab_size, positions=positions)
    together = draw(op, logits, rows)
    order = list(np.random.default_rng(0).permutation(64))
    assert np.array_equal(draw(op, logits[order], take_rows(rows, order)), together[order])
    for i in range(12):
        assert draw(op, logits[i : i + 1], take_rows(rows, [i]))[0] == together[i]
    padded = [*range(5), *[0] * 8]
    assert np.array_equal(draw(op, logits[padded], take_rows(rows, padded))[:5], together[:5])


@every_implementation
def test_random_and_full_with_everything_off_give_the_same_tokens(op: str) -> None:
    params = [Params(temperature=(0.0, 0.7, 1.0, 3.0)[i % 4], seed=i) for i in range(64)]
    rows = pack(params, 256)
    for seed in range(8):
        logits = some_logits(seed, num_rows=64, vocab_size=256)
        assert np.array_equal(draw(op, logits, rows, FULL), draw(op, logits, random_only(rows), RANDOM))


@every_implementation
def test_greedy_rows_give_the_same_tokens_in_every_mode(op: str) -> None:
    params = [Params(temperature=0.0, seed=i) for i in range(64)]
    logits = some_logits(7, num_rows=64, vocab_size=256)
    rows = pack(params, 256)
    for mode, given_rows in ((FULL, rows), (RANDOM, random_only(rows)), (GREEDY, None)):
        assert np.array_equal(draw(op, logits, given_rows, mode), logits.argmax(axis=1))


@every_implementation
def test_tokens_with_the_same_seed_differ_between_positions_and_repeat_at_the_same_one(op: str) -> None:
    rows = pack([Params(seed=3)] * 64, 256, positions=[i // 2 for i in range(64)])
    tokens = draw(op, np.zeros((64, 256), np.float32), random_only(rows), RANDOM)
    assert np.array_equal(tokens[::2], tokens[1::2])
    assert len(set(tokens[::2].tolist())) > 24


@every_implementation
@pytest.mark.parametrize("temperature", [0.0, 1e-6, 1.0, 1000.0])
def test_a_banned_token_is_never_sampled(temperature: float, op: str) -> None:
    banned = Params(
        temperature=temperature,
        allowed=tuple(range(5, VOCAB_SIZE)),
        logit_bias={5: 100.0, 0: 100.0, 20: 100.0, 21: 100.0},
        bad_words=((5,), (6,)),
        min_tokens=1,
        stop_ids=(20, 21),
        repetition_penalty=2.0,
        prompt=(0, 5, 20),
    )
    logits = some_logits(8, num_rows=64)
    logits[:, :6] += 1000
    tokens = draw(op, logits, pack([dataclasses.replace(banned, seed=i) for i in range(64)], VOCAB_SIZE))
    assert not set(tokens.tolist()) & {*range(7), 20, 21}


@pytest.mark.parametrize("off", [{"top_k": 0}, {"top_k": -1}, {"top_k": 300}, {"top_p": 1.0}, {"min_p": 0.0}])
def test_a_truncation_that_is_off_removes_nothing(off: dict[str, float]) -> None:
    # Spread so wide that most probabilities vanish in float32 sums: none of it may be lost to rounding.
    logits = np.linspace(-300, 300, VOCAB_SIZE, dtype=np.float32)[None]
    assert kept_by_op(logits, [Params(**off)]).all()


@pytest.mark.parametrize("hard", [{"top_k": 1}, {"top_p": 1e-9}, {"top_p": 0.0}, {"min_p": 1.0}])
@pytest.mark.parametrize("scale", [0.01, 1.0, 1000.0])
def test_the_hardest_truncation_leaves_the_largest(hard: dict[str, float], scale: float) -> None:
    logits = some_logits(9, num_rows=16) * np.float32(scale)
    assert np.array_equal(kept_by_op(logits, [Params(**hard)] * 16), logits == logits.max(axis=1, keepdims=True))


def kept_of(values: list[float], **truncation: float) -> list[bool]:
    """Which of a few tokens stay, when the rest of the vocabulary is not allowed."""
    logits = np.zeros((1, VOCAB_SIZE), np.float32)
    logits[0, : len(values)] = values
    found = kept_by_op(logits, [Params(allowed=tuple(range(len(values))), **truncation)])[0]  # type: ignore[arg-type]
    assert not found[len(values) :].any()
    return list(found[: len(values)])


def test_tokens_tied_at_a_threshold_are_all_kept() -> None:
    logits = [3.0, 2.0, 2.0, 2.0, 1.0, 1.0, 0.0, 0.0]
    assert kept_of(logits, top_k=2) == [True] * 4 + [False] * 4
    just_above_the_first = np.exp(3) / np.exp(logits).sum() + 1e-3
    assert kept_of(logits, top_p=just_above_the_first) == [True] * 4 + [False] * 4


def test_top_p_is_of_what_top_k_left() -> None:
    logits = np.log([0.4, 0.3, 0.2, 0.1]).tolist()
    # 0.4 is 0.57 of what top_k leaves, and 0.4 of everything.
    assert kept_of(logits, top_k=2, top_p=0.55) == [True, False, False, False]
    assert kept_of(logits, top_p=0.55) == [True, True, False, False]


def test_a_bad_word_counts_from_the_output_only() -> None:
    word = ((3, 4),)
    logits = some_logits(10, num_rows=4)
    params = [
        Params(bad_words=word, prompt=(1, 3)),  # began in the prompt
        Params(bad_words=word, prompt=(1,), output=(3,)),
        Params(bad_words=word, prompt=(1,), output=(3, 5)),
        Params(bad_words=((3, 4, 6),), prompt=(1, 3), output=(4,)),
    ]
    found = kept_by_op(logits, params)
    assert [found[0, 4], found[1, 4], found[2, 4], found[3, 6]] == [True, False, True, True]
    assert found.sum() == 4 * VOCAB_SIZE - 1


def test_what_lies_beyond_num_tokens_has_no_effect() -> None:
    logits = some_logits(11, num_rows=6)
    clean, dirty = (pack(MIXED, VOCAB_SIZE, garbage=garbage) for garbage in (8, 2**31 - 1))
    assert np.array_equal(run_filter(logits, clean), run_filter(logits, dirty))


def test_lists_of_length_zero_change_nothing() -> None:
    logits = some_logits(12, num_rows=2)
    params = [Params(temperature=0.5, top_k=4), Params(output=(1, 1), frequency_penalty=1.0)]
    short = pack(params, VOCAB_SIZE, num_bias=0, num_stops=0, num_bad_words=0, max_bad_word=1)
    assert np.array_equal(run_filter(logits, short), run_filter(logits, pack(params, VOCAB_SIZE)))


@every_implementation
@pytest.mark.parametrize("num_values", [1, 2, 127, 128, 129, 384])
def test_the_first_of_equal_values_is_the_argmax(num_values: int, op: str) -> None:
    x = np.random.default_rng(0).integers(0, 4, (64, num_values)).astype(np.float32)
    found = draw(op, x, None, GREEDY)
    assert np.array_equal(found, x.argmax(axis=1))
    assert found.dtype == np.int32


@every_implementation
@pytest.mark.parametrize("num_values", [100, 256])
def test_the_argmax_of_broken_logits_is_still_an_index(num_values: int, op: str) -> None:
    x = np.zeros((4, num_values), np.float32)
    x[0, 3], x[1], x[2], x[3, :-2] = np.nan, np.nan, -np.inf, -np.inf
    assert draw(op, x, None, GREEDY).tolist() == [num_values - 1, num_values - 1, 0, num_values - 2]


@every_implementation
def test_logprobs_are_those_of_the_raw_logits(op: str) -> None:
    logits = some_logits(13, num_rows=6) * 5
    found = compiled(op)(logits, pack(MIXED, VOCAB_SIZE), mode=FULL, num_logprobs=4)
    assert np.array_equal(found.token_ids, draw(op, logits, pack(MIXED, VOCAB_SIZE)))
    expected = special.log_softmax(logits.astype(np.float64), axis=1)
    order = np.argsort(-logits, axis=1, kind="stable")[:, :4]
    rows = np.arange(6)
    assert np.array_equal(found.logprobs.top_ids, order)
    np.testing.assert_allclose(found.logprobs.top_logprobs, expected[rows[:, None], order], atol=2e-5)
    np.testing.assert_allclose(found.logprobs.token_logprobs, expected[rows, found.token_ids], atol=2e-5)


@every_implementation
def test_a_chosen_token_has_the_very_logprob_of_its_top_entry(op: str) -> None:
    logits = some_logits(14, num_rows=64, vocab_size=1000) * 4
    top = np.argsort(-logits, axis=1, kind="stable")[:, :5]
    for place in range(5):
        found = logprobs_of(op, logits, top[:, place].astype(np.int32), k=5)
        assert np.array_equal(found.token_logprobs, np.asarray(found.top_logprobs)[:, place])
        assert np.array_equal(found.token_ranks, np.full(64, place + 1))


@every_implementation
def test_a_rank_counts_the_larger_logits(op: str) -> None:
    logits = np.asarray([[1.0, 5.0, 5.0, 0.0]] * 4, np.float32)
    found = logprobs_of(op, logits, np.arange(4, dtype=np.int32), k=2)
    assert found.token_ranks.tolist() == [3, 1, 1, 4]
    assert found.top_ids.tolist() == [[1, 2]] * 4


def test_logprobs_of_the_chosen_token_alone_need_no_top() -> None:
    logits, chosen = some_logits(15, num_rows=5), np.arange(5, dtype=np.int32)
    alone, with_top = run_logprobs(logits, chosen, k=0), run_logprobs(logits, chosen, k=3)
    assert alone.top_ids.shape == alone.top_logprobs.shape == (5, 0)
    assert np.array_equal(alone.token_logprobs, with_top.token_logprobs)
    assert np.array_equal(alone.token_ranks, with_top.token_ranks)


@every_implementation
def test_logprobs_of_far_apart_logits_stay_finite(op: str) -> None:
    logits = np.asarray([[1e30, 0.0, -9e29]], np.float32)
    found = logprobs_of(op, logits, np.asarray([2], np.int32), k=3)
    assert np.isfinite(np.asarray(found.top_logprobs)).all()
    assert float(found.top_logprobs[0, 0]) == 0.0
