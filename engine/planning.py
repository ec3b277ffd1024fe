"""Everything that is decided about an engine before its weights are read: what `EngineCore` builds from, and `quire compile` compiles."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from quire.backends.base import Backend, ShapeLimits, StepShape
from quire.engine.config import EngineConfig, ResolvedConfig, resolve, resolve_block_size, resolve_dtype
from quire.engine.device_state import CacheArrays, DeviceState, cache_block_bytes, empty_slots
from quire.engine.loading import WeightPlacement, planned_weight_bytes
from quire.engine.programs import EVERYWHERE, ProgramSource, abstract_on, slot_update_source, step_source
from quire.engine.step import StepConfig
from quire.kernels.errors import InvalidConfigError
from quire.kernels.ops import Ops
from quire.kernels.sampling.rows import SamplingMode
from quire.models.checkpoint import resolve_model
from quire.models.config import ModelConfig
from quire.models.parallel import Parallel, check_divisible, num_held_kv_heads
from quire.models.registry import load_config

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EnginePlan:
    """One model on one backend, with every number decided."""

    settings: EngineConfig
    folder: Path
    model: ModelConfig
    backend: Backend
    mesh: Mesh
    ops: Ops
    resolved: ResolvedConfig

    @classmethod
    def make(cls, settings: EngineConfig, backend: Backend) -> EnginePlan:
        """Reads the model's config.json. Raises InvalidConfigError, ModelError or BackendError with the remedy."""
        mesh = backend.make_mesh(settings.device.tensor_parallel_size)
        folder = resolve_model(settings.model.model)
        model = load_config(folder, settings.model.max_model_len)
        if model.tie_word_embeddings:
            model = dataclasses.replace(model, holds_head_apart=backend.capabilities.holds_head_apart)
        check_divisible(model, mesh.size)
        capabilities = backend.capabilities
        dtype, block_size = resolve_dtype(settings, model, capabilities), resolve_block_size(settings, capabilities)
        wanted = _wanted_kernels(settings.device.kernels)
        ops = backend.select_ops(model, dtype, settings.model.quantization, block_size, mesh.size, wanted)
        logger.info("kernels: %s", ops.describe().replace("\n", ", "))
        weights = planned_weight_bytes(model, capabilities, dtype, settings.model.quantization, mesh.size)
        resolved = _resolve(settings, model, backend, ops, weights)
        return cls(settings, folder, model, backend, mesh, ops, resolved)

    def after_loading(self) -> EnginePlan:
        """The plan for the memory that is left once the weights are in it."""
        return dataclasses.replace(self, resolved=_resolve(self.settings, self.model, self.backend, self.ops, 0))

    @property
    def placement(self) -> WeightPlacement:
        """How and where the weights are held."""
        dtype = np.dtype(jnp.dtype(self.resolved.dtype))
        return WeightPlacement(
            self.model, dtype, self.ops, self.settings.model.quantization, self.mesh, self.backend.memory
        )

    @property
    def shapes(self) -> tuple[StepShape, ...]:
        """Every shape that is compiled."""
        return tuple(self.backend.step_shapes(_limits(self.settings, self.resolved, self.ops)))

    @property
    def step_config(self) -> StepConfig:
        """What is static about every step."""
        return StepConfig(
            self.model,
            self.ops,
            self.resolved.block_size,
            self.resolved.max_logprobs,
            unroll_steps=not self.backend.capabilities.scan_layers,
            parallel=Parallel(self.mesh.size),
        )

    @property
    def cache_arrays(self) -> CacheArrays:
        """The KV cache."""
        return CacheArrays.of(
            self.model,
            self.backend.capabilities,
            self.ops.kv_cache.function,
            self.resolved.num_kv_blocks,
            self.resolved.block_size,
            self.resolved.dtype,
            self.mesh.size,
        )

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights on each device."""
        quantization = self.settings.model.quantization
        return planned_weight_bytes(
            self.model, self.backend.capabilities, self.resolved.dtype, quantization, self.mesh.size
        )

    @property
    def working_bytes(self) -> int:
        """Bytes of each device that the cache leaves to the temporary arrays of a step."""
        gathered = 0 if self.ops.attends_in_place else self.block_bytes // self.model.num_layers
        dtype, num_devices = self.resolved.dtype, self.mesh.size
        return max(working_bytes(self.model, dtype, shape, num_devices, gathered) for shape in self.shapes)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block of the KV cache on each device, all layers together."""
        return cache_block_bytes(
            self.model,
            self.backend.capabilities,
            self.ops.kv_cache.function,
            self.resolved.block_size,
            self.resolved.dtype,
            self.mesh.size,
        )

    def sources(self) -> list[ProgramSource]:
        """Every program of the engine, from abstract weights: what can be compiled on a machine that has neither them nor the device."""
        params = self.placement.abstract(stacked=self.backend.capabilities.scan_layers)
        # Their sharding is what says which device the programs are for, also where it is one.
        whole = NamedSharding(self.mesh, EVERYWHERE)
        slots = abstract_on(
            empty_slots(self.resolved.max_num_seqs, self.resolved.max_model_len, self.model.vocab_size), whole
        )
        state = DeviceState(self.cache_arrays.abstract(self.mesh), slots)
        steps = [step_source(self.step_config, shape, params, state, self.mesh) for shape in self.shapes]
        return [*steps, slot_update_source(slots, self.resolved.max_model_len, self.model.vocab_size, self.mesh)]


