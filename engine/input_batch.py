"""Turns a scheduled step into the arrays of its shape: numpy only, in the time of a few gathers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from quire.backends.base import StepShape
from quire.engine.block_pool import NULL_BLOCK
from quire.engine.device_state import sampling_mode
from quire.engine.drafting import CatchUpInput
from quire.engine.step import ModelInput
from quire.engine.step_data import AdmittedRequest, BlockUpdate, PrefillChunk, SchedulerOutput, StepLimits
from quire.kernels.sampling.rows import SamplingMode


@dataclass(frozen=True)
class BatchLayout:
    """Where the scheduled rows lie in a step's arrays and what to read of them, so that its output can be read later.

    A slot may have gone to another request by then, which is why all that is needed is noted here. `sampled_tiles` are the
    columns of the chunks that sample; `num_logprobs` has one entry per row that samples, decode rows first;
    `prompt_targets[i]` is how many tokens of chunk i are followed by a prompt token whose logprobs were asked for.
    """

    shape: StepShape
    sampled_tiles: list[int]
    num_logprobs: list[int | None]
    first_tiles: list[int]
    prompt_targets: list[int]
    num_prompt_logprobs: list[int]


class ShapeChooser:
    """Picks the cheapest compiled shape that covers a batch; remembers the answer."""

    def __init__(self, shapes: Sequence[StepShape], block_size: int) -> None:
        # Dense work grows with the tokens of a step, attention with the rows times what they can reach.
        self._shapes = sorted(
            shapes,
            key=lambda s: (s.num_tokens + s.num_logit_rows * s.context_blocks * block_size / 256, s.sampling),
        )
        self._chosen: dict[StepShape, StepShape] = {}

    def choose(self, need: StepShape) -> StepShape:
        """The first shape that covers `need`; the backend promised that there is one."""
        shape = self._chosen.get(need)
        if shape is None:
            shape = next((shape for shape in self._shapes if shape.covers(need)), None)
            assert shape is not None, f"no compiled shape covers {need.describe()}"
            self._chosen[need] = shape
        return shape


class InputBatch:
    """Mirrors, for every slot, its block table and what its sampling needs; makes the arrays that a step is launched with.

    Applies the scheduler's updates in order and knows nothing of requests beyond their slot.
    """

    def __init__(
        self, limits: StepLimits, max_num_seqs: int, blocks_per_row: int, block_size: int, chooser: ShapeChooser
    ) -> None:
        self._limits = limits
        self._sink = max_num_seqs
        self._block_size = block_size
        self._chooser = chooser
        self._tables = np.full((max_num_seqs + 1, blocks_per_row), NULL_BLOCK, np.int32)
        self._modes = np.zeros(max_num_seqs + 1, np.int8)
        self._num_logprobs: list[int | None] = [None] * (max_num_seqs + 1)
        self._num_prompt_logprobs: list[int | None] = [None] * (max_num_seqs + 1)
        self._prompt_lens = [0] * (max_num_seqs + 1)

    def admit(self, admitted: AdmittedRequest) -> None:
        """A request takes a slot."""
        slot, params = admitted.slot, admitted.params
        self._tables[slot] = NULL_BLOCK
        self._tables[slot, : len(admitted.block_ids)] = admitted.block_ids
        self._modes[slot] = sampling_mode(params)
        self._num_logprobs[slot] = params.logprobs
        self._num_prompt_logprobs[slot] = params.prompt_logprobs
        self._prompt_lens[slot] = admitted.prompt_len

    def prompt_targets(self, chunk: PrefillChunk) -> int:
        """How many of the chunk's tokens are followed by a prompt token whose logprob was asked for."""
        if self._num_prompt_logprobs[chunk.slot] is None:
            return 0
        return max(min(chunk.start + chunk.num_tokens, self._prompt_lens[chunk.slot] - 1) - chunk.start, 0)

    def build(self, step: SchedulerOutput) -> tuple[ModelInput, BatchLayout]:
        """The step's arrays, and where its rows lie in them."""
        for update in step.block_updates:
            self._apply(update)
        shape = self.shape_of(step)
        inputs = self.padding(shape)
        assert isinstance(inputs, ModelInput), shape
        decode, tiles = inputs.decode, inputs.tiles
        num_blocks, rows = shape.context_blocks, len(step.decode)
        if rows:
            slots = [row.slot for row in step.decode]
            decode[:rows, 0] = slots
            if step.num_drafts:
                decode[:rows, 1] = [row.num_drafts for row in step.decode]
            decode[:rows, ModelInput.DECODE_COLUMNS :] = self._tables[slots, :num_blocks]
        num_decoded = shape.decode_rows * shape.decode_width
        first_tiles, sampled_tiles, tile = [], [], 0
        for chunk in step.prefill:
            num_tiles = self._limits.num_tiles(chunk.num_tokens)
            mine = tiles[tile : tile + num_tiles]
            offsets = np.arange(num_tiles, dtype=np.int32) * shape.tile_size
            mine[:, 0] = chunk.slot
            mine[:, 1] = chunk.start + offsets
            mine[:, 2] = np.minimum(chunk.num_tokens - offsets, shape.tile_size)
            mine[:, ModelInput.TILE_COLUMNS :] = self._tables[chunk.slot, :num_blocks]
            first_tiles.append(tile)
            tile += num_tiles
            if chunk.samples:
                mine[-1, 3] = 1
                sampled_tiles.append(num_decoded + tile - 1)
        layout = BatchLayout(
            shape=shape,
            sampled_tiles=sampled_tiles,
            num_logprobs=[self._num_logprobs[slot] for slot in sampling_slots(step)],
            first_tiles=first_tiles,
            prompt_targets=[self.prompt_targets(chunk) for chunk in step.prefill],
            num_prompt_logprobs=[self._num_prompt_logprobs[chunk.slot] or 0 for chunk in step.prefill],
        )
        return inputs, layout

    def padding(self, shape: StepShape) -> ModelInput | CatchUpInput:
        """The arrays of a step of this shape that computes nothing."""
        if shape.is_catch_up:
            return CatchUpInput(self._empty(shape, shape.prefill_tiles, CatchUpInput.COLUMNS))
        return ModelInput(
            self._empty(shape, shape.decode_rows, ModelInput.DECODE_COLUMNS),
            self._empty(shape, shape.prefill_tiles, ModelInput.TILE_COLUMNS),
        )

    def _empty(self, shape: StepShape, num_rows: int, num_columns: int) -> np.ndarray | None:
        """Rows of the sink without blocks; None for no rows."""
        if not num_rows:
            return None
        rows = np.zeros((num_rows, num_columns + shape.context_blocks), np.int32)
        rows[:, 0] = self._sink
        return rows

    def shape_of(self, step: SchedulerOutput) -> StepShape:
        """The compiled shape that a step runs in."""
        return self._chooser.choose(self._need(step))

    def build_catch_up(self, step: SchedulerOutput) -> tuple[StepShape, CatchUpInput]:
        """The arrays with which the draft model catches up before the step, whose block updates are applied by now."""
        rows, shape = step.catch_up, self.catch_up_shape(step)
        found = [(row.slot, row.start, idx, idx == row.num_tiles - 1) for row in rows for idx in range(row.num_tiles)]
        inputs = self.padding(shape)
        assert isinstance(inputs, CatchUpInput), shape
        inputs.tiles[: len(found), : CatchUpInput.COLUMNS] = found
        slots = [slot for slot, *_ in found]
        inputs.tiles[: len(found), CatchUpInput.COLUMNS :] = self._tables[slots, : shape.context_blocks]
        return shape, inputs

    def catch_up_shape(self, step: SchedulerOutput) -> StepShape:
        """The compiled shape in which the draft model catches up before the step."""
        return self._chooser.choose(
            StepShape(
                decode_rows=0,
                prefill_tiles=sum(row.num_tiles for row in step.catch_up),
                tile_size=self._limits.tile_size,
                context_blocks=-(-max(row.end for row in step.catch_up) // self._block_size),
                is_catch_up=True,
            )
        )

    def _apply(self, update: BlockUpdate) -> None:
        self._tables[update.slot, update.first_idx : update.first_idx + len(update.block_ids)] = update.block_ids

    def _need(self, step: SchedulerOutput) -> StepShape:
        longest = max(
            max((row.end for row in step.decode), default=0),
            max((chunk.start + chunk.num_tokens for chunk in step.prefill), default=0),
        )
        slots = sampling_slots(step)
        prompt_logprobs = any(self.prompt_targets(chunk) for chunk in step.prefill)
        return StepShape(
            decode_rows=max(len(step.decode), step.padded_decode_rows),
            prefill_tiles=sum(self._limits.num_tiles(chunk.num_tokens) for chunk in step.prefill)
            + step.num_padding_tiles,
            tile_size=self._limits.tile_size,
            context_blocks=-(-longest // self._block_size),
            num_decode_steps=step.num_decode_steps,
            sampling=SamplingMode(int(self._modes[slots].max())) if slots else SamplingMode.GREEDY,
            prompt_logprobs=prompt_logprobs,
            num_drafts=step.num_drafts,
        )


def sampling_slots(step: SchedulerOutput) -> list[int]:
    """Slots of the rows that sample: decode rows, then the chunks that reach their request's newest token."""
    return [row.slot for row in step.decode] + [chunk.slot for chunk in step.prefill if chunk.samples]
