"""What a step takes on a chip that is not here: bytes over bandwidth, operations over throughput, whichever is more, part by part.

A pass of a model over a step's tokens has three parts, one after the other: the dense layers, attention, and the head. Each streams some
bytes and computes some products; the parts of a roofline are those two times, and the larger counts (Williams, Waterman and Patterson,
CACM 2009). Between devices partial sums travel twice per layer. How far below its numbers a chip stays is said by `Efficiency`.

R decode rows, T tokens of the dense layers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from quire.backends.chips import Chip
from quire.kernels.errors import InvalidConfigError

PROMPT_TILE = 128
"""Queries of a prompt for which keys and values are read once."""
COLLECTIVES_PER_LAYER = 2
"""Sums over the devices: after attention and after the MLP."""


@dataclass(frozen=True)
class Efficiency:
    """Which part of its numbers a chip reaches: few factors, fitted to published results or borrowed, as efficiency.json says of each."""

    weights: float
    """Of the memory bandwidth, while weights are streamed."""
    attention: float
    """Of the memory bandwidth, while keys and values are read."""
    compute: float
    """Of the peak throughput of products."""
    collective_us: float
    """Microseconds for a sum over devices, beside what its bytes take."""
    dispatch_us: float
    """Microseconds between a step and the next one that is in flight already."""


@dataclass(frozen=True)
class FittedEfficiency:
    """What is known of a chip's efficiency, and where from."""

    efficiency: Efficiency
    fitted: tuple[str, ...]
    """The factors that were chosen so that published results come out; no more of them than there are results."""
    source: str
    """Of the others."""


@dataclass(frozen=True)
class ModelCost:
    """What a model is to one of the devices that share it."""

    num_layers: int
    dense_bytes: int
    """Of the weights that every step reads, without the embedding, the head and the experts."""
    dense_flops: float
    """Operations per token with these."""
    expert_bytes: int
    """Of one expert, all layers together; 0 without experts."""
    expert_flops: float
    """Operations per token with the experts that it chooses."""
    num_experts: int
    experts_per_token: int
    head_bytes: int
    head_flops: float
    """Operations per row of logits."""
    token_bytes: int
    """Of a token's hidden state, which is what devices sum."""
    kv_bytes: tuple[tuple[int | None, int], ...]
    """Bytes of a token's keys and values by the window of the layers that hold them; None is no window."""
    pair_flops: tuple[tuple[int | None, float], ...]
    """Operations for one query and one key, all of a device's heads, by the window of the layers."""

    def bytes_of_experts(self, num_tokens: int) -> float:
        """Of the experts that so many tokens are expected to choose, each its own by chance."""
        if not self.num_experts:
            return 0.0
        missed = (1.0 - self.experts_per_token / self.num_experts) ** num_tokens
        return self.expert_bytes * self.num_experts * (1.0 - missed)


@dataclass(frozen=True)
class Work:
    """What one pass of a model computes."""

    num_tokens: int
    """Of the dense layers, padding of the compiled shape included."""
    num_logit_rows: int
    decode_contexts: np.ndarray
    """[R] int64, the tokens that each decode row attends to."""
    decode_width: int = 1
    chunks: Sequence[tuple[int, int]] = ()
    """Pieces of prompts: where each begins, and how many tokens it has."""
    gathered_tokens: int = 0
    """Tokens whose keys and values are gathered whatever the rows attend to, where attention does not read in place."""


@dataclass(frozen=True)
class PassSeconds:
    """The parts of a pass."""

    dense: float
    attention: float
    head: float
    collectives: float

    @property
    def total(self) -> float:
        return self.dense + self.attention + self.head + self.collectives


@dataclass(frozen=True)
class Roofline:
    """Times of passes on a number of devices of one kind."""

    chip: Chip
    efficiency: Efficiency
    num_devices: int

    def seconds(self, model: ModelCost, work: Work) -> PassSeconds:
        """What a pass takes."""
        tokens = work.num_tokens
        streamed = self.efficiency.weights
        dense = self._part(
            model.dense_bytes + model.bytes_of_experts(tokens),
            tokens * (model.dense_flops + model.expert_flops),
            streamed,
        )
        head = 0.0
        if work.num_logit_rows:
            head = self._part(model.head_bytes, work.num_logit_rows * model.head_flops, streamed)
        return PassSeconds(dense, self._attention(model, work), head, self._collectives(model, tokens))

    def _part(self, num_bytes: float, flops: float, of_bandwidth: float) -> float:
        of_memory = num_bytes / (self.chip.hbm_gb_per_s * 1e9 * of_bandwidth)
        return max(of_memory, flops / (self.chip.bf16_tflops * 1e12 * self.efficiency.compute))

    def _attention(self, model: ModelCost, work: Work) -> float:
        """One rectangle after the other, as steps call it."""
        flops_by_window = dict(model.pair_flops)
        decode_bytes = decode_flops = prompt_bytes = prompt_flops = 0.0
        for window, num_bytes in model.kv_bytes:
            if len(work.decode_contexts):
                seen = work.decode_contexts if window is None else np.minimum(work.decode_contexts, window)
                num_read = max(int(seen.sum()), work.gathered_tokens)
                decode_bytes += num_read * num_bytes
                decode_flops += num_read * work.decode_width * flops_by_window[window]
            for start, count in work.chunks:
                pairs, num_read = _seen_by_prompt(start, count, window)
                prompt_bytes += num_read * num_bytes
                prompt_flops += pairs * flops_by_window[window]
        of_bandwidth = self.efficiency.attention
        return self._part(decode_bytes, decode_flops, of_bandwidth) + self._part(
            prompt_bytes, prompt_flops, of_bandwidth
        )

    def _collectives(self, model: ModelCost, num_tokens: int) -> float:
        """A ring carries 2 (n - 1) / n of the bytes over each device's links; the embedding and the logits are one sum more."""
        if self.num_devices == 1:
            return 0.0
        count = COLLECTIVES_PER_LAYER * model.num_layers + 1
        travelled = 2 * (self.num_devices - 1) / self.num_devices * num_tokens * model.token_bytes
        link = self.chip.link_gb_per_s
        return count * (self.efficiency.collective_us * 1e-6 + (0.0 if link is None else travelled / (link * 1e9)))


def _seen_by_prompt(start: int, count: int, window: int | None) -> tuple[float, int]:
    """Pairs of a query and a key that it sees, and tokens whose keys are read, tile by tile."""
    pairs, num_read = 0.0, 0
    for first in range(start, start + count, PROMPT_TILE):
        end = min(first + PROMPT_TILE, start + count)
        oldest = 0 if window is None else max(first - window + 1, 0)
        num_read += end - oldest
        mean_seen = (first + 1 + end) / 2
        pairs += (end - first) * (mean_seen if window is None else min(mean_seen, window))
    return pairs, num_read


def read_efficiencies(path: Path | None = None) -> dict[str, FittedEfficiency]:
    """Of every chip by its name, from efficiency.json or a file like it. Raises InvalidConfigError for one that is not."""
    path = path or Path(__file__).parent / "efficiency.json"
    names = [field.name for field in fields(Efficiency)]
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        return {
            chip: FittedEfficiency(
                Efficiency(**{name: entry[name] for name in names}), tuple(entry["fitted"]), entry["source"]
            )
            for chip, entry in entries.items()
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InvalidConfigError(
            f"{path} does not give efficiencies as backends/efficiency.json does: {error}"
        ) from error
