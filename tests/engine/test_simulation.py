"""Simulated chips under the real engine: the same decisions as on a device that computes, conservation, determinism, and both clocks."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

from quire.backends.simulated import SimulatedBackend
from quire.engine import LLM, SamplingParams
from quire.engine.config import EngineConfig
from quire.engine.core import EngineCore
from quire.engine.request import EngineCoreRequest
from quire.engine.simulation import HostCost, RealClock, SimulatedRunner, Simulation, VirtualClock, model_cost
from quire.engine.step_data import EngineCoreOutput, SchedulerOutput
from quire.kernels.errors import InvalidConfigError
from quire.models.params import param_specs
from tests.engine.draft_engines import QuickBackend, checkpoint, draft_config

RNG = np.random.default_rng(5)
TRACE = [
    (tuple(RNG.integers(3, 101, length).tolist()), max_tokens)
    for length, max_tokens in [
        (40, 20),
        (7, 9),
        (70, 30),
        (1, 25),
        (33, 5),
        (64, 18),
        (90, 12),
        (5, 40),
        (20, 1),
        (11, 33),
    ]
]
TRACE += [((*TRACE[0][0], 50, 51), 6), (TRACE[2][0], 10)]  # whose beginnings are cached by then


class SimulatedCpu(SimulatedBackend):
    """The sizes and limits of the tests' CPU backend, the times of a TPU."""

    def __init__(self) -> None:
        super().__init__("v6e:1")
        self._inner = QuickBackend()


def core(backend: Any, simulation: Simulation | None = None, clock: Any = None, **settings: Any) -> EngineCore:
    defaults = {"max_num_seqs": 4, "max_model_len": 160, "dtype": "float32", "num_kv_blocks": 20}
    config = EngineConfig.from_arguments(model=str(checkpoint()), **{**defaults, **settings})
    return EngineCore(config, backend=backend, clock=clock, simulation=simulation)


def simulated(simulation: Simulation | None = None, **settings: Any) -> EngineCore:
    return core(SimulatedCpu(), simulation or Simulation(), VirtualClock(), **settings)


def serve(engine: EngineCore, requests: Any = None) -> tuple[list[SchedulerOutput], dict[str, list[int]]]:
    """All requests at once: every step that was scheduled, and the tokens."""
    steps: list[SchedulerOutput] = []
    execute = engine.runner.execute

    def recorded(step: SchedulerOutput) -> Any:
        steps.append(step)
        return execute(step)

    engine.runner.execute = recorded  # type: ignore[method-assign]
    tokens: dict[str, list[int]] = {}
    for idx, (prompt, max_tokens) in enumerate(requests or TRACE):
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False, seed=idx)
        engine.add_request(EngineCoreRequest(str(idx), prompt, params, arrival_time=float(idx)))
    while engine.has_work:
        for output in engine.step():
            tokens.setdefault(output.request_id, []).extend(output.new_token_ids)
    engine.runner.execute = execute  # type: ignore[method-assign]
    return steps, tokens


def decisions(steps: list[SchedulerOutput]) -> list[Any]:
    """What a step is, without the tokens of those that came back."""
    return [
        (
            step.decode,
            step.prefill,
            step.block_updates,
            [(one.request_id, one.slot, one.block_ids, len(one.token_ids)) for one in step.admitted],
            step.num_decode_steps,
        )
        for step in steps
    ]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"decode_steps_per_dispatch": 3},
        {"batching": "static"},
        {"num_kv_blocks": 14, "enable_prefix_caching": False},
    ],
    ids=str,
)
def test_simulated_and_real_devices_are_scheduled_alike(settings: dict[str, Any]) -> None:
    """The golden trace is what the engine does on a device that computes."""
    real, _ = serve(core(QuickBackend(), **settings))
    found, _ = serve(simulated(**settings))
    assert decisions(found) == decisions(real)


def test_every_request_gets_its_tokens_and_every_block_comes_back() -> None:
    # Wherever blocks end, somebody has to go: 12 blocks of 16 tokens for rows of up to 100.
    engine = simulated(num_kv_blocks=12, enable_prefix_caching=False)
    steps, tokens = serve(engine)
    assert [len(tokens[str(idx)]) for idx in range(len(TRACE))] == [max_tokens for _, max_tokens in TRACE]
    assert engine.scheduler.kv_cache.usage([]).used_fraction == 0.0
    assert engine.stats().num_preemptions > 0, "the cache is meant to be too small"
    assert engine.clock.now() > 0
    assert isinstance(engine.runner, SimulatedRunner)
    assert engine.runner.busy_seconds <= engine.clock.now()
    assert len(steps) == engine.stats().num_steps


def test_the_same_requests_take_the_same_time() -> None:
    first, second = simulated(), simulated()
    assert serve(first)[1] == serve(second)[1]
    assert first.clock.now() == second.clock.now()


