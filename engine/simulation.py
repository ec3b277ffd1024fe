"""Steps that take the time of a chip that is not here, for the real scheduler, cache manager and server.

`SimulatedRunner` stands where the model runner stands. It knows of each slot how many tokens it has, and makes tokens up; what a step
takes is worked out from what is in it. Time is that of a clock: a virtual one, which jumps from step to step, or the
real one, for which a step waits.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import jax.numpy as jnp
import numpy as np

from quire.backends.base import StepShape
from quire.backends.roofline import ModelCost, Roofline, Work
from quire.backends.simulated import SimulatedBackend
from quire.engine.compilation import CompilationCounter
from quire.engine.draft_scheduler import MAX_DRAFT_LAG
from quire.engine.input_batch import InputBatch, ShapeChooser
from quire.engine.loading import planned_weight_bytes
from quire.engine.model_plan import ModelPlan
from quire.engine.model_runner import RunnerCounters
from quire.engine.planning import EnginePlan
from quire.engine.step_data import (
    AdmittedRequest,
    DraftRound,
    ModelRunnerOutput,
    SchedulerOutput,
    TokenLogprobs,
)
from quire.models.eagle import eagle_specs
from quire.models.params import ParamSpec, param_specs


class Clock(Protocol):
    """What an engine takes the time from, in seconds."""

    def now(self) -> float: ...

    def wait_until(self, moment: float) -> None:
        """Returns once it is so late."""
        ...

    def spend(self, seconds: float) -> None:
        """The host has worked for so long."""
        ...


class RealClock:
    """time.monotonic."""

    def now(self) -> float:
        return time.monotonic()

    def wait_until(self, moment: float) -> None:
        if (seconds := moment - time.monotonic()) > 0:
            time.sleep(seconds)

    def spend(self, seconds: float) -> None:
        """That time has gone by itself."""


class VirtualClock:
    """Stands still until somebody waits."""

    def __init__(self) -> None:
        self._now = 0.0

    def now(self) -> float:
        return self._now

    def wait_until(self, moment: float) -> None:
        self._now = max(self._now, moment)

    def spend(self, seconds: float) -> None:
        self._now += seconds


@dataclass(frozen=True)
class HostCost:
    """What scheduling and launching a step takes the host on a virtual clock, while the device runs the step before."""

    step_seconds: float = 400e-6
    row_seconds: float = 5e-6


@dataclass(frozen=True)
class Simulation:
    """How an engine on simulated devices behaves beyond what its backend says."""

    acceptance: tuple[float, ...] = (0.7,)
    """Of the drafts that come to be tested at each position, the share that the target would have sampled; the last holds for all after."""
    mean_output_tokens: float | None = None
    """Requests that may end by themselves do after so many tokens in the mean, exponentially distributed; None is never."""
    speed: float = 1.0
    """On the real clock, how many times faster than the chip steps go by."""
    host: HostCost = field(default_factory=HostCost)


def model_cost(part: ModelPlan) -> ModelCost:
    """What a model is to each device that shares it."""
    model, size, itemsize = part.model, part.mesh.size, jnp.dtype(part.dtype).itemsize
    specs = list((param_specs(model) if part.head is None else eagle_specs(part.head)).values())

    def bytes_of(some: Sequence[ParamSpec]) -> int:
        return planned_weight_bytes(some, model, part.backend.capabilities, part.dtype, part.quantization, size)

    def elements_of(some: Sequence[ParamSpec]) -> float:
        return float(sum(np.prod(spec.shape) for spec in some if len(spec.layer_shape) > 1))

    head_name = "lm_head" if any(spec.name == "lm_head" for spec in specs) else "embed_tokens"
    head = [spec for spec in specs if spec.name == head_name]
    experts = [spec for spec in specs if spec.num_experts is not None]
    dense = [spec for spec in specs if spec.name not in ("embed_tokens", "lm_head") and spec.num_experts is None]
    num_experts, per_token = (0, 0) if model.moe is None else (model.moe.num_experts, model.moe.num_experts_per_tok)
    kv_bytes = part.block_bytes // (part.block_size * model.num_layers)
    pair_flops = 4.0 * model.num_heads / size * model.head_dim
    windows = sorted(set(model.sliding_windows), key=lambda window: window or 0)
    layers = {window: model.sliding_windows.count(window) for window in windows}
    return ModelCost(
        num_layers=model.num_layers,
        dense_bytes=bytes_of(dense),
        dense_flops=2 * elements_of(dense) / size,
        expert_bytes=bytes_of(experts) // num_experts if num_experts else 0,
        expert_flops=2 * elements_of(experts) / num_experts * per_token / size if num_experts else 0.0,
        num_experts=num_experts,
        experts_per_token=per_token,
        head_bytes=bytes_of(head),
        head_flops=2 * elements_of(head) / size,
        token_bytes=model.hidden_size * itemsize,
        kv_bytes=tuple((window, count * kv_bytes) for window, count in layers.items()),
        pair_flops=tuple((window, count * pair_flops) for window, count in layers.items()),
    )


@dataclass(frozen=True)
class SimulatedStep:
    """A step that was launched and not read yet."""

    step: SchedulerOutput
    result: ModelRunnerOutput
    launched_at: float
    done_at: float
    """Both by the engine's clock."""


