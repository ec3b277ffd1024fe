"""What is decided about drafts on the host: limits of rows, and that catching up is paid for by what it brings."""

from __future__ import annotations

from itertools import pairwise

import pytest

from quire.engine.draft_scheduler import CatchUpAccount
from quire.engine.step_data import SchedulerOutput
from tests.engine.fake_model import DraftsInTurn, Setup, Simulation, make_request

PROMPT_LEN, CATCH_UP_COST = 40, 0.1


def _serve(
    num_output: int,
    draft_counts: tuple[int, ...] = (3,),
    *,
    num_requests: int,
    drafting_cost: float = 1.02,
    plain_cost: float = 1.0,
    slow_every: int = 10**9,
) -> Simulation:
    """Requests of long prompts, one after the other. A plain step takes `plain_cost` seconds, one with three drafts `drafting_cost` times
    as long, and a draft model a tenth as long for each token that it catches up with."""
    simulation = Simulation(
        Setup(
            num_blocks=200,
            draft_counts=draft_counts,
            method="draft_model",
            enable_prefix_caching=False,
            max_model_len=128,
        )
    )

    def seconds_of(step: SchedulerOutput) -> float:
        tokens = sum(min(row.num_tiles * 4, row.end - 1 - row.start) for row in step.catch_up)
        seconds = plain_cost * ((drafting_cost if step.num_drafts else 1.0) + CATCH_UP_COST * tokens)
        simulation.seconds += seconds
        return seconds * (200 if step.step_idx % slow_every == 0 else 1)

    DraftsInTurn.drafting_cost = plain_cost * drafting_cost
    simulation.seconds_of = seconds_of
    arrivals = iter(range(num_requests))

    def between(_: int) -> None:
        while not simulation.scheduler.requests and (idx := next(arrivals, None)) is not None:
            prompt = [(idx * 7 + place * place) % 11 + 1 for place in range(PROMPT_LEN)]
            simulation.add(make_request(f"r{idx}", prompt, max_tokens=num_output, arrival_time=simulation.now))

    between(0)
    simulation.run(100_000, between)
    return simulation


@pytest.fixture(autouse=True)
def _known_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DraftsInTurn, "plain_cost", 1.0)
    monkeypatch.setattr(DraftsInTurn, "drafting_cost", None)  # `_serve` sets it


def test_long_prompts_with_short_answers_are_not_caught_up_for() -> None:
    """Three tokens of output save less than 40 tokens of prompt cost: the loss stays near the share that trying may cost."""
    simulation = _serve(3, num_requests=400)
    num_caught_up = simulation.device.num_caught_up
    assert 0 < num_caught_up < 0.25 * 400 * PROMPT_LEN
    assert simulation.seconds < 1.03 * len(_serve(3, (), num_requests=400).steps)


def test_long_answers_are_caught_up_for() -> None:
    simulation = _serve(60, num_requests=100)
    assert simulation.device.num_caught_up > 0.95 * 100 * PROMPT_LEN
    assert simulation.seconds < 0.7 * len(_serve(60, (), num_requests=100).steps)