def _resolve(
    settings: EngineConfig, model: ModelConfig, backend: Backend, ops: Ops, weight_bytes: int
) -> ResolvedConfig:
    """`weight_bytes` are those that one device does not hold yet."""
    capabilities, num_devices = backend.capabilities, settings.device.tensor_parallel_size
    dtype, block_size = resolve_dtype(settings, model, capabilities), resolve_block_size(settings, capabilities)
    utilization = settings.cache.memory_utilization or capabilities.memory_utilization
    block_bytes = cache_block_bytes(model, capabilities, ops.kv_cache.function, block_size, dtype, num_devices)

    def decide(step_bytes: int) -> ResolvedConfig:
        cache_bytes = backend.kv_cache_bytes(utilization, weight_bytes + step_bytes)
        if cache_bytes <= 0:
            free, needed = backend.kv_cache_bytes(1.0, 0) / 2**30, (weight_bytes + step_bytes) / 2**30
            raise InvalidConfigError(
                f"weights still to be read and a step's temporary arrays take {needed:.1f} GiB on each device as {dtype}, and "
                f"{free:.1f} GiB of it are free: spread the model over more devices (tensor_parallel_size), hold it in fewer "
                "bits (quantization, dtype), or take a smaller one"
            )
        return resolve(
            settings, model, capabilities, cache_bytes=cache_bytes, block_bytes=block_bytes, block_size=block_size
        )

    # How large steps are is decided first, and does not hang on the cache.
    shapes = backend.step_shapes(_limits(settings, decide(0), ops))
    gathered = 0 if ops.attends_in_place else block_bytes // model.num_layers
    return decide(max(working_bytes(model, dtype, shape, num_devices, gathered) for shape in shapes))


def working_bytes(model: ModelConfig, dtype: str, shape: StepShape, num_devices: int, gathered_block_bytes: int) -> int:
    """About what a step's temporary arrays take on one device: the widest layer's activations, and the logits of all its rows.

    `gathered_block_bytes` is what attention takes for each block that a row could have, where it gathers them. An
    estimate from above: `quire compile` prints it beside what the compiler says.
    """
    itemsize = jnp.dtype(dtype).itemsize
    heads = model.num_heads + 2 * num_held_kv_heads(model, num_devices)
    mlp = model.intermediate_size if model.moe is None else model.moe.intermediate_size * model.moe.num_experts
    widths = 4 * model.hidden_size + (2 * heads * model.head_dim + 3 * mlp) // num_devices
    logit_rows = shape.num_logit_rows + (shape.tile_size if shape.prompt_logprobs else 0)
    # Float32 logits, gathered, and what the sampler makes of them.
    num_logits = 2 if shape.sampling < SamplingMode.FULL else 5
    # Gathered as they are and once more with what a row does not see taken out, beside the scores.
    gathered = 3 * max(shape.decode_rows, shape.prefill_tiles) * shape.context_blocks * gathered_block_bytes
    return shape.num_tokens * widths * itemsize + num_logits * logit_rows * model.vocab_size * 4 + gathered


def _limits(settings: EngineConfig, resolved: ResolvedConfig, ops: Ops) -> ShapeLimits:
    return ShapeLimits(
        max_num_seqs=resolved.max_num_seqs,
        max_prefill_tiles=resolved.limits.max_prefill_tiles,
        max_model_len=resolved.max_model_len,
        block_size=resolved.block_size,
        decode_steps_per_dispatch=settings.scheduler.decode_steps_per_dispatch,
        is_padding_free=ops.is_padding_free,
        is_random_free=ops.is_random_free,
        most_sampling=SamplingMode[settings.device.sampling.upper()],
    )


def _wanted_kernels(text: str | None) -> dict[str, str]:
    """`op=name,op=name` as a dict. Raises InvalidConfigError for anything else."""
    if not text:
        return {}
    pairs = [pair.split("=") for pair in text.split(",")]
    if any(len(pair) != 2 for pair in pairs):
        raise InvalidConfigError(f"kernels={text!r} is not of the form op=name,op=name")
    wanted = {op.strip(): name.strip() for op, name in pairs}
    if len(wanted) != len(pairs):
        raise InvalidConfigError(f"kernels={text!r} names an op twice")
    return wanted
