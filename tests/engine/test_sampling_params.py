"""Every parameter is either honoured or refused, by name, with the value and the range."""

import dataclasses
import math
import pickle

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from quire.engine.sampling_params import (
    MAX_BAD_WORD_TOKENS,
    MAX_BAD_WORDS,
    MAX_INT32,
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_STOP_TOKEN_IDS,
    RequestOutputKind,
    SamplingParams,
    bad_words_token_ids,
)
from quire.kernels.errors import InvalidRequestError
from tests.engine.small_tokenizers import byte_fallback, byte_level

INTEGERS = {  # lowest and highest that are allowed
    "n": (1, 16384),
    "top_k": (-1, 2**31 - 1),
    "seed": (-(2**63), 2**64 - 1),
    "max_tokens": (1, 2**31 - 1),
    "min_tokens": (0, 16),  # the default of max_tokens
    "logprobs": (0, MAX_LOGPROBS),
    "prompt_logprobs": (0, MAX_LOGPROBS),
    "num_speculative_tokens": (0, MAX_INT32),
}
FLOATS = {
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
    "repetition_penalty": (1e-4, 1e4),
    "temperature": (0.0, 100.0),
    "top_p": (math.nextafter(0.0, 1.0), 1.0),
    "min_p": (0.0, 1.0),
}
FLAGS = [field.name for field in dataclasses.fields(SamplingParams) if field.type in (bool, "bool")]
IDS = {"stop_token_ids": MAX_STOP_TOKEN_IDS, "allowed_token_ids": None}


def refuse(parameter, value, match=None):
    with pytest.raises(InvalidRequestError, match=match) as caught:
        SamplingParams(**{parameter: value})
    assert caught.value.parameter == parameter
    assert parameter in str(caught.value)


def test_every_field_is_covered_by_a_test_of_its_range():
    others = {"stop", "bad_words", "logit_bias", "output_kind"}
    assert {f.name for f in dataclasses.fields(SamplingParams)} == {*INTEGERS, *FLOATS, *FLAGS, *IDS, *others}


def test_the_defaults_are_those_of_vllm():
    params = SamplingParams()
    assert (params.n, params.temperature, params.top_p, params.top_k, params.min_p) == (1, 1.0, 1.0, 0, 0.0)
    assert (params.max_tokens, params.min_tokens, params.seed) == (16, 0, None)
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (0.0, 0.0, 1.0)
    assert (params.stop, params.stop_token_ids, params.bad_words) == ((), (), ())
    assert (params.logit_bias, params.allowed_token_ids, params.logprobs, params.prompt_logprobs) == (None,) * 4
    assert {name for name in FLAGS if getattr(params, name)} == {
        "detokenize",
        "skip_special_tokens",
        "spaces_between_special_tokens",
    }
    assert params.output_kind is RequestOutputKind.CUMULATIVE


@pytest.mark.parametrize(("name", "limits"), [*INTEGERS.items(), *FLOATS.items()])
def test_a_number_is_taken_up_to_its_limits_and_refused_beyond(name, limits):
    low, high = limits
    is_float = name in FLOATS
    for value in limits:
        SamplingParams(**{name: value})
    refuse(name, math.nextafter(low, -math.inf) if is_float else low - 1)
    refuse(name, math.nextafter(high, math.inf) if is_float else high + 1)


@pytest.mark.parametrize("name", [*INTEGERS, *FLOATS])
@pytest.mark.parametrize("value", [True, False, "1", [1], math.nan, math.inf, -math.inf, 1j, np.True_])
def test_a_value_that_is_no_number_is_refused_with_the_value(name, value):
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(**{name: value})
    assert caught.value.parameter == name
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("name", INTEGERS)
def test_a_fraction_is_no_integer(name):
    refuse(name, 1.0, "must be an integer")
    refuse(name, np.float32(1), "must be an integer")


@pytest.mark.parametrize("name", [*INTEGERS, *FLOATS])
def test_none_is_refused_but_where_it_means_something(name):
    if name in ("seed", "max_tokens", "logprobs", "prompt_logprobs", "num_speculative_tokens"):
        assert getattr(SamplingParams(**{name: None}), name) is None
    else:
        refuse(name, None)


@pytest.mark.parametrize("name", FLAGS)
@pytest.mark.parametrize("value", [None, 0, 1, "yes"])
def test_a_flag_is_true_or_false(name, value):
    refuse(name, value, "True or False")


@pytest.mark.parametrize("value", [None, 0, "DELTA"])
def test_the_output_kind_is_of_its_enum(value):
    refuse("output_kind", value, "RequestOutputKind")


def test_numpy_numbers_are_kept_as_pythons_own():
    params = SamplingParams(
        top_k=np.int64(3), temperature=np.float32(0.5), stop_token_ids=np.array([4]), logit_bias={np.int32(1): 2}
    )
    kept = (params.top_k, params.temperature, params.stop_token_ids[0], *params.logit_bias, *params.logit_bias.values())
    assert kept == (3, 0.5, 4, 1, 2.0)
    assert [type(value) for value in kept] == [int, float, int, int, float]


