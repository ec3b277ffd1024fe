"""The round as one dispatch, beside the same round as two with the host in between: what drafting in the step itself saves.

Both are made of the halves that `quire.engine.step` is made of, and run in the same engine on the same requests: every few steps its
programs are replaced by two each, where the host reads the drafts before it launches the second, and put back. That is the least an
engine that drafts apart has to do; one that launches a program for each draft does more.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from quire.backends.base import Program, StepShape
from quire.bench.peers.report import Figure
from quire.bench.speculate.contenders import Contender
from quire.bench.speculate.rounds import Case, OtherLoad, Record, Serving, Tokens, Workload, add_requests, equality
from quire.engine import LLM, SamplingParams
from quire.engine.core import EngineCore
from quire.engine.device_state import StateSplit
from quire.engine.drafting import Weights
from quire.engine.model_runner import ModelRunner
from quire.engine.programs import EVERYWHERE, ProgramSource, everywhere, specs_of, spread
from quire.engine.step import Leaves, ModelInput, StepConfig, StepOutput, begin_step, draft, verify, with_step_axis
from quire.kernels.errors import InvalidConfigError
from quire.kernels.sampling.rows import SamplingMode

BLOCK = 4


def runner_of(core: EngineCore) -> ModelRunner:
    """The runner of an engine whose device is a real one."""
    assert isinstance(core.runner, ModelRunner), core.runner
    return core.runner


class UnfusedRound:
    """A step of one shape as two programs. Called as the step's own program is."""

    def __init__(self, core: EngineCore, shape: StepShape) -> None:
        """Compiles both."""
        assert shape.num_drafts > 0, shape
        assert shape.num_decode_steps == 1, shape
        plan, source = core.plan, runner_of(core).step_source(shape)
        assert source.split is not None, shape
        mesh, backend = plan.mesh, plan.backend
        changed_specs = specs_of(source.arguments[2])
        num_drafts = jax.ShapeDtypeStruct((shape.decode_rows,), np.int32, sharding=everywhere(mesh))

        def build(function: Program, arguments: tuple[Any, ...]) -> Program:
            program = spread(function, arguments, (changed_specs, EVERYWHERE), mesh)
            return backend.compile(ProgramSource(shape, program, arguments, source.donate).lower(backend))

        self._draft = build(_draft_program(plan.step_config, shape, source.split), source.arguments)
        self._verify = build(_verify_program(plan.step_config, shape, source.split), (*source.arguments, num_drafts))

    def __call__(
        self, weights: Weights, held: Leaves, changed: Leaves, inputs: ModelInput
    ) -> tuple[Leaves, StepOutput]:
        """(changed, StepOutput), as of the step's own program."""
        changed, drafts = self._draft(weights, held, changed, inputs)
        num_drafts, _ = jax.device_get(drafts)  # waits for the device
        verified: tuple[Leaves, StepOutput] = self._verify(weights, held, changed, inputs, num_drafts)
        return verified


def _draft_program(config: StepConfig, shape: StepShape, split: StateSplit) -> Program:
    def run(
        weights: Weights, held: Leaves, changed: Leaves, inputs: ModelInput
    ) -> tuple[Leaves, tuple[jax.Array, jax.Array]]:
        """The number of drafts of each row [R] int32, and the drafts [R, K] int32, for the host."""
        state = split.join(held, changed)
        begun, rows = begin_step(shape, state.slots, inputs)
        state, num_drafts = draft(config, shape, weights, state, begun, rows)
        places = rows.num_tokens[:, None] + jnp.arange(shape.num_drafts, dtype=jnp.int32)[None, :]
        places = jnp.minimum(places, state.slots.tokens.shape[1] - 1)
        return split.changed_of(state, held), (num_drafts, state.slots.tokens[rows.slots[:, None], places])

    return run


def _verify_program(config: StepConfig, shape: StepShape, split: StateSplit) -> Program:
    def run(
        weights: Weights, held: Leaves, changed: Leaves, inputs: ModelInput, num_drafts: jax.Array
    ) -> tuple[Leaves, StepOutput]:
        state = split.join(held, changed)
        begun, rows = begin_step(shape, state.slots, inputs)
        state, output = verify(config, shape, weights, state, begun, rows, num_drafts)
        return split.changed_of(state, held), with_step_axis(output)

    return run