def test_a_chip_with_twice_the_speed_takes_half_as_long() -> None:
    host = HostCost(0.0, 0.0)
    once, twice = simulated(Simulation(host=host)), simulated(Simulation(host=host, speed=2.0))
    assert decisions(serve(once)[0]) == decisions(serve(twice)[0])
    assert twice.clock.now() == pytest.approx(once.clock.now() / 2)


def test_on_the_real_clock_steps_are_waited_for() -> None:
    engine = core(SimulatedCpu(), Simulation(speed=0.02), RealClock())
    begin = time.monotonic()
    serve(engine, TRACE[:2])
    assert isinstance(engine.runner, SimulatedRunner)
    assert engine.runner.busy_seconds > 0.05
    assert engine.runner.busy_seconds <= time.monotonic() - begin


def test_the_host_is_charged_for_on_the_virtual_clock_alone() -> None:
    virtual, real = VirtualClock(), RealClock()
    begin = virtual.now()
    virtual.spend(100.0)
    assert virtual.now() == begin + 100.0
    before = time.monotonic()
    real.spend(100.0)
    assert time.monotonic() - before < 50


@pytest.mark.parametrize(("draft", "share"), [("good", 1.0), ("good", 0.6), ("good", 0.0), ("ngram", 0.8)])
def test_drafts_are_accepted_as_often_as_is_said(draft: str, share: float) -> None:
    simulation = Simulation(acceptance=(share,))
    engine = simulated(simulation, speculative_config=draft_config(draft, 3), num_kv_blocks=200)
    _, tokens = serve(engine, [((7, 8, 9), 140)] * 8)
    assert [len(found) for found in tokens.values()] == [140] * 8
    stats = engine.stats()
    assert stats.num_draft_rounds > 50
    found = stats.num_accepted_per_pos[0] / stats.num_draft_rounds
    assert found == pytest.approx(share, abs=4 * (share * (1 - share) / stats.num_draft_rounds) ** 0.5 + 1e-9)


def test_drafts_that_are_accepted_save_time_and_others_cost_it() -> None:
    def seconds(share: float) -> float:
        engine = simulated(
            Simulation(acceptance=(share,)), speculative_config=draft_config("good", 3), num_kv_blocks=200
        )
        serve(engine, [((7, 8, 9), 140)] * 4)
        return engine.clock.now()

    plain = simulated(num_kv_blocks=200)
    serve(plain, [((7, 8, 9), 140)] * 4)
    assert seconds(0.95) < plain.clock.now() < seconds(0.0)


def test_answers_end_by_themselves_where_they_may() -> None:
    engine = simulated(Simulation(mean_output_tokens=12.0), num_kv_blocks=400)
    lengths: dict[str, int] = {}
    ends: list[EngineCoreOutput] = []
    for idx in range(60):
        params = SamplingParams(max_tokens=120, detokenize=False)
        engine.add_request(EngineCoreRequest(str(idx), (5, 6), params, arrival_time=0.0, eos_token_ids=(2,)))
    while engine.has_work:
        for output in engine.step():
            lengths[output.request_id] = lengths.get(output.request_id, 0) + len(output.new_token_ids)
            ends += [output] if output.finish_reason else []
    assert {output.finish_reason for output in ends} == {"stop"}
    assert np.mean(list(lengths.values())) == pytest.approx(12.0, rel=0.4)


def test_what_a_model_costs_is_what_its_table_of_parameters_says() -> None:
    engine = simulated()
    cost, part = model_cost(engine.plan.target), engine.plan.target
    elements = {name: float(np.prod(spec.shape)) for name, spec in param_specs(part.model).items()}
    products = sum(
        size for name, size in elements.items() if "norm" not in name and name not in ("embed_tokens", "lm_head")
    )
    assert cost.dense_flops == 2 * products
    assert cost.head_flops == 2 * elements["lm_head" if "lm_head" in elements else "embed_tokens"]
    assert sum(size for _, size in cost.kv_bytes) * part.block_size == part.block_bytes
    whole = cost.dense_bytes + cost.head_bytes
    assert whole <= part.weight_bytes <= whole + cost.head_bytes


def test_llm_runs_on_a_simulated_chip() -> None:
    llm = LLM("demo", device="simulated:v6e:1", simulated_output_tokens=8.0, max_model_len=256)
    [output] = llm.generate(["def f():"], SamplingParams(max_tokens=64), use_tqdm=False)
    assert 1 <= len(output.outputs[0].token_ids) <= 64
    assert llm.core.runner.num_programs > 0


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"simulated_speed": 2.0}, "for simulated devices"),
        ({"simulated_output_tokens": 9.0}, "for simulated devices"),
        ({"simulated_speed": 0.0, "device": "simulated:v6e"}, "above 0"),
        ({"simulated_output_tokens": 0.5, "device": "simulated:v6e"}, "at least 1"),
    ],
)
def test_what_cannot_be_simulated_is_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidConfigError, match=says):
        LLM("demo", max_model_len=256, **settings)
