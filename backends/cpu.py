"""The CPU: runs everywhere, and is what a newcomer meets first."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import jax

from quire.backends.base import Capabilities, Program, ShapeLimits, StepShape
from quire.backends.environment import available_memory, available_processors, cpu_flags
from quire.backends.memory import JaxMemory
from quire.backends.shapes import decode_row_sizes, with_drafts, with_sampling
from quire.kernels.errors import BackendError
from quire.kernels.native.library import limit_threads
from quire.kernels.ops import Ops, choose_ops
from quire.models.config import ModelConfig
from quire.models.parallel import model_mesh

# Rows of a decode rectangle grow by this factor from shape to shape: a step is at most so much wider than its batch.
ROW_FACTOR = 4
# A second, shorter context is compiled for the reference attention, which gathers a row's whole table, where it would gain most.
SHORT_CONTEXT_SHARE = 4
MIN_SHORT_CONTEXT = 256


class CpuBackend:
    """XLA:CPU through jax's own client, all cores as one device."""

    def __init__(self) -> None:
        try:
            self._devices = jax.devices("cpu")
        except RuntimeError as error:
            raise BackendError(f"jax has no CPU device here ({error}); is JAX_PLATFORMS set without cpu?") from error
        self.memory = JaxMemory()
        self.capabilities = Capabilities(
            platform="cpu",
            device_kind=self._devices[0].device_kind,
            mixed_batches=True,
            dtypes=("float32", "bfloat16"),
            # XLA:CPU has fast bfloat16 products only where the processor has them; elsewhere float32 is quicker than converting.
            default_dtype=None if {"avx512_bf16", "amx_bf16"} & cpu_flags() else "float32",
            block_size=16,
            block_size_multiple=1,
            tile_size=32,
            # Unrolled, with one array per layer: under a scan XLA:CPU copies the cache.
            scan_layers=False,
            # XLA:CPU widens a bfloat16 cache to update it and copies it whole; 16-bit integers are updated in place.
            cache_bits_dtype={"bfloat16": "uint16"},
            max_num_seqs=32,
            # The reference attention gathers all that a row may reach, so a context that nobody uses still costs time.
            default_max_model_len=2048,
            max_prefill_tokens=512,
            memory_utilization=0.5,
            # The compiler releases the GIL and uses several cores by itself; two at once keep them busy while the third is traced.
            max_compile_threads=2,
            has_host_memory=True,
        )

    def make_mesh(self, tensor_parallel_size: int) -> jax.sharding.Mesh:
        if tensor_parallel_size > len(self._devices):
            raise BackendError(
                f"tensor_parallel_size={tensor_parallel_size}: all cores are one device here; leave it at 1, or try out how a model "
                "is spread with XLA_FLAGS=--xla_force_host_platform_device_count"
                f"={tensor_parallel_size} in the environment, which makes nothing faster"
            )
        return model_mesh(self._devices, tensor_parallel_size)

    def select_ops(
        self,
        config: ModelConfig,
        dtype: str,
        quantization: str,
        block_size: int,
        tensor_parallel_size: int,
        wanted: dict[str, str] | None,
    ) -> Ops:
        context = self.capabilities.op_context(
            config, dtype, quantization, block_size, tensor_parallel_size, instruction_sets=cpu_flags()
        )
        ops = choose_ops(context, wanted)
        limit_threads(available_processors())
        return ops

    def kv_cache_bytes(self, memory_utilization: float, reserved_bytes: int) -> int:
        return int((available_memory() - reserved_bytes) * memory_utilization)

    def step_shapes(self, limits: ShapeLimits) -> Sequence[StepShape]:
        full = -(-limits.max_model_len // limits.block_size)
        short = max(full // SHORT_CONTEXT_SHARE, -(-MIN_SHORT_CONTEXT // limits.block_size))
        contexts = (short, full) if 2 * short <= full and not limits.is_padding_free else (full,)
        rows = _row_sizes(limits.max_num_seqs)
        step_counts = sorted({1, limits.decode_steps_per_dispatch})
        decode = [
            StepShape(r, 0, self.capabilities.tile_size, c, n) for r in rows for c in contexts for n in step_counts
        ]
        tiles = sorted({min(2, limits.max_prefill_tiles), limits.max_prefill_tiles})
        # Rows that nobody holds cost no more than their logits where padding is left out.
        mixed_rows = [rows[-1]] if limits.is_padding_free else sorted({rows[min(1, len(rows) - 1)], rows[-1]})
        mixed = [StepShape(r, p, self.capabilities.tile_size, full) for r in mixed_rows for p in tiles]
        return with_drafts(with_sampling(decode, mixed, limits), limits)

    def lower(self, program: Program, arguments: Sequence[Any], donate: Sequence[int]) -> Any:
        return jax.jit(program, donate_argnums=tuple(donate)).lower(*arguments)

    def compile(self, lowered: Any) -> Program:
        compiled: Program = lowered.compile()
        return compiled

    def profile(self, folder: Path) -> AbstractContextManager[Any]:
        return jax.profiler.trace(str(folder))


def _row_sizes(max_num_seqs: int) -> list[int]:
    """A single row is worth a program of its own; then 8 and on."""
    return [1] if max_num_seqs == 1 else [1, *decode_row_sizes(max_num_seqs, 8, ROW_FACTOR)]
