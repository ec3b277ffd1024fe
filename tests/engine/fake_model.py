"""A device without a model: it keeps tokens where a real one keeps keys and values, and objects to every wrong read.

`FakeDevice` consumes a SchedulerOutput as the model runner and the compiled step do: admitted rows, block updates in order,
then decode rows whose newest token and position live on the device, and prefill chunks. A cell of the cache holds what a
key depends on (position, every token up to it, cache salt), so a block that is shared wrongly, freed early, given
away too soon or missing from a table shows at the first row that reaches it. `Simulation` is the engine core's loop
around it.
"""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from quire.engine.admission import BatchingPolicy, make_admission_policy
from quire.engine.draft_scheduler import MAX_DRAFT_LAG, DraftScheduler
from quire.engine.kv_cache_manager import KVCacheManager
from quire.engine.outputs import FinishReason
from quire.engine.request import EngineCoreRequest, Request
from quire.engine.sampling_params import SamplingParams
from quire.engine.scheduler import Scheduler
from quire.engine.speculation import Method
from quire.engine.step_data import (
    CatchUp,
    DecodeRow,
    DraftRound,
    EngineCoreOutput,
    ModelRunnerOutput,
    PrefillChunk,
    SchedulerOutput,
    StepLimits,
    TokenLogprobs,
)

VOCAB_SIZE = 13
EOS = 0


class Entry(NamedTuple):
    """What a head keeps of a token: it hangs on the one after it too."""

    cell: Cell
    following: int


class Cell(NamedTuple):
    """What a token's key would depend on: `history` stands for every token up to `position`."""

    position: int
    history: int
    salt: str | None


@dataclass
class _Slot:
    request_id: str
    tokens: list[int]
    histories: list[int]
    prompt_len: int
    max_total_tokens: int
    params: SamplingParams
    stop_ids: tuple[int, ...]
    table: list[int]
    salt: str | None
    num_drafted: int = 0
    """That a draft model has, or that a head was given."""
    num_passed_over: int = 0
    draft_hole: tuple[int, int] = (0, 0)
    num_cached: int = -1
    """Of its tokens, when it took its place; below 0 until its first chunk."""

    def append(self, token_id: int) -> None:
        self.tokens.append(token_id)
        self.histories.append(_mix(self.histories[-1] if self.histories else 1, token_id))


def _mix(history: int, token_id: int) -> int:
    return (history * 1_000_003 + token_id + 7) % (2**61 - 1)


def _sample(history: int, num_output: int, params: SamplingParams, stop_ids: Iterable[int]) -> int:
    """The token that follows: a function of all tokens so far, and never one that stops before `min_tokens`."""
    token_id = (history >> 7) % VOCAB_SIZE
    while num_output < params.min_tokens and token_id in stop_ids:
        token_id = (token_id + 1) % VOCAB_SIZE
    return token_id


@dataclass(frozen=True)
class Completion:
    """What a request's outputs amount to."""

    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    stop_reason: int | None


def completed_alone(source: EngineCoreRequest, max_model_len: int) -> Completion:
    """What a request gives with nobody beside it, computed without scheduler, blocks or steps."""
    params = source.params
    eos_ids = () if params.ignore_eos else source.eos_token_ids
    stop_ids = {*eos_ids, *params.stop_token_ids}
    history = 1
    for token_id in source.prompt_token_ids:
        history = _mix(history, token_id)
    tokens: list[int] = []
    while True:
        token_id = _sample(history, len(tokens), params, stop_ids)
        tokens.append(token_id)
        history = _mix(history, token_id)
        if len(tokens) >= params.min_tokens and token_id in stop_ids:
            return Completion(tuple(tokens), "stop", None if token_id in eos_ids else token_id)
        is_full = len(source.prompt_token_ids) + len(tokens) >= max_model_len
        if is_full or len(tokens) == params.max_tokens:
            return Completion(tuple(tokens), "length", None)