def compare_fused(
    contender: Contender,
    cases: Sequence[Case],
    workload: Workload,
    num_rounds: int,
    say: Callable[[str], None],
) -> list[Record]:
    """A record for each case: milliseconds of a full step of a contender with a fixed number of drafts, fused and unfused."""
    core = contender.llm.core
    shapes = [shape for shape in runner_of(core).programs if _is_measured(shape, contender)]
    say(f"compiling the unfused rounds of {contender.name}")
    programs = {shape: UnfusedRound(core, shape) for shape in shapes}
    return [_compare(contender, programs, case, workload, num_rounds, say) for case in cases]


def _is_measured(shape: StepShape, contender: Contender) -> bool:
    return (
        shape.num_drafts == contender.num_drafts and shape.num_decode_steps == 1 and shape.sampling < SamplingMode.FULL
    )


def _compare(
    contender: Contender,
    unfused: dict[StepShape, UnfusedRound],
    case: Case,
    workload: Workload,
    num_rounds: int,
    say: Callable[[str], None],
) -> Record:
    contender.use(contender.new_experience())
    fused_ms: list[float] = []
    unfused_ms: list[float] = []
    tokens: list[Tokens] = []
    expected: list[Tokens] = []
    load = OtherLoad()
    for idx in range(num_rounds + 1):
        requests = workload.requests(case, idx)
        expected.append(Serving(contender.llm, *requests).finish().tokens)
        found = timed_steps(contender.llm, *requests, unfused, begins_unfused=idx % 2 == 1)
        tokens.append(found.tokens)
        if idx:  # the first warms up
            fused_ms.append(1e3 * statistics.median(found.fused))
            unfused_ms.append(1e3 * statistics.median(found.unfused))
    saved = [apart - one for one, apart in zip(fused_ms, unfused_ms, strict=True)]
    record: Record = {
        "benchmark": "speculate",
        "part": "unfused",
        **asdict(case),
        "name": contender.name,
        "method": contender.method,
        "num_drafts": contender.num_drafts,
        "other_load": load.so_far(),
        "fused_ms": asdict(Figure.of(fused_ms)),
        "unfused_ms": asdict(Figure.of(unfused_ms)),
        "saved_ms": asdict(Figure.of(saved)),
        "saved_share": asdict(Figure.of([ms / apart for ms, apart in zip(saved, unfused_ms, strict=True)])),
        **equality(tokens, expected),
    }
    say(
        f"{contender.name}, {case.title}: {record['fused_ms']['median']:.4g} ms fused, "
        f"{record['unfused_ms']['median']:.4g} unfused"
    )
    return record


@dataclass(frozen=True)
class TimedSteps:
    """Seconds of steps in which all requests decode, and the tokens of each request."""

    fused: list[float]
    unfused: list[float]
    tokens: Tokens


def timed_steps(
    llm: LLM,
    prompts: Tokens,
    params: Sequence[SamplingParams],
    unfused: dict[StepShape, UnfusedRound],
    *,
    begins_unfused: bool,
) -> TimedSteps:
    """Runs the requests, `BLOCK` steps fused and `BLOCK` unfused in turns, so that both see the same moods of the machine.

    The first step of each block is left out: it waits for one of the other way. Raises InvalidConfigError where there are too few steps.
    """
    core = llm.core
    add_requests(llm, prompts, params)
    fused = {shape: runner_of(core).programs[shape] for shape in unfused}
    tokens: list[list[int]] = [[] for _ in prompts]
    seconds: dict[bool, list[float]] = {False: [], True: []}
    num_steps = 0
    try:
        while core.has_work:
            is_unfused = (num_steps // BLOCK % 2 == 1) != begins_unfused
            runner_of(core).programs.update(unfused if is_unfused else fused)
            begin = time.perf_counter()
            outputs = core.step()
            elapsed = time.perf_counter() - begin
            # A request's first token ends a step of prompts.
            if len(outputs) == len(prompts) and all(tokens):
                if num_steps % BLOCK:
                    seconds[is_unfused].append(elapsed)
                num_steps += 1
            for output in outputs:
                tokens[int(output.request_id)] += output.new_token_ids
    finally:
        runner_of(core).programs.update(fused)
    if not (seconds[True] and seconds[False]):
        raise InvalidConfigError(
            f"outputs end after {num_steps} rounds, and {2 * BLOCK} are needed to time both ways: raise max_tokens"
        )
    return TimedSteps(seconds[False], seconds[True], tokens)
