"""Runs scheduled steps on a device: owns the parameters, the device's state and the compiled programs."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from quire.backends.base import Backend, Program, StepShape
from quire.engine.compilation import CompilationCounter
from quire.engine.device_state import DeviceState, Slots, empty_kv_cache, empty_row, empty_slots, request_row, write_row
from quire.engine.input_batch import BatchLayout, InputBatch, ShapeChooser
from quire.engine.step import ModelInput, StepConfig, StepOutput, make_step
from quire.engine.step_data import ModelRunnerOutput, SchedulerOutput, StepLimits, TokenLogprobs
from quire.kernels.sampling.rows import Logprobs
from quire.models.config import ModelConfig

logger = logging.getLogger(__name__)

# The compiler releases the GIL and uses several cores by itself; two at once keep them busy while the third is traced.
MAX_COMPILE_THREADS = 2


@dataclass(frozen=True)
class RunnerConfig:
    """What the runner must know beside the model: sizes of the state and of the cache."""

    max_num_seqs: int
    max_model_len: int
    num_kv_blocks: int
    block_size: int
    dtype: str


@dataclass(frozen=True)
class Dispatched:
    """A step that was launched and not read yet."""

    step: SchedulerOutput
    layout: BatchLayout
    output: StepOutput


@dataclass
class RunnerCounters:
    """Counts since the start; only ever grow."""

    num_real_tokens: int = 0
    num_padding_tokens: int = 0


class ModelRunner:
    """Launches steps in order and reads them in order; a step may be launched before the last one was read.

    The device's state is donated to every program, so only the newest one is kept. Knows slots, not requests.
    """

    def __init__(
        self,
        model: ModelConfig,
        params: Any,
        backend: Backend,
        step_config: StepConfig,
        config: RunnerConfig,
        limits: StepLimits,
        shapes: Sequence[StepShape],
    ) -> None:
        self._model = model
        self._params = params
        self._backend = backend
        self.step_config = step_config
        self._config = config
        self._shapes = tuple(shapes)
        blocks_per_row = -(-config.max_model_len // config.block_size)
        chooser = ShapeChooser(shapes, config.block_size)
        self._batch = InputBatch(limits, config.max_num_seqs, blocks_per_row, config.block_size, chooser)
        self.programs: dict[StepShape, Program] = {}
        self._write_row: Program | None = None
        self.compilations = CompilationCounter()
        self.counters = RunnerCounters()
        self.state = DeviceState(
            kv_cache=empty_kv_cache(
                model,
                backend.capabilities,
                config.num_kv_blocks,
                config.block_size,
                config.dtype,
                step_config.ops.new_cache.function,
            ),
            slots=empty_slots(config.max_num_seqs, config.max_model_len, model.vocab_size),
        )

    # ---- before the first request

    def warm_up(self, progress: Callable[[int, int, str], None] | None = None) -> float:
        """Compiles every shape; `progress(done, total, what)` is called after each. Returns the seconds it took.

        Whatever is compiled afterwards is counted and logged as a defect.
        """
        begin = time.perf_counter()
        row = empty_row(self._config.max_model_len, self._model.vocab_size)
        jobs: dict[StepShape | None, Any] = {None: (write_row, (self.state.slots, np.int32(0), row), (0,))}
        for shape in self._shapes:
            jobs[shape] = (make_step(self.step_config, shape), self.abstract_arguments(shape), (1,))
        with ThreadPoolExecutor(min(MAX_COMPILE_THREADS, len(jobs))) as pool:
            futures = {pool.submit(self._build, *job): shape for shape, job in jobs.items()}
            for num_done, future in enumerate(as_completed(futures), start=1):
                built = futures[future]
                if built is None:
                    self._write_row = future.result()
                else:
                    self.programs[built] = future.result()
                if progress is not None:
                    progress(num_done, len(jobs), "slot update" if built is None else built.describe())
        self._write(self._config.max_num_seqs, row)
        jax.block_until_ready(self.state)
        self.compilations.finish_warm_up()
        return time.perf_counter() - begin

    def _build(self, program: Program, arguments: Sequence[Any], donate: Sequence[int]) -> Program:
        abstract = jax.tree.map(_abstract, arguments)
        with self.compilations.counting():
            return self._backend.compile(self._backend.lower(program, abstract, donate))

    def abstract_arguments(self, shape: StepShape) -> tuple[Any, DeviceState, ModelInput]:
        """Shapes and dtypes of a step's parameters, state and inputs, for lowering it."""
        params, state = jax.tree.map(_abstract, (self._params, self.state))
        return params, state, _abstract_inputs(shape)

    # ---- a step

    def execute(self, step: SchedulerOutput) -> Dispatched:
        """Launches a step; returns without waiting for it."""
        for admitted in step.admitted:
            self._batch.admit(admitted)
            self._write(admitted.slot, request_row(admitted, self._config.max_model_len, self._model.vocab_size))
        inputs, layout = self._batch.build(step)
        self.state, output = self.programs[layout.shape](self._params, self.state, inputs)
        jax.tree.map(lambda leaf: leaf.copy_to_host_async(), output)
        self.counters.num_real_tokens += step.num_tokens
        self.counters.num_padding_tokens += layout.shape.num_tokens * step.num_decode_steps - step.num_tokens
        return Dispatched(step, layout, output)

    def wait(self, dispatched: Dispatched) -> None:
        """Blocks until the device has finished a launched step."""
        jax.block_until_ready(dispatched.output)

    def read(self, dispatched: Dispatched) -> ModelRunnerOutput:
        """Gives a launched step's tokens, row by row as they were scheduled."""
        step, layout, output = dispatched.step, dispatched.layout, dispatched.output
        columns = np.asarray(output.token_ids).T.tolist()  # [R + P][N]
        counts = [row.num_tokens for row in step.decode] + [1] * (len(layout.sampled_rows) - len(step.decode))
        token_ids = [columns[row][:count] for row, count in zip(layout.sampled_rows, counts, strict=True)]
        if output.logprobs is None:
            row_logprobs: list[list[TokenLogprobs] | None] = [None] * len(token_ids)
        else:
            logprobs = jax.tree.map(np.asarray, output.logprobs)
            rows = zip(layout.sampled_rows, counts, layout.num_logprobs, strict=True)
            row_logprobs = [
                None if num_top is None else [_token_logprobs(logprobs, (n, row), num_top) for n in range(count)]
                for row, count, num_top in rows
            ]
        return ModelRunnerOutput(token_ids, row_logprobs, self._prompt_logprobs(dispatched))

    def _write(self, slot: int, row: Slots) -> None:
        assert self._write_row is not None, "warm_up comes first"
        self.state = self.state.replace(slots=self._write_row(self.state.slots, np.int32(slot), row))  # type: ignore[attr-defined]

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


def _token_logprobs(logprobs: Logprobs, place: tuple[int, int], num_top: int) -> TokenLogprobs:
    return TokenLogprobs(
        logprob=float(logprobs.token_logprobs[place]),
        rank=int(logprobs.token_ranks[place]),
        top_ids=tuple(logprobs.top_ids[place][:num_top].tolist()),
        top_logprobs=tuple(logprobs.top_logprobs[place][:num_top].tolist()),
    )


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def _abstract_inputs(shape: StepShape) -> ModelInput:
    rows, tiles, blocks = shape.decode_rows, shape.prefill_tiles, shape.context_blocks

    def ints(*dims: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(dims, np.int32)

    return ModelInput(
        decode_slots=ints(rows),
        decode_tables=ints(rows, blocks),
        tile_slots=ints(tiles),
        tile_starts=ints(tiles),
        tile_lens=ints(tiles),
        tile_samples=jax.ShapeDtypeStruct((tiles,), np.bool_),
        tile_tables=ints(tiles, blocks),
    )