@pytest.mark.parametrize("name", ["stop", "bad_words"])
def test_lists_of_strings_hold_strings_that_are_not_empty(name):
    assert getattr(SamplingParams(**{name: ["b", "a", "b"]}), name) == ("b", "a")
    assert getattr(SamplingParams(**{name: None}), name) == ()
    for value in ([""], ["a", ""], ["\ud83d"], [3], [None], 3, {"a": 1}, b"a"):
        refuse(name, value)


def test_one_stop_string_need_not_be_in_a_list():
    assert SamplingParams(stop="ab").stop == ("ab",)
    refuse("stop", "")
    refuse("bad_words", "ab", "list of strings")


@pytest.mark.parametrize(("name", "limit"), IDS.items())
def test_lists_of_token_ids_hold_ids(name, limit):
    assert getattr(SamplingParams(**{name: [5, 2, 5]}), name) == (5, 2)
    for value in ([-1], [True], [1.0], ["1"], [None], [2**31], 3, "12", {1: 2}):
        refuse(name, value)
    if limit is not None:
        SamplingParams(**{name: [*range(limit), 0]})
        refuse(name, range(limit + 1), f"at most {limit}.*got {limit + 1}")


def test_an_empty_list_of_allowed_tokens_is_refused():
    refuse("allowed_token_ids", [])


def test_a_logit_bias_maps_ids_to_numbers_within_limits():
    assert SamplingParams(logit_bias={3: -100, 4: 100.0}).logit_bias == {3: -100.0, 4: 100.0}
    for value in ({-1: 1.0}, {"3": 1.0}, {3: 100.5}, {3: math.nan}, {3: "1"}, {3: True}, [3], 3):
        refuse("logit_bias", value)
    SamplingParams(logit_bias=dict.fromkeys(range(MAX_LOGIT_BIAS), 1.0))
    refuse("logit_bias", dict.fromkeys(range(MAX_LOGIT_BIAS + 1), 1.0), f"at most {MAX_LOGIT_BIAS}")


def test_a_logit_bias_is_a_copy():
    given_bias = {1: 1.0}
    params = SamplingParams(logit_bias=given_bias)
    given_bias[2] = 2.0
    assert params.logit_bias == {1: 1.0}


def test_more_bad_words_than_the_step_has_room_for_are_refused():
    words = [f"w{i}" for i in range(MAX_BAD_WORDS + 1)]
    SamplingParams(bad_words=words[:-1])
    refuse("bad_words", words, f"at most {MAX_BAD_WORDS}")


@pytest.mark.parametrize("temperature", [0, 0.0, -0.0, 9.9e-6])
def test_a_temperature_near_zero_is_greedy_and_needs_no_other_choice(temperature):
    params = SamplingParams(temperature=temperature, top_p=0.5, top_k=3, min_p=0.1)
    assert params.is_greedy
    assert params == SamplingParams(temperature=0.0)
    assert not SamplingParams(temperature=1e-5).is_greedy


def test_several_outputs_of_a_greedy_request_are_refused():
    with pytest.raises(InvalidRequestError, match="greedy") as caught:
        SamplingParams(n=2, temperature=0.0)
    assert caught.value.parameter == "n"


def test_contradictions_are_refused():
    with pytest.raises(InvalidRequestError, match="5 and 4"):
        SamplingParams(min_tokens=5, max_tokens=4)
    with pytest.raises(InvalidRequestError, match="detokenize"):
        SamplingParams(stop="a", detokenize=False)
    with pytest.raises(InvalidRequestError, match="has no other"):
        SamplingParams(min_tokens=1, allowed_token_ids=[1, 2], stop_token_ids=[2, 1, 3])
    SamplingParams(min_tokens=5, max_tokens=None)
    SamplingParams(min_tokens=1, allowed_token_ids=[1, 2], stop_token_ids=[2])


def test_parameters_cannot_be_changed_and_survive_copies_and_a_process_boundary():
    params = SamplingParams(stop=["a"], logit_bias={1: 2.0}, allowed_token_ids=[3], seed=-7, bad_words=["x"])
    assert pickle.loads(pickle.dumps(params)) == dataclasses.replace(params) == params
    assert hash(pickle.loads(pickle.dumps(params))) == hash(params)
    assert params != dataclasses.replace(params, stop=["b"])
    for field in dataclasses.fields(params):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(params, field.name, None)


def test_top_k_of_minus_one_is_off():
    assert SamplingParams(top_k=-1) == SamplingParams(top_k=0)


