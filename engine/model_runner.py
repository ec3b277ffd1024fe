"""Runs scheduled steps on a device: owns the parameters, the device's state and the compiled programs."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from quire.backends.base import Program, StepShape
from quire.engine.compilation import CompilationCounter
from quire.engine.device_state import DeviceState, Slots, StateSplit, empty_row, empty_slots, request_row, row_record
from quire.engine.drafting import Weights
from quire.engine.input_batch import BatchLayout, InputBatch, ShapeChooser
from quire.engine.planning import EnginePlan
from quire.engine.programs import (
    ProgramSource,
    build_all,
    on_every_device,
    slot_update_source,
    step_source,
    weights_of,
)
from quire.engine.step import StepOutput
from quire.engine.step_data import DraftRound, ModelRunnerOutput, SchedulerOutput, TokenLogprobs
from quire.kernels.sampling.rows import Logprobs


@dataclass(frozen=True)
class Dispatched:
    """A step that was launched and not read yet."""

    step: SchedulerOutput
    layout: BatchLayout
    output: StepOutput
    launched_at: float
    """By time.monotonic."""


@dataclass
class RunnerCounters:
    """Counts since the start; only ever grow."""

    num_real_tokens: int = 0
    num_padding_tokens: int = 0
    """That were computed: none where kernels leave padding out."""


class Launched(Protocol):
    """A step that some runner has launched."""

    @property
    def step(self) -> SchedulerOutput: ...

    @property
    def launched_at(self) -> float:
        """By the engine's clock."""
        ...


class Runner(Protocol):
    """Runs steps in order: `ModelRunner`, or what stands for it where the device is simulated."""

    compilations: CompilationCounter
    counters: RunnerCounters

    @property
    def num_programs(self) -> int:
        """How many were compiled for steps."""
        ...

    def warm_up(self, progress: Callable[[int, int, str], None] | None = None) -> float:
        """Before the first request; the seconds it took."""
        ...

    def execute(self, step: SchedulerOutput) -> Launched:
        """Launches a step; returns without waiting for it."""
        ...

    def wait(self, dispatched: Any) -> None:
        """Blocks until the device has finished a step that `execute` launched."""
        ...

    def read(self, dispatched: Any) -> ModelRunnerOutput:
        """Gives its tokens, row by row as they were scheduled."""
        ...


