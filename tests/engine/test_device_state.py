"""What of the state a program is given: what it reads and what it changes, and nothing else, or it is not traced at all."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from quire.engine.device_state import DeviceState, StateSplit, empty_slots
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
