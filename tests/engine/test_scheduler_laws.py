"""Whatever the schedule, a request gives what it gives alone, blocks are accounted for, and everyone finishes."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from quire.engine.admission import BATCHING_POLICIES
from quire.engine.request import EngineCoreRequest
from quire.engine.speculation import METHODS
from tests.engine.fake_model import STEP_SECONDS, VOCAB_SIZE, Setup, Simulation, completed_alone, make_request

MAX_MODEL_LEN = 40


@dataclass(frozen=True)
class Traffic:
    """Requests with the step at which each arrives, and the step at which some are aborted."""

    arrivals: tuple[tuple[int, EngineCoreRequest], ...]
    aborts: dict[str, int]


@st.composite
def setups(draw: st.DrawFn) -> Setup:
    block_size = draw(st.sampled_from([1, 2, 4, 5, 16]))
    tile_size = draw(st.sampled_from([1, 3, 4, 8]))
    max_num_seqs = draw(st.integers(1, 6))
    max_prefill_tiles = draw(st.integers(1, 4))
    blocks_per_request = -(-MAX_MODEL_LEN // block_size)
    policy = draw(st.sampled_from(BATCHING_POLICIES))
    return Setup(
        num_blocks=1 + blocks_per_request + draw(st.integers(0, 2 * blocks_per_request)),
        block_size=block_size,
        max_num_seqs=max_num_seqs,
        tile_size=tile_size,
        max_prefill_tiles=max_prefill_tiles,
        max_num_batched_tokens=max_num_seqs + tile_size * max_prefill_tiles - draw(st.integers(0, tile_size - 1)),
        max_model_len=MAX_MODEL_LEN,
        mixed_batches=draw(st.booleans()),
        enable_prefix_caching=draw(st.booleans()),
        sliding_window=draw(st.none() | st.integers(1, 20)),
        policy=policy,  # type: ignore[arg-type]
        decode_steps_per_dispatch=draw(st.integers(1, 4)),
        max_in_flight=draw(st.integers(0, 2)),
        priority_seconds=draw(st.sampled_from([0.0, 1.0])),
        draft_counts=draw(st.sampled_from([(), (1,), (4,), (0, 3, 1), (2, 2, 2, 0, 0, 0, 0, 0), (8, 0, 0)])),
        method=draw(st.sampled_from(METHODS)),  # type: ignore[arg-type]
    )


@st.composite
def traffics(draw: st.DrawFn) -> Traffic:
    stem = draw(st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=MAX_MODEL_LEN - 1))
    arrivals, aborts = [], {}
    arrival_step = 0
    for idx in range(draw(st.integers(1, 10))):
        shared = draw(st.integers(0, len(stem)))
        own = draw(st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=4))
        prompt = (stem[:shared] + own or [1])[: MAX_MODEL_LEN - 1]
        arrival_step += draw(st.sampled_from([0, 0, 0, 1, 3, 20]))
        max_tokens = draw(st.none() | st.integers(1, MAX_MODEL_LEN))
        request = make_request(
            f"r{idx}",
            prompt,
            max_tokens=max_tokens,
            arrival_time=arrival_step * STEP_SECONDS,
            priority=draw(st.integers(-2, 2)),
            cache_salt=draw(st.sampled_from([None, None, "a", "b"])),
            ignore_eos=draw(st.booleans()),
            stop_token_ids=draw(st.sampled_from([(), (3,), (4, 5)])),
            min_tokens=draw(st.integers(0, min(max_tokens or 6, 6))),
            logprobs=draw(st.sampled_from([None, 0])),
            prompt_logprobs=draw(st.sampled_from([None, None, 0])),
            num_speculative_tokens=draw(st.sampled_from([None, None, None, 0, 2])),
        )
        arrivals.append((arrival_step, request))
        if draw(st.integers(0, 4)) == 0:
            aborts[request.request_id] = arrival_step + draw(st.integers(0, 30))
    return Traffic(tuple(arrivals), aborts)


def run(setup: Setup, traffic: Traffic) -> Simulation:
    """Runs the traffic to its end, within a number of steps that no sound schedule comes near."""
    simulation = Simulation(setup)
    arrivals = list(traffic.arrivals)

    def between(step_idx: int) -> None:
        while arrivals and arrivals[0][0] <= step_idx:
            simulation.add(arrivals.pop(0)[1])
        for request_id, abort_step in traffic.aborts.items():
            if abort_step == step_idx and request_id in simulation.scheduler.requests:
                assert simulation.abort(request_id)
                simulation.scheduler.check()

    last_arrival = arrivals[-1][0]
    for step_idx in range(last_arrival + 1):
        between(step_idx)
        simulation.step()
    simulation.run(200 + 60 * len(traffic.arrivals), lambda step_idx: between(last_arrival + 1 + step_idx))
    return simulation


@settings(max_examples=300)
@given(setups(), traffics())
def test_every_request_gives_the_tokens_that_it_gives_alone_and_frees_every_block(
    setup: Setup, traffic: Traffic
) -> None:
    simulation = run(setup, traffic)
    for _, source in traffic.arrivals:
        gathered, alone = simulation.gathered[source.request_id], completed_alone(source, MAX_MODEL_LEN)
        if source.request_id in simulation.finished:
            assert gathered.completion == alone
            wanted = range(1, len(source.prompt_token_ids)) if source.params.prompt_logprobs is not None else ()
            assert gathered.prompt_positions == list(wanted)
        else:
            assert source.request_id in traffic.aborts
            assert tuple(gathered.token_ids) == alone.token_ids[: len(gathered.token_ids)]