def test_where_drafts_gain_nothing_catching_up_costs_next_to_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step with drafts takes as long as its tokens would have taken without, and that is taken to be a tenth more than it is."""
    per_step = _tokens_per_drafting_step(_serve(60, num_requests=20))
    monkeypatch.setattr(DraftsInTurn, "plain_cost", 1.1)
    tie = _serve(60, num_requests=150, drafting_cost=per_step)
    assert _tokens_per_drafting_step(tie) == pytest.approx(per_step, rel=0.1), "it is a tie"
    assert tie.seconds < 1.014 * len(_serve(60, (), num_requests=150).steps)


def test_gains_of_good_times_are_not_spent_in_bad_ones() -> None:
    """However long drafts have paid before, once they do not, as little is lost as where they never did."""
    account = CatchUpAccount()
    for _ in range(10_000):
        account.drafted(3.0, 1.2)
    num_catch_ups = 0
    for _ in range(1000):
        account.served(1)
        if account.credit >= 0.0:
            num_catch_ups += 1
            account.drafted(1.0, 4.0)
    assert 0 < num_catch_ups * 3.0 < 100


def test_who_cannot_be_paid_for_at_once_is_not_waited_for() -> None:
    """Where drafts hardly pay, what may be spent goes to rows that have just come: later they lag by their answers as well."""
    simulation = _serve(60, num_requests=150, drafting_cost=2.0)
    lags = [row.end - 1 for step in simulation.steps for row in step.catch_up if row.start == 0]
    assert 20 < len(lags) < 75, "some are caught up for and others not"
    assert sum(lag <= PROMPT_LEN + 4 for lag in lags) > 0.9 * len(lags)
    assert simulation.seconds < 1.01 * len(_serve(60, (), num_requests=150).steps)


def test_what_costs_more_than_can_be_saved_is_tried_now_and_then() -> None:
    """A prompt of a thousand steps to catch up with: once the account is full, and then not before it is again."""
    account = CatchUpAccount()
    account.caught_up(1, 10.0)
    assert account.cost(100) == 1000.0
    num_served, tried_at = 0, []
    while len(tried_at) < 3:
        account.served(1)
        num_served += 1
        if account.cost(100) <= account.credit:
            tried_at.append(num_served)
            account.caught_up(100, 1000.0)
    intervals = [after - before for before, after in pairwise(tried_at)]
    assert intervals == pytest.approx([1000.0 / account.SHARE] * 2, rel=0.01)


def test_what_catching_up_cost_is_not_forgiven_for_steps_that_bring_now_more_and_now_less() -> None:
    account = CatchUpAccount()
    account.caught_up(100, 1000.0)
    owed = account.steps
    for _ in range(200):
        account.drafted(5.0 / (1.0 - account.DOUBT), 3.0)
        account.drafted(1.0 / (1.0 - account.DOUBT), 3.0)
    assert account.steps == pytest.approx(owed)


def test_a_bad_moment_does_not_close_the_account_for_long() -> None:
    """Steps with drafts that seemed to take six times as long as they do, at the start: prompts are caught up for again soon."""
    account = CatchUpAccount()
    account.caught_up(4, 8.0)
    for _ in range(30):
        account.drafted(2.0, 12.0)
    num_served = 0
    while account.cost(4) > account.credit:
        account.served(1)
        num_served += 1
    assert 1000 < num_served < 4000


def test_single_slow_steps_do_not_close_the_account() -> None:
    """One step in fifty takes as long as two hundred: those who wait for its end are not to do without drafts for long."""
    simulation = _serve(60, num_requests=100, slow_every=50)
    assert simulation.device.num_caught_up > 0.9 * 100 * PROMPT_LEN


@pytest.mark.parametrize("plain_cost", [0.001, 0.03])
def test_a_catch_up_means_the_same_to_fast_and_to_slow_models(
    monkeypatch: pytest.MonkeyPatch, plain_cost: float
) -> None:
    expected = _serve(10, num_requests=100).device.num_caught_up
    monkeypatch.setattr(DraftsInTurn, "plain_cost", plain_cost)
    assert 0 < _serve(10, num_requests=100, plain_cost=plain_cost).device.num_caught_up == expected < 100 * PROMPT_LEN


def _tokens_per_drafting_step(simulation: Simulation) -> float:
    """Tokens that a step with drafts brought its only row."""
    assert simulation.scheduler.drafts is not None
    counters = simulation.scheduler.drafts.counters
    return 1.0 + counters.num_accepted_tokens / counters.num_rounds


def test_a_request_is_drafted_for_as_it_asks() -> None:
    simulation = Simulation(Setup(draft_counts=(4,), max_model_len=64))
    for idx, limit in enumerate((None, 0, 2, 9)):
        simulation.add(make_request(f"r{idx}", [idx + 1] * 3, max_tokens=30, num_speculative_tokens=limit))
    simulation.run(200)
    drafted = {f"r{idx}": set[int]() for idx in range(4)}
    for step in simulation.steps:
        for row in step.decode:
            drafted[row.request_id].add(row.num_drafts)
    assert {request_id: max(counts) for request_id, counts in drafted.items()} == {"r0": 4, "r1": 0, "r2": 2, "r3": 4}


class _RestsAfterwards(DraftsInTurn):
    """Rests for a step after each choice of drafts, as its rounds come in."""

    def rests(self) -> bool:
        has_drafted, self._last = self._last > 0, -1
        return has_drafted or super().rests()


def test_a_head_that_was_woken_drafts_in_the_next_step_even_if_that_was_to_rest() -> None:
    simulation = Simulation(Setup(draft_counts=(3,), method="eagle3", max_model_len=64))
    assert simulation.scheduler.drafts is not None
    simulation.scheduler.drafts.policy = _RestsAfterwards((3, 0, 0, 0))
    simulation.add(make_request("r0", [1, 2, 3], max_tokens=50))
    simulation.run(200)
    kinds = ["wakes" if step.wakes_head else step.num_drafts for step in simulation.steps if step.decode]
    assert kinds.count("wakes") > 5
    assert all(after == 3 for kind, after in pairwise(kinds) if kind == "wakes")
    assert all(after == 0 for kind, after in pairwise(kinds) if kind == 3)


def test_nobody_loses_blocks_for_drafts() -> None:
    """With room for what rows surely need, and not for drafts, nobody is preempted."""
    setup = Setup(num_blocks=1 + 2 * 5, max_num_seqs=2, max_model_len=20, draft_counts=(8,), block_size=4)
    simulation = Simulation(setup)
    for idx in range(2):
        simulation.add(make_request(f"r{idx}", [idx + 1] * 4, max_tokens=16))
    simulation.run(100)
    assert simulation.scheduler.counters.num_preemptions == 0
