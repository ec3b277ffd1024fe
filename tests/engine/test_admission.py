"""When waiting requests are let in, and what is kept free for those that run."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from quire.engine.admission import BatchingPolicy, Headroom
from quire.engine.request import Request
from tests.engine.fake_model import STEP_SECONDS, Setup, Simulation, make_request

MAX_STEPS = 2000


def run_arrivals(
    setup: Setup, arrival_steps: list[int], output_lens: list[int], prompt_len: int = 6
) -> tuple[Simulation, list[tuple[int, list[str], list[str]]]]:
    """Runs requests r0, r1, ...; also (step, who ran before it, whom it admitted) of every scheduled step."""
    simulation = Simulation(setup)
    left = list(enumerate(arrival_steps))
    history = []
    for step_idx in range(MAX_STEPS):
        while left and left[0][1] <= step_idx:
            idx, _ = left.pop(0)
            prompt = [idx % 13, *range(1, prompt_len)]
            simulation.add(
                make_request(f"r{idx}", prompt, max_tokens=output_lens[idx], arrival_time=step_idx * STEP_SECONDS)
            )
        running = [request.request_id for request in simulation.scheduler.running]
        step = simulation.step()
        if step is not None:
            history.append((step_idx, running, [admitted.request_id for admitted in step.admitted]))
        if not left and not simulation.has_work:
            return simulation, history
    raise AssertionError("unfinished")


@pytest.mark.parametrize("num_blocks", [12, 41])
@pytest.mark.parametrize("seed", range(3))
def test_the_static_policy_admits_nobody_while_a_batch_is_worked_off(seed: int, num_blocks: int) -> None:
    chance = random.Random(seed)
    arrival_steps = sorted(chance.randrange(60) for _ in range(20))
    output_lens = [chance.randrange(8, 16) for _ in range(20)]
    setup = Setup(policy="static", max_num_seqs=5, num_blocks=num_blocks, max_model_len=40, max_num_batched_tokens=21)
    simulation, history = run_arrivals(setup, arrival_steps, output_lens)
    began, members, batch_sizes = 0, set[str](), []
    for (step_idx, running, admitted), step in zip(history, simulation.steps, strict=True):
        if not running:
            began, members = step_idx, set()
            batch_sizes.append(0)
        assert all(arrival_steps[int(name[1:])] <= began for name in admitted)
        assert not admitted or members <= set(running), "a member has finished: the batch is complete"
        members |= set(admitted)
        batch_sizes[-1] = max(batch_sizes[-1], len(members))
        assert step.padded_decode_rows == (len(members) if step.decode else 0)
    assert max(batch_sizes) > 1
    assert len(batch_sizes) > 3


def test_the_static_policy_never_asks_for_more_rows_than_there_are() -> None:
    setup = Setup(policy="static", max_num_seqs=4, max_prefill_tiles=1, max_num_batched_tokens=8)
    run_arrivals(setup, [0] * 13, [1, 2, 9] * 4 + [1])


@pytest.mark.parametrize("seed", range(3))
def test_the_windowed_policy_admits_nobody_before_the_oldest_has_waited_or_a_batch_is_full(seed: int) -> None:
    chance = random.Random(seed)
    arrival_steps = sorted(chance.randrange(200) for _ in range(25))
    setup = Setup(policy="windowed", window_seconds=0.1, max_num_seqs=6, num_blocks=61)
    _, history = run_arrivals(setup, arrival_steps, [chance.randrange(1, 12) for _ in range(25)])
    waiting, opened_at = set(range(25)), -1
    for step_idx, _, admitted in history:
        there = [arrival_steps[idx] for idx in waiting if arrival_steps[idx] <= step_idx]
        if there and (len(there) >= 6 or step_idx - min(there) >= 9):
            opened_at = step_idx
        assert all(arrival_steps[int(name[1:])] <= opened_at for name in admitted)
        waiting -= {int(name[1:]) for name in admitted}
    steps = [step_idx for step_idx, _, admitted in history if admitted]
    assert len(steps) < 25, "nobody was gathered"
    assert steps[0] >= min(arrival_steps[0] + 9, arrival_steps[5])


def test_a_windowed_group_leaves_the_place_of_an_aborted_member_to_nobody() -> None:
    setup = Setup(policy="windowed", window_seconds=0.1, max_num_seqs=2, max_prefill_tiles=1, max_num_batched_tokens=6)
    simulation = Simulation(setup)
    simulation.add(make_request("first", range(9), arrival_time=0.0))
    simulation.add(make_request("second", range(3, 12), arrival_time=0.0))
    while not simulation.scheduler.running:
        simulation.step()
    assert simulation.abort("second")
    simulation.add(make_request("late", [5], arrival_time=simulation.now + STEP_SECONDS))
    arrived = simulation.now
    while simulation.request("late").slot < 0:
        simulation.step()
    assert simulation.now - arrived >= 0.1


@pytest.mark.parametrize("policy", ["continuous", "windowed", "static"])
def test_every_policy_serves_everyone_in_the_end(policy: BatchingPolicy) -> None:
    simulation, _ = run_arrivals(Setup(policy=policy), [3 * idx for idx in range(15)], [9] * 15)
    assert len(simulation.finished) == 15


def test_continuous_batching_takes_fewer_row_steps_than_static() -> None:
    """Rows that are computed for requests that have finished are what the static policy pays."""
    chance = random.Random(5)
    output_lens = [chance.randrange(2, 30) for _ in range(24)]
    rows = {}
    for policy in ("continuous", "static"):
        setup = Setup(policy=policy, num_blocks=81)  # type: ignore[arg-type]
        simulation, _ = run_arrivals(setup, [0] * 24, output_lens)
        rows[policy] = sum(max(len(step.decode), step.padded_decode_rows) for step in simulation.steps)
    assert rows["continuous"] * 1.3 < rows["static"]


def request_of(num_tokens: int, max_tokens: int, num_held: int) -> Request:
    source = make_request("r", [1] * num_tokens, max_tokens=max_tokens)
    request = Request(source, max_model_len=10_000, order=(0.0, 0))
    request.block_ids = list(range(1, num_held + 1))
    return request


def test_headroom_is_what_the_next_tokens_need_beyond_the_blocks_held() -> None:
    headroom = Headroom(block_size=16)
    assert headroom.lookahead == 32
    assert headroom.growth(request_of(16, 100, 1)) == 2
    assert headroom.growth(request_of(17, 100, 2)) == 2
    assert headroom.growth(request_of(17, 5, 2)) == 0
    assert headroom.growth(request_of(17, 5, 0)) == 0, "the blocks for its known tokens are counted apart"
    assert headroom.growth(request_of(16, 100, 9)) == 0
    assert headroom.blocks([request_of(16, 100, 1), request_of(17, 5, 2)]) == 2


def test_headroom_looks_further_after_preemptions_and_less_far_after_a_calm_stretch() -> None:
    headroom = Headroom(block_size=16)
    seen = [headroom.lookahead]
    for _ in range(20):
        headroom.admitted()
        for _ in range(3):
            headroom.preempted()
        seen.append(headroom.lookahead)
    assert all(after in (2 * before, Headroom.MAX_LOOKAHEAD) for before, after in pairwise(seen))
    assert seen[-1] == Headroom.MAX_LOOKAHEAD
    for _ in range(Headroom.CALM_AFTER - 1):
        headroom.finished()
    assert headroom.lookahead == Headroom.MAX_LOOKAHEAD
    headroom.finished()
    assert headroom.lookahead == Headroom.MAX_LOOKAHEAD // 2
    for _ in range(20 * Headroom.CALM_AFTER):
        headroom.finished()
    assert headroom.lookahead == Headroom.MIN_LOOKAHEAD
