"""Random models whose drafts are accepted as often as wanted: all compute everything, and their tokens are replaced.

What speculation gains hangs on how often drafts are accepted, which random weights do not decide in any useful way. So the sampler of
each model is wrapped: it samples for real, and what it gives is replaced by a token that a hash of the request's key and the
position decides. The draft's token is the same one with the wanted probability, by another such hash.

R rows, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from quire.backends.base import Backend, ShapeLimits, StepShape, WrappedBackend
from quire.backends.environment import cache_folder
from quire.bench.peers.shapes import SHAPES, Shape, make_checkpoint
from quire.kernels.ops import Ops
from quire.kernels.sampling.contract import Sample
from quire.kernels.sampling.noise import position_key, seed_key, token_bits
from quire.kernels.sampling.rows import SampleOutput, SamplingMode, SamplingRows
from quire.models.checkpoint import SINGLE_FILE
from quire.models.config import ModelConfig
from quire.models.eagle import default_captured_layers, init_eagle_params
from quire.models.registry import load_config
from quire.models.training.export import export_head, head_config, hf_head_config

TARGET_HASH, DRAFT_HASH = 0, 1
DRAFT_SHAPES = {
    "llama-135m": Shape("LlamaForCausalLM", 192, 8, 3, 1, 64, 512, 49_152, 100_000.0),
    "tiny": Shape("LlamaForCausalLM", 32, 1, 2, 1, 16, 64, 512, 10_000.0),
}
"""About a tenth of the parameters of each target, of the same vocabulary."""


def make_target(shape_name: str, folder: Path | None = None) -> Path:
    """The checkpoint of a target, made unless it is there already."""
    folder = folder or cache_folder() / "speculate"
    return make_checkpoint(SHAPES[shape_name], folder / shape_name)


def make_draft_model(target: Path) -> Path:
    """The checkpoint of a draft model for `make_target`'s, beside it."""
    return make_checkpoint(DRAFT_SHAPES[target.name], target.with_name(f"{target.name}-draft"), seed=1)


def make_head(target: Path) -> Path:
    """The checkpoint of an EAGLE-3 head for `make_target`'s, beside it: as wide as the target, its vocabulary every fourth token."""
    shape, folder = SHAPES[target.name], target.with_name(f"{target.name}-head")
    width = {
        "hidden_size": shape.hidden_size,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.intermediate_size,
    }
    layers = (min(max(idx, 0), shape.num_layers - 1) for idx in default_captured_layers(shape.num_layers))
    target_raw = json.loads((target / "config.json").read_text(encoding="utf-8"))
    raw = hf_head_config(width, target_raw, shape.vocab_size // 4, tuple(sorted(set(layers))))
    is_there = (folder / SINGLE_FILE).is_file() and json.loads((folder / "config.json").read_text()) == raw
    if not is_there:
        config = head_config(raw, load_config(target))
        ids = np.arange(config.draft_vocab_size) * shape.vocab_size // config.draft_vocab_size
        export_head(folder, init_eagle_params(config, 1, np.float32), config, raw, ids)
    return folder


MAKERS = {"draft_model": make_draft_model, "eagle3": make_head}
"""By method, what makes that which drafts."""


def seeds_of(acceptance_idx: int, num_acceptances: int, count: int) -> list[int]:
    """The first seeds whose keys stand for one of the acceptances; see `ForcedSample`."""
    seeds = (seed for seed in itertools.count() if int(seed_key(seed)[0]) % num_acceptances == acceptance_idx)
    return list(itertools.islice(seeds, count))


@dataclass(frozen=True)
class ForcedSample:
    """A sampler whose tokens are replaced: the target's where `is_draft` is not set, else the same ones as often as wanted.

    Which of the acceptances holds for a request is decided by its key, that is by its seed: so one compiled engine serves all.
    """

    sample: Sample
    acceptances: tuple[float, ...]
    is_draft: bool

    def __call__(
        self,
        logits: jax.Array,
        rows: SamplingRows | None,
        *,
        mode: SamplingMode,
        num_logprobs: int,
        is_used: jax.Array | None = None,
    ) -> SampleOutput:
        """`contract.Sample`, for modes that give it rows."""
        assert rows is not None, "shapes without rows are left out by ForcedBackend"
        real = self.sample(logits, rows, mode=mode, num_logprobs=num_logprobs, is_used=is_used)
        forced = self.tokens(rows.key, rows.position, logits.shape[1])
        # No sampler gives a negative token, which XLA cannot know behind the barrier: it has to sample for real.
        sampled = jax.lax.optimization_barrier(real.token_ids)
        replaced: SampleOutput = real.replace(token_ids=jnp.where(sampled < 0, sampled, forced))  # type: ignore[attr-defined]
        return replaced

    def tokens(self, key: jax.Array, position: jax.Array, vocab_size: int) -> jax.Array:
        """key [R, 2] uint32, position [R] int32 -> [R] int32."""
        hashes = token_bits(position_key(key, position), jnp.array([TARGET_HASH, DRAFT_HASH], jnp.int32))  # [R, 2]
        size = np.uint32(vocab_size)
        token = jax.lax.rem(hashes[:, 0], jnp.full_like(hashes[:, 0], size))
        if self.is_draft:
            acceptance_idx = jax.lax.rem(key[:, 0], jnp.full_like(key[:, 0], np.uint32(len(self.acceptances))))
            wanted = jnp.array(self.acceptances, jnp.float32)[acceptance_idx.astype(jnp.int32)]
            uniform = (hashes[:, 1] >> np.uint32(8)).astype(jnp.float32) * np.float32(2.0**-24)
            other = jax.lax.rem(token + np.uint32(1), jnp.full_like(token, size))
            token = jnp.where(uniform < wanted, token, other)
        return token.astype(jnp.int32)


class ForcedBackend(WrappedBackend):
    """A backend whose models sample what `ForcedSample` says. Everything else is the backend's own."""

    def __init__(self, backend: Backend, acceptances: Sequence[float], is_draft: Callable[[ModelConfig], bool]) -> None:
        """`is_draft` tells the config of what drafts from the target's."""
        super().__init__(backend)
        self._acceptances = tuple(acceptances)
        self._is_draft = is_draft

    def select_ops(
        self,
        config: ModelConfig,
        dtype: str,
        quantization: str,
        block_size: int,
        tensor_parallel_size: int,
        wanted: dict[str, str] | None,
    ) -> Ops:
        ops = super().select_ops(config, dtype, quantization, block_size, tensor_parallel_size, wanted)
        forced = ForcedSample(ops.sample.function, self._acceptances, self._is_draft(config))
        return dataclasses.replace(ops, sample=dataclasses.replace(ops.sample, function=forced))

    def step_shapes(self, limits: ShapeLimits) -> Sequence[StepShape]:
        """Without those whose sampler is told nothing of its rows; random ones cover them."""
        shapes = super().step_shapes(limits)
        return [shape for shape in shapes if shape.sampling > SamplingMode.GREEDY or shape.is_catch_up]