class FakeDevice:
    """Slots with tokens, block tables, and a cache of cells. Asserts all that a step may take for granted."""

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        limits: StepLimits,
        *,
        max_num_batched_tokens: int,
        max_model_len: int,
        sliding_window: int | None = None,
        method: Method = "ngram",
    ) -> None:
        self._cells: list[list[Cell | None]] = [[None] * block_size for _ in range(num_blocks)]
        self._draft_cells: list[list[Cell | None]] = [[None] * block_size for _ in range(num_blocks)]
        self._entries: list[list[Entry | None]] = [[None] * block_size for _ in range(num_blocks)]
        self._has_draft_model = method == "draft_model"
        self._has_head = method == "eagle3"
        self._block_size = block_size
        self._blocks_per_row = -(-max_model_len // block_size)
        self._limits = limits
        self._max_num_batched_tokens = max_num_batched_tokens
        self._sliding_window = sliding_window
        self._slots: dict[int, _Slot] = {}
        self.salts: dict[str, str | None] = {}
        self.num_computed: Counter[str] = Counter()
        self.speculates = False
        self.num_ready = 0
        self.num_caught_up = 0
        self.num_woken = 0
        self.num_entries_beyond_holes = 0

    def execute(self, step: SchedulerOutput) -> ModelRunnerOutput:
        """Runs a step. The order of calls is the order on the device; the result may be handed back later."""
        self._check_limits(step)
        for admitted in step.admitted:
            table = [*admitted.block_ids, *[0] * (self._blocks_per_row - len(admitted.block_ids))]
            assert len(table) == self._blocks_per_row, admitted
            slot = _Slot(
                admitted.request_id,
                [],
                [],
                admitted.prompt_len,
                admitted.max_total_tokens,
                admitted.params,
                admitted.stop_ids,
                table,
                self.salts[admitted.request_id],
                admitted.num_drafted,
                draft_hole=admitted.draft_hole,
            )
            for token_id in admitted.token_ids:
                slot.append(token_id)
            self._slots[admitted.slot] = slot
            if self._has_draft_model:
                self._check_drafted(slot)
        for update in step.block_updates:
            table = self._slots[update.slot].table
            assert update.first_idx + len(update.block_ids) <= len(table), update
            table[update.first_idx : update.first_idx + len(update.block_ids)] = update.block_ids
        for row in step.catch_up:
            self._catch_up(row)
        sampled: dict[int, list[int]] = {row.slot: [] for row in step.decode}
        rounds: dict[int, list[DraftRound]] = {row.slot: [] for row in step.decode}
        for _ in range(step.num_decode_steps):
            self._one_step(step, sampled, rounds)
        for row in step.decode:
            self._check_advance(row, sampled[row.slot])
        rows: list[DecodeRow | PrefillChunk] = [*step.decode, *(chunk for chunk in step.prefill if chunk.samples)]
        return ModelRunnerOutput(
            token_ids=[sampled[row.slot] for row in rows],
            logprobs=[self._logprobs(row, sampled[row.slot]) for row in rows],
            prompt_logprobs={
                chunk.request_id: self._prompt_logprobs(chunk)
                for chunk in step.prefill
                if self._slots[chunk.slot].params.prompt_logprobs is not None
            },
            rounds=[rounds[row.slot] for row in step.decode] if step.num_drafts else [],
        )

    def _one_step(
        self, step: SchedulerOutput, sampled: dict[int, list[int]], rounds: dict[int, list[DraftRound]]
    ) -> None:
        """All rows write their cells before any row reads, as in every layer of a model."""
        spans: list[tuple[int, int, int]] = []
        for row in step.decode:
            slot = self._slots[row.slot]
            assert slot.request_id == row.request_id, row
            if len(slot.tokens) < slot.max_total_tokens:
                start = len(slot.tokens) - 1
                found = self._draft(slot, row)
                rounds[row.slot].append(found)
                self.num_ready += found.num_drafts > 0
                self._write_rejected(slot, start + 1 + found.num_accepted, start + 1 + found.num_drafts)
                sampled[row.slot] += slot.tokens[start + 1 :]
                spans.append((row.slot, start, len(slot.tokens)))
        for chunk in step.prefill:
            slot = self._slots[chunk.slot]
            end = chunk.start + chunk.num_tokens
            assert slot.request_id == chunk.request_id, chunk
            assert end == len(slot.tokens) if chunk.samples else end < len(slot.tokens), (chunk, len(slot.tokens))
            spans.append((chunk.slot, chunk.start, end))
        writers: dict[tuple[int, int], int] = {}
        for span in spans:
            self._write(*span, writers)
        for span in spans:
            self._read(*span, writers)
        samples = {row.slot for row in step.decode} | {chunk.slot for chunk in step.prefill if chunk.samples}
        for slot_idx, _, _ in spans:
            if slot_idx in samples:
                slot = self._slots[slot_idx]
                num_output = len(slot.tokens) - slot.prompt_len
                token_id = _sample(slot.histories[-1], num_output, slot.params, slot.stop_ids)
                slot.append(token_id)
                sampled.setdefault(slot_idx, []).append(token_id)
        if self._has_head and (step.num_drafts or step.prefill):
            decoded = {row.slot for row in step.decode}
            for slot_idx, start, end in spans:
                self._give_to_head(self._slots[slot_idx], start, end, decodes=slot_idx in decoded)

    def _draft(self, slot: _Slot, row: DecodeRow) -> DraftRound:
        """Drafts for a row, some of which turn out to be what is sampled; the accepted ones are appended."""
        num_tokens = len(slot.tokens)
        num_drafts = min(row.num_drafts, slot.max_total_tokens - num_tokens - 1)
        if self._has_head and num_drafts > 0:
            self._check_head(slot)
            # Its own results stand for the target's, until those are there.
            for position in range(num_tokens - 1, num_tokens - 2 + num_drafts):
                self._write_entry(slot, Entry(Cell(position, -1, slot.salt), -1))
        if self._has_draft_model and num_drafts > 0:
            lag = num_tokens - slot.num_drafted
            assert 1 <= lag <= MAX_DRAFT_LAG, f"{slot.request_id} drafts with {lag} tokens missing"
            self._check_drafted(slot)
        num_accepted = slot.histories[-1] % 7 % (num_drafts + 1)
        for _ in range(num_accepted):
            num_output = len(slot.tokens) - slot.prompt_len
            slot.append(_sample(slot.histories[-1], num_output, slot.params, slot.stop_ids))
        if self._has_draft_model and num_drafts > 0:
            end = num_tokens + min(num_drafts - 1, num_accepted)
            self._write_drafted(slot, slot.num_drafted, end)
            slot.num_drafted = end
        return DraftRound(num_drafts, num_accepted)

    def _catch_up(self, row: CatchUp) -> None:
        slot = self._slots[row.slot]
        start = max(slot.num_drafted, row.start)
        slot.num_drafted = start
        self._check_drafted(slot)
        end = max(min(len(slot.tokens) - 1, start + row.num_tiles * self._limits.tile_size), start)
        assert end < row.end, (row, end)
        self._write_drafted(slot, start, end)
        slot.num_drafted = end
        self.num_caught_up += end - start

    def _write_drafted(self, slot: _Slot, start: int, end: int) -> None:
        for position in range(start, end):
            block, offset = slot.table[position // self._block_size], position % self._block_size
            if block != 0:
                self._draft_cells[block][offset] = Cell(position, slot.histories[position], slot.salt)

    def _check_drafted(self, slot: _Slot) -> None:
        """The draft model's cache has the row's first tokens, as far as it is said to, and as far as a window leaves them."""
        first = 0 if self._sliding_window is None else max(len(slot.tokens) - self._sliding_window + 1, 0)
        for position in range(first, slot.num_drafted):
            block, offset = slot.table[position // self._block_size], position % self._block_size
            wanted = Cell(position, slot.histories[position], slot.salt)
            assert self._draft_cells[block][offset] == wanted, f"{slot.request_id} drafts from a foreign {position}"

    def _give_to_head(self, slot: _Slot, start: int, end: int, *, decodes: bool) -> None:
        """Entries of tokens `start ... end - 1`, each of which hangs on the token after it."""
        if decodes:
            self.num_woken += slot.num_drafted < start
            slot.num_passed_over += max(start - slot.num_drafted, 0)
        elif slot.num_cached < 0:
            slot.num_cached = start
        for position in range(start, end):
            cell = Cell(position, slot.histories[position], slot.salt)
            self._write_entry(slot, Entry(cell, slot.tokens[position + 1]))
        slot.num_drafted = end

    def _write_entry(self, slot: _Slot, entry: Entry) -> None:
        place = entry.cell.position - slot.num_passed_over
        block = slot.table[place // self._block_size]
        assert block != 0, f"{slot.request_id} writes {entry} to the null block"
        self._entries[block][place % self._block_size] = entry

    def _check_head(self, slot: _Slot) -> None:
        """All that the head sees, hole left out, are the row's own entries in order, up to that of its newest token but one.

        The last of a shared block may hang on what followed in the text of whoever filled it.
        """
        assert slot.num_drafted == len(slot.tokens) - 1, f"{slot.request_id} drafts though its head sleeps"
        first, num_blocks = slot.draft_hole
        table = [*slot.table[:first], *slot.table[first + num_blocks :]]
        num_entries = slot.num_drafted - slot.num_passed_over - num_blocks * self._block_size
        size, last = self._block_size, -1
        for place in range(num_entries):
            entry = self._entries[table[place // size]][place % size]
            assert entry is not None, f"{slot.request_id} drafts from nothing"
            position = entry.cell.position
            assert position > last, f"{slot.request_id} has an entry of {position} after one of {last}"
            last = position
            wanted = Cell(position, slot.histories[position], slot.salt)
            assert entry.cell == wanted, f"{slot.request_id} drafts from a foreign entry of {position}"
            is_shared = position < slot.num_cached and (position + 1) % size == 0
            assert is_shared or entry.following == slot.tokens[position + 1], (
                f"{slot.request_id} drafts from other text"
            )
        assert last == len(slot.tokens) - 2, (slot.request_id, last)
        self.num_entries_beyond_holes += num_entries if num_blocks else 0

    def _write_rejected(self, slot: _Slot, start: int, end: int) -> None:
        """Drafts that were not accepted are written all the same, to places that must be the row's own."""
        for position in range(start, end):
            block, offset = slot.table[position // self._block_size], position % self._block_size
            assert block != 0, f"{slot.request_id} writes draft {position} to the null block"
            self._cells[block][offset] = Cell(position, -1, slot.salt)

    def _write(self, slot_idx: int, start: int, end: int, writers: dict[tuple[int, int], int]) -> None:
        slot = self._slots[slot_idx]
        for position in range(start, end):
            block, offset = slot.table[position // self._block_size], position % self._block_size
            assert block != 0, f"{slot.request_id} writes token {position} to the null block"
            assert (block, offset) not in writers, f"{slot.request_id} and another row write the same cell"
            writers[block, offset] = slot_idx
            self._cells[block][offset] = Cell(position, slot.histories[position], slot.salt)
        self.num_computed[slot.request_id] += end - start

    def _read(self, slot_idx: int, start: int, end: int, writers: dict[tuple[int, int], int]) -> None:
        slot = self._slots[slot_idx]
        first_visible = max(start - self._sliding_window + 1, 0) if self._sliding_window is not None else 0
        for position in range(first_visible, end):
            block, offset = slot.table[position // self._block_size], position % self._block_size
            wanted = Cell(position, slot.histories[position], slot.salt)
            assert block != 0, f"{slot.request_id} cannot see its token {position} any more"
            assert self._cells[block][offset] == wanted, f"{slot.request_id} reads a foreign token at {position}"
            assert writers.get((block, offset), slot_idx) == slot_idx, "a row reads what another writes in this step"

    def _check_advance(self, row: DecodeRow, token_ids: list[int]) -> None:
        """The device went on by as many tokens as the host planned, and computed no more than it made room for."""
        slot = self._slots[row.slot]
        assert row.min_tokens <= len(token_ids) <= row.num_tokens, (row, token_ids)
        assert len(slot.tokens) - 1 <= row.end, (row, len(slot.tokens))
        if row.num_drafts == 0 and not self.speculates:
            assert len(token_ids) == row.num_tokens, (row, token_ids)
            assert len(slot.tokens) - 1 == row.end, (row, len(slot.tokens))

    def _check_limits(self, step: SchedulerOutput) -> None:
        limits = self._limits
        assert step.decode or step.prefill
        assert max(len(step.decode), step.padded_decode_rows) <= limits.max_decode_rows, step
        assert sum(limits.num_tiles(chunk.num_tokens) for chunk in step.prefill) <= limits.max_prefill_tiles, step
        num_tokens = len(step.decode) + sum(chunk.num_tokens for chunk in step.prefill)
        assert num_tokens <= self._max_num_batched_tokens, step
        assert limits.mixed_batches or not (step.decode and step.prefill), step
        assert step.num_decode_steps == 1 or not step.prefill, step
        rows: list[DecodeRow | PrefillChunk] = [*step.decode, *step.prefill]
        assert len({row.slot for row in rows}) == len(rows), step
        assert all(row.num_tokens > 0 for row in rows), step
        assert all(row.num_drafts <= step.num_drafts for row in step.decode), step
        assert sum(row.num_tiles for row in step.catch_up) <= limits.max_prefill_tiles, step
        self.speculates |= step.num_drafts > 0

    def _logprobs(self, row: DecodeRow | PrefillChunk, token_ids: list[int]) -> list[TokenLogprobs] | None:
        if self._slots[row.slot].params.logprobs is None:
            return None
        return [TokenLogprobs(float(token_id), 1, (), ()) for token_id in token_ids]

    def _prompt_logprobs(self, chunk: PrefillChunk) -> list[TokenLogprobs]:
        """One entry per token of the chunk that another prompt token follows; its value is that token's position."""
        end = min(chunk.start + chunk.num_tokens, self._slots[chunk.slot].prompt_len - 1)
        return [TokenLogprobs(float(idx + 1), 1, (), ()) for idx in range(chunk.start, end)]


@dataclass(frozen=True)
class Setup:
    """Everything about an engine that may change its schedule, and must not change a token."""

    num_blocks: int = 33
    block_size: int = 4
    max_num_seqs: int = 4
    tile_size: int = 4
    max_prefill_tiles: int = 4
    max_num_batched_tokens: int = 20
    max_model_len: int = 64
    mixed_batches: bool = True
    enable_prefix_caching: bool = True
    sliding_window: int | None = None
    policy: BatchingPolicy = "continuous"
    window_seconds: float = 0.05
    decode_steps_per_dispatch: int = 1
    max_in_flight: int = 1
    priority_seconds: float = 0.0
    draft_counts: tuple[int, ...] = ()
    """How many tokens each step drafts, one after the other; none without speculation."""
    method: Method = "ngram"


class DraftsInTurn:
    """A policy that goes through a list of numbers, whatever comes of them. After a 0 it rests as long as more of them follow."""

    plain_cost: float | None = None
    drafting_cost: float | None = None

    def __init__(self, counts: tuple[int, ...]) -> None:
        self._counts = itertools.cycle(counts)
        self._last, self._next = -1, next(self._counts)

    def new_acceptance(self) -> None:
        return None

    def rests(self) -> bool:
        if self._last or self._next:
            return False
        self._take()
        return True

    def choose(self, num_rows: int, rows: Sequence[None], limits: Sequence[int]) -> int:
        assert num_rows == len(rows) == len(limits)
        return self._take() if any(limits) else 0

    def _take(self) -> int:
        self._last, self._next = self._next, next(self._counts)
        return self._last

    def observe_step(self, num_rows: int, num_drafts: int, seconds: float, num_rounds: int = 1) -> None:
        pass

    def observe_other_step(self, num_rows: int, num_drafts: int | None, num_rounds: int = 1) -> None:
        pass

    def observe_wake(self, num_rows: int, seconds: float, num_rounds: int = 1) -> None:
        pass

    def observe_round(self, acceptance: None, num_drafts: int, num_accepted: int) -> None:
        assert 0 <= num_accepted <= num_drafts

    def cost(self, num_rows: int, num_drafts: int) -> float | None:
        return self.drafting_cost if num_drafts else self.plain_cost


STEP_SECONDS = 0.01


@dataclass
class Gathered:
    """What a request's outputs added up to."""

    token_ids: list[int] = field(default_factory=list)
    prompt_positions: list[int] = field(default_factory=list)
    last: EngineCoreOutput | None = None

    @property
    def completion(self) -> Completion:
        assert self.last is not None
        return Completion(tuple(self.token_ids), self.last.finish_reason, self.last.stop_reason)


class Simulation:
    """The engine core's loop with a fake device and a clock of its own; checks the scheduler after every step."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.now = 0.0
        limits = StepLimits(
            max_decode_rows=setup.max_num_seqs,
            max_prefill_tiles=setup.max_prefill_tiles,
            tile_size=setup.tile_size,
            mixed_batches=setup.mixed_batches,
        )
        # As the engine has it: a draft model goes over the newest tokens once more.
        window = setup.sliding_window
        if window is not None and setup.method == "draft_model":
            window += MAX_DRAFT_LAG
        if setup.method == "eagle3":  # entries do not stay in the blocks of their tokens
            window = None
        kv_cache = KVCacheManager(
            setup.num_blocks,
            setup.block_size,
            enable_prefix_caching=setup.enable_prefix_caching,
            sliding_window=window,
        )
        drafts = None
        if setup.draft_counts:
            drafts = DraftScheduler(
                kv_cache,
                DraftsInTurn(setup.draft_counts),
                method=setup.method,
                draft_counts=sorted({count for count in setup.draft_counts if count}),
                tile_size=setup.tile_size,
                max_tiles=setup.max_prefill_tiles,
            )
        self.scheduler = Scheduler(
            kv_cache,
            limits,
            max_num_seqs=setup.max_num_seqs,
            max_num_batched_tokens=setup.max_num_batched_tokens,
            max_model_len=setup.max_model_len,
            admission=make_admission_policy(
                setup.policy, window_seconds=setup.window_seconds, max_num_seqs=setup.max_num_seqs
            ),
            decode_steps_per_dispatch=setup.decode_steps_per_dispatch,
            priority_seconds=setup.priority_seconds,
            drafts=drafts,
            clock=lambda: self.now,
        )
        self.device = FakeDevice(
            setup.num_blocks,
            setup.block_size,
            limits,
            max_num_batched_tokens=setup.max_num_batched_tokens,
            max_model_len=setup.max_model_len,
            sliding_window=setup.sliding_window,
            method=setup.method,
        )
        self.seconds_of: Callable[[SchedulerOutput], float] = lambda _: STEP_SECONDS
        self.seconds = 0.0
        self.steps: list[SchedulerOutput] = []
        self.gathered: dict[str, Gathered] = {}
        self.finished: list[str] = []
        self._in_flight: deque[tuple[SchedulerOutput, ModelRunnerOutput]] = deque()

    def add(self, source: EngineCoreRequest) -> None:
        """Queues a request, which must not have finished under the same id before."""
        self.scheduler.add_request(source)
        self.device.salts[source.request_id] = source.cache_salt
        self.gathered[source.request_id] = Gathered()

    def abort(self, request_id: str) -> bool:
        return self.scheduler.abort_request(request_id)

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_unfinished_requests or bool(self._in_flight)

    def step(self) -> SchedulerOutput | None:
        """Schedules and launches a step and takes in the one before it; gives what was scheduled."""
        self.now += STEP_SECONDS
        scheduled = self.scheduler.schedule()
        self.scheduler.check()
        if scheduled is not None:
            self.steps.append(scheduled)
            self._in_flight.append((scheduled, self.device.execute(scheduled)))
        if self._in_flight and (scheduled is None or len(self._in_flight) > self.setup.max_in_flight):
            done, result = self._in_flight.popleft()
            outputs = self.scheduler.update_from_output(done, result)
            for output in outputs:
                self._gather(output)
            self.scheduler.check()
            if self.scheduler.drafts is not None:
                self.scheduler.drafts.observe_step(done, self.seconds_of(done), outputs)
        return scheduled

    def run(self, max_steps: int, between: Callable[[int], None] = lambda _: None) -> None:
        """Steps until nothing is left to do; `between` is called with the step's number before each."""
        for step_idx in range(max_steps):
            between(step_idx)
            if not self.has_work:
                break
            self.step()
        assert not self.has_work, f"unfinished after {max_steps} steps: {list(self.scheduler.requests.values())}"
        assert self.scheduler.kv_cache.pool.num_used == 0

    def request(self, request_id: str) -> Request:
        """A request that has not finished, as the scheduler has it."""
        return self.scheduler.requests[request_id]

    def _gather(self, output: EngineCoreOutput) -> None:
        gathered = self.gathered[output.request_id]
        assert gathered.last is None or gathered.last.finish_reason is None, output
        gathered.token_ids += output.new_token_ids
        gathered.prompt_positions += [int(entry.logprob) for entry in output.prompt_logprobs or ()]
        if output.logprobs is not None:
            assert [int(entry.logprob) for entry in output.logprobs] == output.new_token_ids, output
        gathered.last = output
        if output.finish_reason is not None:
            self.finished.append(output.request_id)


def make_request(
    request_id: str,
    prompt: Iterable[int],
    *,
    max_tokens: int | None = 8,
    arrival_time: float = 0.0,
    priority: int = 0,
    cache_salt: str | None = None,
    ignore_eos: bool = True,
    stop_token_ids: tuple[int, ...] = (),
    min_tokens: int = 0,
    logprobs: int | None = None,
    prompt_logprobs: int | None = None,
    num_speculative_tokens: int | None = None,
) -> EngineCoreRequest:
    """A request for the fake device, whose model ends sequences with token 0."""
    return EngineCoreRequest(
        request_id=request_id,
        prompt_token_ids=tuple(prompt),
        params=SamplingParams(
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            ignore_eos=ignore_eos,
            stop_token_ids=stop_token_ids,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            temperature=0.0,
            num_speculative_tokens=num_speculative_tokens,
        ),
        arrival_time=arrival_time,
        eos_token_ids=(EOS,),
        priority=priority,
        cache_salt=cache_salt,
    )
