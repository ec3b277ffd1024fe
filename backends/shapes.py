"""Which step shapes cover what an engine may be asked: parts that backends make their lists of."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from quire.backends.base import ShapeLimits, StepShape
from quire.kernels.sampling.rows import SamplingMode


def decode_row_sizes(max_num_seqs: int, first: int, factor: int) -> list[int]:
    """Row counts of decode shapes: `first`, then times `factor`, the largest exactly `max_num_seqs`."""
    sizes = []
    size = first
    while size < max_num_seqs:
        sizes.append(size)
        size *= factor
    return [*sizes, max_num_seqs]


def with_sampling(decode: Sequence[StepShape], mixed: Sequence[StepShape], limits: ShapeLimits) -> list[StepShape]:
    """Each shape for greedy and for plain random sampling; the full sampler, which few requests need, for the fewest that cover all."""
    plain = [SamplingMode.GREEDY, SamplingMode.RANDOM]
    if limits.is_random_free:
        plain = [min(SamplingMode.RANDOM, limits.most_sampling)]
    common = [_with(shape, mode) for shape in (*decode, *mixed) for mode in plain if mode <= limits.most_sampling]
    if limits.most_sampling < SamplingMode.FULL:
        return common
    largest = max(mixed, key=lambda shape: shape.num_tokens)
    widest = max(shape.context_blocks for shape in decode)
    rows = {min(shape.decode_rows for shape in decode), max(shape.decode_rows for shape in decode)}
    full = [_with(s, SamplingMode.FULL) for s in decode if s.context_blocks == widest and s.decode_rows in rows]
    return [
        *common,
        *full,
        _with(largest, SamplingMode.FULL),
        _with(largest, SamplingMode.FULL, prompt_logprobs=True),
    ]


def with_drafts(shapes: Sequence[StepShape], limits: ShapeLimits) -> list[StepShape]:
    """The shapes, and those of speculation: each decode step once more for every number of drafts, and the draft model's own prefill.

    Noise costs little beside what a step with drafts computes, so none is compiled for greedy rows alone; the full sampler, which few
    requests need, is compiled for the fewest and the most drafts.
    """
    counts = limits.draft_counts
    if not counts:
        return list(shapes)
    least = min(SamplingMode.RANDOM, limits.most_sampling)
    decode = [shape for shape in shapes if shape.prefill_tiles == 0 and shape.sampling >= least]
    speculative = [
        dataclasses.replace(shape, num_drafts=count)
        for shape in decode
        for count in counts
        if shape.sampling < SamplingMode.FULL or count in (counts[0], counts[-1])
    ]
    catch_up = []
    if limits.has_draft_cache:
        tiles = {
            (shape.prefill_tiles, shape.tile_size, shape.context_blocks) for shape in shapes if shape.prefill_tiles
        }
        catch_up = [StepShape(0, *sizes, is_catch_up=True) for sizes in sorted(tiles)]
    return [*shapes, *speculative, *catch_up]


def _with(shape: StepShape, sampling: SamplingMode, *, prompt_logprobs: bool = False) -> StepShape:
    return dataclasses.replace(shape, sampling=sampling, prompt_logprobs=prompt_logprobs)
