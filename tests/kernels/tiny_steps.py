"""Steps of tiny models over a paged cache, laid out as the engine lays them out, with kernels of one's choice.

R rows of a rectangle, W tokens per row, T tokens of a step, D hidden size, L layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from quire.kernels.decoder_layer import cpu as layer_cpu
from quire.kernels.linear import cpu as linear_cpu
from quire.kernels.linear import reference as linear_reference
from quire.kernels.paged_attention.contract import RowsOfTokens, StepPlaces, TokenMajor
from quire.kernels.paged_attention.reference import paged_attention, write_kv
from quire.models.config import ModelConfig
from quire.models.decoder import LayerInfo, forward, layer_spec
from quire.models.params import ParamSpec, init_params
from quire.models.registry import load_config
from tests.models.helpers import quick_jit
from tests.models.tiny import TINY

BLOCK_SIZE = 8
NUM_SEQUENCES = 40
MAX_LEN = 160


@dataclass(frozen=True)
class Row:
    """Tokens of one sequence, from position `start` on."""

    sequence: int
    start: int
    count: int = 1


@dataclass(frozen=True)
class Rectangle:
    """Rows of the same width, padded where they have fewer tokens."""

    width: int
    rows: tuple[Row, ...]


@cache
def tiny_config(name: str) -> ModelConfig:
    hf = TINY[name]()
    hf.architectures = [type(hf).__name__.replace("TextConfig", "Config").replace("Config", "ForCausalLM")]
    with TemporaryDirectory() as folder:
        hf.save_pretrained(folder)
        return load_config(Path(folder), max_model_len=MAX_LEN)


class TinyModel:
    """A model with random weights, biases and norms included, and random tokens for every sequence.

    `instruction_set` says whose layers and products run; None composes the layers of reference ops.
    """

    def __init__(self, name: str, format: str, instruction_set: str | None, dtype: str | None = None) -> None:
        self.config = tiny_config(name)
        self.dtype = jnp.dtype(dtype or ("bfloat16" if format == "int8" else format))
        self._quantization = "int8" if format == "int8" else "none"
        self._instruction_set = instruction_set
        self._params = init_params(self.config, 0, self.dtype, stacked=False, place=self._place)
        rng = np.random.default_rng(1)
        self._ids = rng.integers(0, self.config.vocab_size, (NUM_SEQUENCES, MAX_LEN)).astype(np.int32)
        blocks_per_row = MAX_LEN // BLOCK_SIZE
        self._tables = 1 + rng.permutation(NUM_SEQUENCES * blocks_per_row).reshape(NUM_SEQUENCES, -1).astype(np.int32)
        self._run = quick_jit(self._step, static_argnames="widths")
        self.caches = cache(self._caches)

    def _place(self, spec: ParamSpec, array: np.ndarray) -> Any:
        """As `quire.engine.core` places parameters."""
        if spec.is_product_weight(self.config):
            quantization = "none" if spec.key == "router" else self._quantization
            is_embedding = spec.name == "embed_tokens"
            if self._instruction_set is not None:
                return linear_cpu.prepare(self._instruction_set, array.T if is_embedding else array, quantization)
            if not is_embedding or quantization != "none":
                return linear_reference.prepare(array.T if is_embedding else array, quantization)
        if array.ndim == 1:
            rng = np.random.default_rng([len(spec.name), *spec.name.encode()])
            array = (array.astype(np.float32) + 0.3 * rng.normal(size=array.shape)).astype(array.dtype)
        return jnp.asarray(array)

    def _caches(self, lengths: tuple[int, ...]) -> tuple[jax.Array, ...]:
        """A cache per layer with random keys and values for the first tokens of each sequence, NaN everywhere else."""
        rng = np.random.default_rng(2)
        shape = TokenMajor().shape(1 + self._tables.size, BLOCK_SIZE, self.config.num_kv_heads, self.config.head_dim)
        layers = []
        for _ in range(self.config.num_layers):
            layer = np.full(shape, np.nan, np.float32)
            for sequence, length in enumerate(lengths):
                position = np.arange(length)
                places = self._tables[sequence, position // BLOCK_SIZE], position % BLOCK_SIZE
                layer[places] = rng.normal(size=(length, *shape[2:]))
            layers.append(self._as_cache(jnp.asarray(layer)))
        return tuple(layers)

    def _as_cache(self, values: jax.Array) -> jax.Array:
        values = values.astype(self.dtype)
        return jax.lax.bitcast_convert_type(values, jnp.uint16) if self.dtype == jnp.bfloat16 else values

    def written(self, caches: Sequence[jax.Array], row: Row) -> np.ndarray:
        """[L, count, 2K, H]: what lies in the caches where the row's tokens belong, as bits."""
        position = row.start + np.arange(row.count)
        places = self._tables[row.sequence, position // BLOCK_SIZE], position % BLOCK_SIZE
        return np.stack([np.asarray(layer)[places] for layer in caches])

    def step(
        self, rectangles: Sequence[Rectangle], caches: Sequence[jax.Array]
    ) -> tuple[list[np.ndarray], tuple[jax.Array, ...]]:
        """Runs one step: the hidden states [count, D] of every row, in order, and the caches after it."""
        arrays = [self._lay_out(rectangle) for rectangle in rectangles]
        ids, positions, blocks, offsets = (np.concatenate([parts[idx] for parts in arrays]) for idx in range(4))
        widths = tuple(rectangle.width for rectangle in rectangles)
        lens = tuple(tuple(map(jnp.asarray, parts[4])) for parts in arrays)
        hidden, caches = self._run(self._params, ids, positions, tuple(caches), blocks, offsets, lens, widths=widths)
        hidden = np.asarray(hidden)
        outs, first = [], 0
        for rectangle in rectangles:
            for row in rectangle.rows:
                outs.append(hidden[first : first + row.count])
                first += rectangle.width
        return outs, caches

    def _lay_out(self, rectangle: Rectangle) -> tuple[np.ndarray, ...]:
        rows = rectangle.rows
        starts, counts = (np.array([getattr(row, name) for row in rows], np.int32) for name in ("start", "count"))
        sequences = np.array([row.sequence for row in rows])
        offset = np.arange(rectangle.width, dtype=np.int32)[None, :]
        is_real = offset < counts[:, None]
        position = np.where(is_real, starts[:, None] + offset, 0)  # [R, W]
        tables = self._tables[sequences]
        blocks = np.where(is_real, np.take_along_axis(tables, position // BLOCK_SIZE, axis=1), 0)
        offsets = np.where(is_real, position % BLOCK_SIZE, 0)
        ids = self._ids[sequences[:, None], position]
        flat = (array.reshape(-1).astype(np.int32) for array in (ids, position, blocks, offsets))
        return (*flat, (tables, starts + counts, counts))

    def _step(self, params, ids, positions, caches, blocks, offsets, lens, widths):
        rectangles = [RowsOfTokens(*arrays, width=width) for width, arrays in zip(widths, lens, strict=True)]
        places = StepPlaces(blocks, offsets, rectangles)
        run_layer = None if self._instruction_set is None else partial(self._run_layer, places)
        return forward(params, self.config, ids, positions, caches, partial(self._attend, places), run_layer)[:2]

    def _run_layer(self, places: StepPlaces, layer, x, rope, caches, info: LayerInfo):
        spec = layer_spec(self.config, info.sliding_window)
        idx = info.layer_idx
        x, written = layer_cpu.decoder_layer(self._instruction_set, layer, x, rope, caches[idx], places, spec)
        return x, (*caches[:idx], written, *caches[idx + 1 :])

    def _attend(self, places: StepPlaces, q, k, v, caches, info: LayerInfo):
        idx = info.layer_idx
        written = write_kv(caches[idx], k, v, places)
        outs, first = [], 0
        for rows in places.rectangles:
            end = first + rows.block_tables.shape[0] * rows.width
            out = paged_attention(
                q[first:end].reshape(-1, rows.width, *q.shape[1:]),
                written,
                rows.block_tables,
                rows.seq_lens,
                rows.query_lens,
                scale=self.config.attention_scale,
                sliding_window=info.sliding_window,
                soft_cap=self.config.attention_soft_cap,
            )
            outs.append(out.reshape(-1, *q.shape[1:]))
            first = end
        return jnp.concatenate(outs), (*caches[:idx], written, *caches[idx + 1 :])
