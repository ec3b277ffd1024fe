"""What of the state a program is given: what it reads and what it changes, and nothing else, or it is not traced at all.

And what a request brings into its slot: all of its row and nothing of any other.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from quire.engine.device_state import (
    DeviceState,
    Slots,
    StateSplit,
    empty_row,
    empty_slots,
    num_row_words,
    request_row,
    row_record,
    write_row,
)
from quire.engine.sampling_params import SamplingParams
from quire.engine.step_data import AdmittedRequest
from quire.kernels.sampling.rows import SamplingMode
from tests.engine.draft_engines import model_config
from tests.engine.engines import tiny_engine, tiny_folder

STATE = DeviceState(kv_cache=(np.zeros(3), np.ones(3)), slots=empty_slots(2, 8, 64))
SPLIT = StateSplit(STATE, changed=("kv_cache", "num_tokens"), read=("num_tokens", "top_k"))


def parts() -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    leaves = jax.tree.leaves(STATE)
    return SPLIT.held(leaves), SPLIT.changed(leaves)


def test_what_is_read_and_changed_comes_back_as_it_was_and_what_is_changed_is_not_given_twice() -> None:
    held, changed = parts()
    assert [id(leaf) for leaf in held] == [id(STATE.slots.top_k)]
    assert {id(leaf) for leaf in changed} == {*map(id, STATE.kv_cache), id(STATE.slots.num_tokens)}
    state = SPLIT.join(held, changed)
    assert state.slots.top_k is STATE.slots.top_k
    assert state.kv_cache[1] is STATE.kv_cache[1]
    assert SPLIT.changed_of(state, held) == changed


def test_what_is_said_not_to_be_read_cannot_be() -> None:
    state = SPLIT.join(*parts())
    for read in (lambda x: x[0], lambda x: x.shape, lambda x: jax.numpy.add(x, 1.0)):
        with pytest.raises(AssertionError, match="top_p is read, and said not to be"):
            read(state.slots.top_p)


@pytest.mark.parametrize("field", ["top_k", "top_p"])
def test_what_is_said_not_to_be_changed_cannot_be(field: str) -> None:
    held, changed = parts()
    state = SPLIT.join(held, changed)
    state = state.replace(slots=state.slots.replace(**{field: np.ones(3)}))
    with pytest.raises(AssertionError, match="changed, and said not to be"):
        SPLIT.changed_of(state, held)


def test_a_step_without_drafts_is_given_what_that_of_an_engine_without_speculation_is() -> None:
    """And no step without penalties is given their settings."""
    plain, speculating = tiny_engine(), tiny_engine(speculative_config=model_config(tiny_folder(), 2))
    for shape in plain.core.runner.programs:
        for sampling in SamplingMode:
            wanted = dataclasses.replace(shape, sampling=sampling)
            mine, theirs = (llm.core.runner.step_source(wanted).arguments for llm in (speculating, plain))
            assert len(jax.tree.leaves(mine)) == len(jax.tree.leaves(theirs)), wanted.describe()
            assert len(theirs[1]) == {SamplingMode.GREEDY: 1, SamplingMode.RANDOM: 3}.get(sampling, 16), (
                wanted.describe()
            )


def random_row(seed: int) -> Slots:
    """Any bits in every field, also those of a negative number and of no number."""
    rng = np.random.default_rng(seed)

    def bits(leaf: Any) -> np.ndarray:
        return rng.integers(0, 2**32, leaf.shape, np.uint32).view(leaf.dtype)

    row: Slots = jax.tree.map(bits, empty_row(8, 70))
    return row


def rows_as_bits(slots: Slots) -> list[np.ndarray]:
    return [np.array(leaf).view(np.uint32) for leaf in jax.tree.leaves(slots)]


@pytest.mark.parametrize(("slot", "written_at"), [(0, 0), (2, 2), (3, 3), (-1, 0), (99, 3)])
def test_a_written_row_has_its_bits_and_the_others_keep_theirs(slot: int, written_at: int) -> None:
    rows = [random_row(seed) for seed in range(4)]
    slots = jax.tree.map(lambda *leaves: np.stack(leaves), *rows)
    rows[written_at] = random_row(99)
    words = row_record(slot, rows[written_at]).view(np.uint32)
    assert words.shape == (num_row_words(slots),)
    wanted = rows_as_bits(jax.tree.map(lambda *leaves: np.stack(leaves), *rows))
    for found, expected in zip(rows_as_bits(jax.jit(write_row)(slots, words)), wanted, strict=True):
        np.testing.assert_array_equal(found, expected)


def test_a_request_s_row_says_all_that_the_request_does_and_leaves_the_empty_one_as_it_was() -> None:
    params = SamplingParams(
        temperature=0.7,
        top_k=5,
        top_p=0.8,
        min_p=0.1,
        repetition_penalty=1.3,
        presence_penalty=-0.5,
        frequency_penalty=0.25,
        min_tokens=2,
        logit_bias={3: -1.5, 69: 2.0},
        allowed_token_ids=[0, 31, 32, 69],
        seed=7,
    )
    admitted = AdmittedRequest("r", 1, [5, 6, 7], 2, 8, params, (4, 9), ((1, 2), (3,)), [0], 1, (2, 3))
    empty = row_record(2, empty_row(8, 70))
    before = empty.copy()
    slots = jax.jit(write_row)(empty_slots(2, 8, 70), request_row(admitted, empty).view(np.uint32))
    row: Slots = jax.tree.map(lambda leaf: np.asarray(leaf[1]), slots)
    for name in ("temperature", "top_k", "top_p", "min_p", "min_tokens"):
        assert getattr(row, name) == pytest.approx(getattr(params, name)), name
    for name in ("repetition", "presence", "frequency"):
        assert getattr(row, f"{name}_penalty") == pytest.approx(getattr(params, f"{name}_penalty")), name
    assert row.tokens.tolist() == [5, 6, 7, 0, 0, 0, 0, 0]
    assert (row.num_tokens, row.prompt_len, row.max_total_tokens) == (3, 2, 8)
    assert dict(zip(row.bias_ids[:2].tolist(), row.bias_values[:2].tolist(), strict=True)) == params.logit_bias
    assert set(row.bias_ids[2:].tolist()) == {-1}
    allowed = [token for token in range(96) if row.allowed_mask[token // 32] >> (token % 32) & 1]
    assert allowed == [0, 31, 32, 69]
    assert row.stop_ids[:3].tolist() == [4, 9, -1]
    assert [[token for token in word if token >= 0] for word in row.bad_words[:3].tolist()] == [[1, 2], [3], []]
    assert row.drafted.tolist() == [1, 0, 2, 3]
    assert empty.tobytes() == before.tobytes()
    other = request_row(admitted._replace(params=SamplingParams(seed=8)), empty)
    assert other["key"].tolist() != [row.key.tolist()]