@given(st.integers(-(2**63), 2**64 - 1), st.integers(2, 9))
@example(2**64 - 1, 2)
@example(-2, 2)
@example(-1, 2)
def test_choices_of_a_seeded_request_have_different_seeds_and_are_requests_of_their_own(seed, n):
    params = SamplingParams(n=n, seed=seed, temperature=0.7)
    clones = [params.clone_for_choice(i) for i in range(n)]
    if seed == -1:
        assert {clone.seed for clone in clones} == {None}
        return
    assert len({clone.seed for clone in clones}) == n
    assert clones[0] == dataclasses.replace(params, n=1)
    for i, clone in enumerate(clones):
        assert (clone.n, clone.temperature, clone.seed) == (1, 0.7, (seed + i) % 2**64)


def test_a_seed_is_taken_as_64_bits_with_or_without_a_sign():
    assert SamplingParams(seed=-5).seed == SamplingParams(seed=2**64 - 5).seed == 2**64 - 5
    assert SamplingParams(seed=-1).seed is None


def test_a_choice_beyond_n_is_our_own_mistake():
    with pytest.raises(AssertionError):
        SamplingParams(n=2).clone_for_choice(2)


@pytest.mark.parametrize(
    ("name", "value"), [("stop_token_ids", [1, 10]), ("allowed_token_ids", [10]), ("logit_bias", {10: 1.0})]
)
def test_a_token_id_outside_the_vocabulary_is_refused_with_the_id_and_the_size(name, value):
    params = SamplingParams(**{name: value})
    params.verify_against(vocab_size=11)
    with pytest.raises(InvalidRequestError, match=r"token id 10\b.*\b10 tokens") as caught:
        params.verify_against(vocab_size=10)
    assert caught.value.parameter == name


def test_a_request_that_may_only_end_and_must_not_is_refused():
    params = SamplingParams(min_tokens=1, allowed_token_ids=[2])
    params.verify_against(10, eos_token_ids=[3])
    with pytest.raises(InvalidRequestError, match="min_tokens=1"):
        params.verify_against(10, eos_token_ids=[2])
    dataclasses.replace(params, ignore_eos=True).verify_against(10, eos_token_ids=[2])


def test_a_bad_word_is_forbidden_at_the_start_of_a_text_and_after_a_space():
    tokenizer = byte_level()
    (start,) = tokenizer.encode("hello")
    (inside,) = tokenizer.encode(" world")
    world = tuple(tokenizer.encode("world"))
    assert len(world) > 1  # so that the form after a space, one token, is not of the same length
    assert bad_words_token_ids(SamplingParams(bad_words=["hello"]), tokenizer)[0] == (start,)
    assert bad_words_token_ids(SamplingParams(bad_words=[" world"]), tokenizer) == (world,)
    assert inside not in world
    one_letter = bad_words_token_ids(SamplingParams(bad_words=["w"]), byte_fallback())
    assert one_letter == (tuple(byte_fallback().encode("w")),)
    assert bad_words_token_ids(SamplingParams(), tokenizer) == ()


class Words:
    """A tokenizer of one token a word, in which a word and the same word after a space are different tokens."""

    def encode(self, text, add_special_tokens=True):
        assert not add_special_tokens
        tokens = [" " + word if i > 0 else word for i, word in enumerate(text.split(" ")) if i > 0 or word]
        return [sum(map(ord, token)) for token in tokens]


def test_a_space_that_belongs_to_the_first_token_makes_a_second_sequence():
    sequences = bad_words_token_ids(SamplingParams(bad_words=["ab", "  ab", "a b"]), Words())
    ab, spaced_ab = ord("a") + ord("b"), ord(" ") + ord("a") + ord("b")
    spaced_a_b = (ord(" ") + ord("a"), ord(" ") + ord("b"))
    assert sequences == ((ab,), (spaced_ab,), (ord("a"), spaced_a_b[1]), spaced_a_b)


def test_a_space_that_is_not_part_of_the_first_token_makes_no_second_sequence():
    class Letters:
        def encode(self, text, add_special_tokens=True):
            return [5, 6] if text.startswith(" ") else [5, 7]

    assert bad_words_token_ids(SamplingParams(bad_words=["ab"]), Letters()) == ((5, 7),)


def test_a_bad_word_of_too_many_tokens_or_none_is_refused_with_the_word():
    for words, complaint in (
        (["a " * MAX_BAD_WORD_TOKENS + "a"], f"'{'a ' * MAX_BAD_WORD_TOKENS}a' is {MAX_BAD_WORD_TOKENS + 1}"),
        ([" "], "' ' is 0"),
        ([chr(0x4E00 + i) for i in range(MAX_BAD_WORDS)], f"at most {MAX_BAD_WORDS} token sequences, got 64"),
    ):
        with pytest.raises(InvalidRequestError, match=complaint) as caught:
            bad_words_token_ids(SamplingParams(bad_words=words), Words())
        assert caught.value.parameter == "bad_words"