class ModelRunner:
    """Launches steps in order and reads them in order; a step may be launched before the last one was read.

    What a program changes of the device's state is donated to it, so only the newest one is kept. Knows slots, not requests.
    """

    def __init__(self, plan: EnginePlan, weights: Weights) -> None:
        """Allocates the state; the weights are what the placements of `plan.models` placed."""
        self._plan = plan
        self._weights = weights
        resolved, shapes = plan.resolved, plan.shapes
        blocks_per_row = -(-resolved.max_model_len // resolved.block_size)
        chooser = ShapeChooser(shapes, resolved.block_size)
        self._batch = InputBatch(resolved.limits, resolved.max_num_seqs, blocks_per_row, resolved.block_size, chooser)
        self.step_config = plan.step_config
        self.programs: dict[StepShape, Program] = {}
        # What of the state and of the weights each of them takes.
        self._arguments: dict[StepShape, tuple[StateSplit, Weights]] = {}
        self._write_row: Program | None = None
        self.compilations = CompilationCounter()
        self.counters = RunnerCounters()
        caches = [
            part.cache_arrays(resolved.num_kv_blocks).allocate(
                part.ops.kv_cache.function, plan.mesh, plan.backend.memory
            )
            for part in plan.models
        ]
        slots = on_every_device(
            empty_slots(resolved.max_num_seqs, resolved.max_model_len, plan.model.vocab_size),
            plan.mesh,
            plan.backend.memory,
        )
        state = DeviceState(caches[0], slots, *caches[1:])
        if plan.features_shape is not None:
            features = np.zeros(plan.features_shape, jnp.dtype(plan.target.dtype))
            state = state.replace(  # type: ignore[attr-defined]
                draft_features=on_every_device(features, plan.mesh, plan.backend.memory)
            )
        self._leaves, self._treedef = jax.tree.flatten(state)
        # Of the sink, which stays so.
        self._empty_row = row_record(resolved.max_num_seqs, empty_row(resolved.max_model_len, plan.model.vocab_size))
        # Which of them are the slots.
        self._slots_split = StateSplit(state, [field.name for field in dataclasses.fields(Slots)])

    @property
    def state(self) -> DeviceState:
        """The newest; its arrays are gone once another step was launched."""
        state: DeviceState = jax.tree.unflatten(self._treedef, self._leaves)
        return state

    @property
    def num_programs(self) -> int:
        """How many were compiled for steps."""
        return len(self.programs)

    # ---- before the first request

    def warm_up(self, progress: Callable[[int, int, str], None] | None = None) -> float:
        """Compiles every shape; `progress(done, total, what)` is called after each. Returns the seconds it took.

        Each program then runs once, on nothing: what it takes to load it, and whether its memory is there, is not found out by a
        request. Whatever is compiled afterwards is counted and logged as a defect.
        """
        begin = time.perf_counter()
        sources = [self.step_source(shape) for shape in self._plan.shapes]
        slot_update = slot_update_source(self.state.slots, self._plan.mesh)
        *programs, self._write_row = build_all(self._plan.backend, [*sources, slot_update], self._build, progress)
        self.programs = dict(zip(self._plan.shapes, programs, strict=True))
        self._arguments = {
            source.shape: (source.split, weights_of(self.step_config, source.shape, self._weights))
            for source in sources
            if source.shape and source.split
        }
        self._write(self._empty_row)
        for shape in self._plan.shapes:
            self._run(shape, self._batch.padding(shape))
        jax.block_until_ready(self._leaves)
        self.compilations.finish_warm_up()
        return time.perf_counter() - begin

    def _build(self, source: ProgramSource) -> Program:
        with self.compilations.counting():
            return self._plan.backend.compile(source.lower(self._plan.backend))

    def step_source(self, shape: StepShape) -> ProgramSource:
        """A step's program before it is compiled."""
        return step_source(self.step_config, shape, self._weights, self.state, self._plan.mesh)

    # ---- a step

    def execute(self, step: SchedulerOutput) -> Dispatched:
        """Launches a step; returns without waiting for it."""
        launched_at = time.monotonic()
        for admitted in step.admitted:
            self._batch.admit(admitted)
            self._write(request_row(admitted, self._empty_row))
        inputs, layout = self._batch.build(step)
        if step.catch_up:
            shape, catch_up = self._batch.build_catch_up(step)
            self._run(shape, catch_up)
        output = self._run(layout.shape, inputs)
        if not self._plan.backend.capabilities.has_host_memory:
            jax.tree.map(lambda leaf: leaf.copy_to_host_async(), output)
        self.counters.num_real_tokens += step.num_tokens
        if not self._plan.ops.is_padding_free:
            self.counters.num_padding_tokens += layout.shape.num_tokens * step.num_decode_steps - step.num_tokens
        return Dispatched(step, layout, output, launched_at)

    def _run(self, shape: StepShape, inputs: Any) -> Any:
        """Launches a program, and gives its output."""
        leaves, (split, weights) = self._leaves, self._arguments[shape]
        changed, output = self.programs[shape](weights, split.held(leaves), split.changed(leaves), inputs)
        self._keep(split, changed)
        return output

    def _keep(self, split: StateSplit, changed: Sequence[Any]) -> None:
        """A program has given back these leaves of the state."""
        for idx, leaf in zip(split.changed_at, changed, strict=True):
            self._leaves[idx] = leaf

    def wait(self, dispatched: Dispatched) -> None:
        """Blocks until the device has finished a launched step."""
        jax.block_until_ready(dispatched.output)

    def read(self, dispatched: Dispatched) -> ModelRunnerOutput:
        """Gives a launched step's tokens, row by row as they were scheduled."""
        step, layout, output = dispatched.step, dispatched.layout, dispatched.output
        sampled: list[list[int]] = np.asarray(output.sampled).tolist()  # [N, R x W + P (+ 2 x R)]
        num_emitted: list[list[int]] | None = None
        rounds: list[list[DraftRound]] = []
        if layout.shape.num_drafts:
            num_emitted, rounds = _emitted(step, layout.shape, sampled)
        places = _places(step, layout, num_emitted)
        token_ids = [[sampled[n][column] for n, column in row] for row in places]
        row_logprobs: list[list[TokenLogprobs] | None] = [None] * len(token_ids)
        if output.logprobs is not None:
            logprobs = jax.tree.map(np.asarray, output.logprobs)
            row_logprobs = [
                None if num_top is None else [_token_logprobs(logprobs, place, num_top) for place in row]
                for row, num_top in zip(places, layout.num_logprobs, strict=True)
            ]
        return ModelRunnerOutput(token_ids, row_logprobs, self._prompt_logprobs(dispatched), rounds)

    def _write(self, row: np.ndarray) -> None:
        assert self._write_row is not None, "warm_up comes first"
        slots = self._write_row(self.state.slots, row.view(np.uint32))
        self._keep(self._slots_split, jax.tree.leaves(slots))

    def _prompt_logprobs(self, dispatched: Dispatched) -> dict[str, list[TokenLogprobs]]:
        if dispatched.output.prompt_logprobs is None:
            return {}
        layout = dispatched.layout
        logprobs: Logprobs = jax.tree.map(np.asarray, dispatched.output.prompt_logprobs)
        found = {}
        chunks = zip(
            dispatched.step.prefill, layout.first_tiles, layout.prompt_targets, layout.num_prompt_logprobs, strict=True
        )
        for chunk, first_tile, count, num_top in chunks:
            if count:
                places = (divmod(idx, layout.shape.tile_size) for idx in range(count))
                found[chunk.request_id] = [
                    _token_logprobs(logprobs, (first_tile + tile, offset), num_top) for tile, offset in places
                ]
        return found


def _emitted(
    step: SchedulerOutput, shape: StepShape, sampled: list[list[int]]
) -> tuple[list[list[int]], list[list[DraftRound]]]:
    """For each decode row of a step with drafts, how many tokens each decode step brought it, and what came of its drafts."""
    num_rows, counts_at = len(step.decode), shape.decode_rows * shape.decode_width + shape.prefill_tiles
    drafts_at = counts_at + shape.decode_rows
    counts = [[one[counts_at + row] for one in sampled] for row in range(num_rows)]
    drafts = [[one[drafts_at + row] for one in sampled] for row in range(num_rows)]
    return counts, [
        [DraftRound(proposed, emitted - 1) for proposed, emitted in zip(*row, strict=True) if emitted]
        for row in zip(drafts, counts, strict=True)
    ]


def _places(
    step: SchedulerOutput, layout: BatchLayout, num_emitted: list[list[int]] | None
) -> list[list[tuple[int, int]]]:
    """For each row that samples, where its tokens stand: (decode step, column). Beyond a row's end they are whatever there is."""
    width = layout.shape.decode_width
    if num_emitted is None:
        decoded = [[(n, idx) for n in range(row.num_tokens)] for idx, row in enumerate(step.decode)]
    else:
        decoded = [
            [(n, idx * width + offset) for n, count in enumerate(counts) for offset in range(count)]
            for idx, counts in enumerate(num_emitted)
        ]
    return decoded + [[(0, column)] for column in layout.sampled_tiles]


def _token_logprobs(logprobs: Logprobs, place: tuple[int, int], num_top: int) -> TokenLogprobs:
    return TokenLogprobs(
        logprob=float(logprobs.token_logprobs[place]),
        rank=int(logprobs.token_ranks[place]),
        top_ids=tuple(logprobs.top_ids[place][:num_top].tolist()),
        top_logprobs=tuple(logprobs.top_logprobs[place][:num_top].tolist()),
    )
