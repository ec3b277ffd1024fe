"""Scheduler settings that change while serving: the tokens stay the same, the limits hold, and nonsense changes nothing."""

import numpy as np
import pytest

from quire.engine import InvalidConfigError, SamplingParams
from tests.engine.engines import check_idle, generate, tiny_engine, token_ids

CHANGES = [
    {"max_num_seqs": 1},
    {"max_num_seqs": 4, "max_num_batched_tokens": 36},
    {"batching": "static"},
    {"batching": "windowed", "batching_window": 0.0},
    {"batching": "continuous", "scheduling_policy": "priority", "priority_seconds": 1.0},
    {"max_num_seqs": 2},
]


@pytest.fixture
def llm():
    engine = tiny_engine()
    before = engine.core.settings
    yield engine
    engine.core.configure(vars(before))


def work() -> tuple[list[list[int]], list[SamplingParams]]:
    """Nine requests of mixed lengths, seeded."""
    rng = np.random.default_rng(3)
    prompts = [rng.integers(3, 101, rng.integers(1, 60)).tolist() for _ in range(9)]
    params = [
        SamplingParams(max_tokens=int(rng.integers(5, 40)), seed=i, ignore_eos=True, detokenize=False) for i in range(9)
    ]
    return prompts, params


def test_settings_that_change_while_requests_run_leave_the_tokens_alone(llm):
    prompts, params = work()
    expected = token_ids(generate(llm, prompts, params))
    found = {}
    changes = iter(CHANGES)
    for step, output in enumerate(llm.stream(prompts, params)):
        if step % 20 == 5 and (change := next(changes, None)):
            llm.core.configure(change)
            llm.core.scheduler.check()
        found[output.request_id] = output
    ordered = [found[request_id] for request_id in sorted(found, key=int)]
    assert token_ids(ordered) == expected
    assert next(changes, None) is None, "the work was too short to see every change"
    check_idle(llm)


def test_fewer_requests_run_once_the_limit_is_lowered(llm):
    llm.core.configure({"max_num_seqs": 2})
    prompts, params = work()
    most = 0
    for _ in llm.stream(prompts, params):
        most = max(most, llm.stats().num_requests_running)
    assert most == 2


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"max_num_seqs": 5}, "compiled for"),
        ({"max_num_seqs": 0}, "max_num_seqs"),
        ({"max_num_seqs": True}, "max_num_seqs"),
        ({"max_num_seqs": None}, "max_num_seqs"),
        ({"max_num_batched_tokens": 10}, "at least 36"),
        ({"max_num_batched_tokens": 10**9}, "as compiled"),
        ({"batching": "magic"}, "continuous"),
        ({"batching_window": float("nan")}, "batching_window"),
        ({"block_size": 16}, "these can"),
        ({"max_num_seqs": 2, "priority_seconds": -1.0}, "priority_seconds"),
    ],
)
def test_what_cannot_be_set_is_refused_by_name_and_changes_nothing(llm, changes, part):
    before = llm.core.settings
    with pytest.raises(InvalidConfigError, match=part):
        llm.core.configure(changes)
    assert llm.core.settings == before
    assert llm.core.scheduler.max_num_seqs == before.max_num_seqs