class SimulatedRunner:
    """Runs steps in no time, and says when they would be done."""

    def __init__(self, plan: EnginePlan, simulation: Simulation, clock: Clock) -> None:
        backend = plan.backend
        assert isinstance(backend, SimulatedBackend), backend
        self._plan = plan
        self._simulation = simulation
        self._clock = clock
        self._roofline: Roofline = backend.roofline(plan.mesh.size)
        self._target = model_cost(plan.target)
        self._draft = None if plan.draft is None else model_cost(plan.draft)
        self._is_head = plan.draft is not None and plan.draft.head is not None
        resolved = plan.resolved
        self._shapes = plan.shapes
        blocks_per_row = -(-resolved.max_model_len // resolved.block_size)
        chooser = ShapeChooser(self._shapes, resolved.block_size)
        self._batch = InputBatch(resolved.limits, resolved.max_num_seqs, blocks_per_row, resolved.block_size, chooser)
        num_slots = resolved.max_num_seqs + 1
        self._num_tokens = np.zeros(num_slots, np.int64)
        self._max_tokens = np.zeros(num_slots, np.int64)
        self._keys = np.zeros(num_slots, np.uint64)
        self._ends = np.full(num_slots, np.iinfo(np.int64).max)
        self._stops: list[tuple[int, ...]] = [()] * num_slots
        self._wants_logprobs: list[bool] = [False] * num_slots
        self._free_at = 0.0
        self.busy_seconds = 0.0
        """Of the device, since the start."""
        self.compilations = CompilationCounter()
        self.counters = RunnerCounters()

    @property
    def num_programs(self) -> int:
        """How many a real device would compile for its steps."""
        return len(self._shapes)

    def warm_up(self, progress: Callable[[int, int, str], None] | None = None) -> float:
        """There is nothing to compile; `progress` is told of every shape."""
        for idx, shape in enumerate(self._shapes, start=1):
            if progress is not None:
                progress(idx, len(self._shapes), shape.describe())
        self.compilations.finish_warm_up()
        return 0.0

    def execute(self, step: SchedulerOutput) -> SimulatedStep:
        """Launches a step."""
        for admitted in step.admitted:
            self._admit(admitted)
        host = self._simulation.host
        rows = len(step.decode) + len(step.prefill)
        self._clock.spend(host.step_seconds + rows * host.row_seconds)
        launched_at = self._clock.now()
        shape = self._batch.shape_of(step)
        seconds = self._roofline.efficiency.dispatch_us * 1e-6
        if step.catch_up:
            seconds += self._catch_up_seconds(step)
        slots = np.array([row.slot for row in step.decode], np.int64)
        tokens: list[list[int]] = [[] for _ in step.decode]
        rounds: list[list[DraftRound]] = [[] for _ in step.decode]
        for _ in range(step.num_decode_steps):
            seconds += self._pass_seconds(step, shape, slots)
            self._decode(step, slots, tokens, rounds)
        sampled = [self._sample_prompt(chunk.slot) for chunk in step.prefill if chunk.samples]
        self._count(step, shape)
        seconds /= self._simulation.speed
        self._free_at = max(launched_at, self._free_at) + seconds
        self.busy_seconds += seconds
        token_ids = [*tokens, *sampled]
        slots_of_rows = [*(row.slot for row in step.decode), *(chunk.slot for chunk in step.prefill if chunk.samples)]
        logprobs = [self._logprobs(slot, ids) for slot, ids in zip(slots_of_rows, token_ids, strict=True)]
        prompt_logprobs = {
            chunk.request_id: [self._logprob(0)] * count
            for chunk in step.prefill
            if (count := self._batch.prompt_targets(chunk))
        }
        result = ModelRunnerOutput(token_ids, logprobs, prompt_logprobs, rounds if step.num_drafts else [])
        return SimulatedStep(step, result, launched_at, self._free_at)

    def wait(self, dispatched: SimulatedStep) -> None:
        """Until the device would have finished a launched step."""
        self._clock.wait_until(dispatched.done_at)

    def read(self, dispatched: SimulatedStep) -> ModelRunnerOutput:
        """What came of it."""
        return dispatched.result

    # ---- the device's memory of its rows

    def _admit(self, admitted: AdmittedRequest) -> None:
        self._batch.admit(admitted)
        slot = admitted.slot
        key = zlib.crc32(admitted.request_id.encode())
        self._num_tokens[slot] = len(admitted.token_ids)
        self._max_tokens[slot] = admitted.max_total_tokens
        self._keys[slot] = key
        self._stops[slot] = admitted.stop_ids
        self._wants_logprobs[slot] = admitted.params.logprobs is not None
        self._ends[slot] = np.iinfo(np.int64).max
        mean = self._simulation.mean_output_tokens
        if mean is not None and admitted.stop_ids:
            uniform = _uniform(np.array([key], np.uint64), np.array([0]))[0]
            length = max(int(-mean * np.log1p(-uniform)), admitted.params.min_tokens, 1)
            self._ends[slot] = admitted.prompt_len + length

    def _decode(
        self, step: SchedulerOutput, slots: np.ndarray, tokens: list[list[int]], rounds: list[list[DraftRound]]
    ) -> None:
        """Each row gets a token, and those of its drafts that are accepted."""
        if not len(slots):
            return
        before = self._num_tokens[slots]
        room = self._max_tokens[slots] - before
        num_drafts = np.zeros(len(slots), np.int64)
        accepted = np.zeros(len(slots), np.int64)
        if step.num_drafts:
            wanted = np.array([row.num_drafts for row in step.decode], np.int64)
            num_drafts = np.clip(np.minimum(wanted, room - 1), 0, None)
            agrees = np.ones(len(slots), bool)
            profile = self._simulation.acceptance
            for idx in range(step.num_drafts):
                share = profile[min(idx, len(profile) - 1)]
                agrees &= (idx < num_drafts) & (_uniform(self._keys[slots], before + idx) < share)
                accepted += agrees
        counts = np.where(room > 0, accepted + 1, 0)
        self._num_tokens[slots] += counts
        ids = self._tokens(slots, before, int(counts.max(initial=0)))
        for row, count in enumerate(counts.tolist()):
            tokens[row] += ids[row][:count]
            if count and step.num_drafts:
                rounds[row].append(DraftRound(int(num_drafts[row]), int(accepted[row])))

    def _sample_prompt(self, slot: int) -> list[int]:
        slots = np.array([slot], np.int64)
        [ids] = self._tokens(slots, self._num_tokens[slots], 1)
        self._num_tokens[slot] += 1
        return ids

    def _tokens(self, slots: np.ndarray, before: np.ndarray, width: int) -> list[list[int]]:
        """The tokens after the first `before` of each row: a function of the request and the place, which stops where it is to."""
        places = before[:, None] + np.arange(width)
        vocab_size = self._plan.model.vocab_size
        uniform = _uniform(self._keys[slots][:, None], places)
        ids: list[list[int]] = (uniform * vocab_size).astype(np.int64).tolist()
        for row, slot in enumerate(slots.tolist()):
            stops = self._stops[slot]
            if not stops:
                continue
            for idx, place in enumerate(places[row].tolist()):
                if place + 1 >= self._ends[slot]:
                    ids[row][idx] = stops[0]
                else:
                    while ids[row][idx] in stops:
                        ids[row][idx] = (ids[row][idx] + 1) % vocab_size
        return ids

    def _logprobs(self, slot: int, token_ids: list[int]) -> list[TokenLogprobs] | None:
        return [self._logprob(token_id) for token_id in token_ids] if self._wants_logprobs[slot] else None

    def _logprob(self, token_id: int) -> TokenLogprobs:
        """Of a token as likely as any other."""
        value = -float(np.log(self._plan.model.vocab_size))
        return TokenLogprobs(value, 1, (token_id,), (value,))

    # ---- what it takes

    def _pass_seconds(self, step: SchedulerOutput, shape: StepShape, slots: np.ndarray) -> float:
        contexts = self._num_tokens[slots]
        contexts = contexts[contexts < self._max_tokens[slots]] if len(slots) else contexts
        chunks = [(chunk.start, chunk.num_tokens) for chunk in step.prefill]
        gathered = 0
        if not self._plan.ops.attends_in_place:
            gathered = shape.decode_rows * shape.context_blocks * self._plan.resolved.block_size
        work = Work(
            num_tokens=shape.num_tokens,
            num_logit_rows=shape.num_logit_rows,
            decode_contexts=contexts + step.num_drafts,
            decode_width=shape.decode_width,
            chunks=chunks,
            gathered_tokens=gathered,
        )
        seconds = self._roofline.seconds(self._target, work).total
        if self._draft is not None and step.num_drafts:
            seconds += self._draft_seconds(self._draft, shape, contexts)
        return seconds

    def _draft_seconds(self, draft: ModelCost, shape: StepShape, contexts: np.ndarray) -> float:
        """One pass for each draft, the first over the few newest tokens; a head goes over all of the step's tokens once more."""
        rows, seconds = shape.decode_rows, 0.0
        for idx in range(shape.num_drafts):
            width = MAX_DRAFT_LAG if idx == 0 and not self._is_head else 1
            work = Work(rows * width, rows, contexts + idx, width)
            seconds += self._roofline.seconds(draft, work).total
        if self._is_head:
            seconds += self._roofline.seconds(draft, Work(shape.num_tokens, 0, contexts[:0])).total
        return seconds

    def _catch_up_seconds(self, step: SchedulerOutput) -> float:
        assert self._draft is not None, step
        tile_size = self._plan.resolved.limits.tile_size
        chunks = [(row.start, min(row.num_tiles * tile_size, row.end - row.start)) for row in step.catch_up]
        shape = self._batch.catch_up_shape(step)
        nobody = np.zeros(0, np.int64)
        return self._roofline.seconds(self._draft, Work(shape.num_tokens, 0, nobody, chunks=chunks)).total

    def _count(self, step: SchedulerOutput, shape: StepShape) -> None:
        self.counters.num_real_tokens += step.num_tokens
        if not self._plan.ops.is_padding_free:
            self.counters.num_padding_tokens += shape.num_tokens * step.num_decode_steps - step.num_tokens


def _uniform(keys: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Numbers in [0, 1), each a function of a request and a place in it: keys uint64 and places int64, broadcast together."""
    x = keys * np.uint64(0x9E3779B97F4A7C15) + places.astype(np.uint64) * np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(30)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    found: np.ndarray = (x >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return found
