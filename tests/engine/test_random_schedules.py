"""Random traffic on the real step: arrivals and aborts at any time leave every other request's tokens as they are alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.engine import SamplingParams
from tests.engine.engines import check_idle, generate, serve_schedule, tiny_engine

RNG = np.random.default_rng(23)
SHARED = RNG.integers(3, 101, 40).tolist()
NUM_KINDS = 10
PROMPTS = [(SHARED if idx % 3 == 0 else []) + RNG.integers(3, 101, 1 + 9 * idx).tolist() for idx in range(NUM_KINDS)]
KINDS = [{"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 0.8, "top_k": 9, "repetition_penalty": 1.2}]
PARAMS = [
    SamplingParams(max_tokens=4 + 18 * (idx % 4), seed=idx, ignore_eos=True, detokenize=False, **KINDS[idx % 3])
    for idx in range(NUM_KINDS)
]
ENGINES = {
    "roomy": {},
    "tight": {"num_kv_blocks": 14},
    "tight and synchronous": {"num_kv_blocks": 14, "async_scheduling": False},
    "tight and several steps": {"num_kv_blocks": 14, "decode_steps_per_dispatch": 3},
}
REQUESTS = list(zip(PROMPTS, PARAMS, strict=True))


@pytest.fixture(scope="module")
def alone() -> list[list[int]]:
    llm = tiny_engine(enable_prefix_caching=False)
    return [generate(llm, [p], [q])[0].outputs[0].token_ids for p, q in zip(PROMPTS, PARAMS, strict=True)]


@pytest.mark.parametrize("name", ENGINES)
@settings(max_examples=12)
@given(
    arrivals=st.lists(st.tuples(st.integers(0, 30), st.integers(0, NUM_KINDS - 1)), min_size=1, max_size=14),
    aborts=st.dictionaries(st.integers(0, 13), st.integers(0, 45), max_size=4),
)
def test_tokens_do_not_depend_on_who_else_comes_and_goes(
    name: str, arrivals: list[tuple[int, int]], aborts: dict[int, int], alone: list[list[int]]
) -> None:
    llm = tiny_engine(**ENGINES[name])
    aborts = {arrival: when for arrival, when in aborts.items() if arrival < len(arrivals)}
    found = serve_schedule(llm, REQUESTS, arrivals, aborts)
    check_idle(llm)
    for arrival, (_, kind) in enumerate(arrivals):
        expected = alone[kind]
        if arrival in aborts:
            assert found[arrival] == expected[: len(found[arrival])]
        else:
            assert found[arrival] == expected


@pytest.mark.parametrize("name", [name for name in ENGINES if name != "roomy"])
def test_the_tight_engines_do_preempt(name: str, alone: list[list[int]]) -> None:
    """Guards the law above: its traffic is more than these engines hold."""
    llm = tiny_engine(**ENGINES[name])
    before = llm.stats().num_preemptions
    kinds = [3, 7, 3, 7, 6, 2]
    found = serve_schedule(llm, REQUESTS, [(0, kind) for kind in kinds], {})
    assert llm.stats().num_preemptions > before
    assert list(found.values()) == [alone[kind] for kind in kinds]
