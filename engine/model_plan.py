"""A model on a backend: its kernels, its weights, its cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from quire.backends.base import Backend
from quire.engine.config import EngineConfig, ModelOptions, resolve_block_size, resolve_dtype
from quire.engine.device_state import CacheArrays, cache_block_bytes
from quire.engine.loading import WeightPlacement, planned_weight_bytes
from quire.engine.passes import StepModel
from quire.kernels.errors import InvalidConfigError
from quire.kernels.ops import Ops
from quire.models.checkpoint import load_params
from quire.models.config import ModelConfig
from quire.models.eagle import EagleConfig, build_eagle_params, eagle_param_dtype, eagle_specs, init_eagle_params
from quire.models.eagle_checkpoint import load_eagle_config, load_eagle_params
from quire.models.parallel import Parallel, check_divisible
from quire.models.params import Params, build_params, init_params, param_specs
from quire.models.registry import load_config


@dataclass(frozen=True)
class ModelPlan:
    """A model on a backend: the target, or what drafts for it, a smaller model or a head of the target's own."""

    folder: Path
    model: ModelConfig
    ops: Ops
    dtype: str
    quantization: str
    block_size: int
    backend: Backend
    mesh: Mesh
    head: EagleConfig | None = None
    """What makes it a head; `model` is then its one layer."""

    @classmethod
    def of_head(cls, folder: Path, target: ModelPlan, settings: EngineConfig, quantization: str) -> ModelPlan:
        """A head for the target. Raises InvalidConfigError or UnsupportedModelError where it was made for another."""
        head = load_eagle_config(folder, target.model, settings.model.max_model_len)
        check_divisible(head.model, target.mesh.size)
        wanted = wanted_kernels(settings.device.kernels)
        ops = target.backend.select_ops(
            head.model, target.dtype, quantization, target.block_size, target.mesh.size, wanted
        )
        return cls(
            folder, head.model, ops, target.dtype, quantization, target.block_size, target.backend, target.mesh, head
        )

    @classmethod
    def make(
        cls,
        folder: Path,
        settings: EngineConfig,
        backend: Backend,
        mesh: Mesh,
        quantization: str,
        dtype: str | None = None,
    ) -> ModelPlan:
        """Reads the folder's config.json; None is the dtype that the settings ask for.

        Raises InvalidConfigError, ModelError or KernelUnavailableError with the remedy.
        """
        model = load_config(folder, settings.model.max_model_len)
        if model.tie_word_embeddings:
            model = dataclasses.replace(model, holds_head_apart=backend.capabilities.holds_head_apart)
        check_divisible(model, mesh.size)
        dtype = dtype or resolve_dtype(settings, model, backend.capabilities)
        block_size = resolve_block_size(settings, backend.capabilities)
        wanted = wanted_kernels(settings.device.kernels)
        ops = backend.select_ops(model, dtype, quantization, block_size, mesh.size, wanted)
        return cls(folder, model, ops, dtype, quantization, block_size, backend, mesh)

    @property
    def placement(self) -> WeightPlacement:
        """How and where the weights are held."""
        dtype = np.dtype(jnp.dtype(self.dtype))
        return WeightPlacement(self.model, dtype, self.ops, self.quantization, self.mesh, self.backend.memory)

    @property
    def step_model(self) -> StepModel:
        """What is static about it in every step."""
        return StepModel(self.model, self.ops, Parallel(self.mesh.size))

    def load(self, options: ModelOptions, progress: Callable[[int, int], None]) -> Params:
        """Its weights, read or made up as `options.load_format` says; `progress(done, total)` is called per tensor that is read."""
        placement, stacked = self.placement, self.backend.capabilities.scan_layers
        is_dummy = options.load_format == "dummy"
        if self.head is not None:
            if is_dummy:
                return init_eagle_params(self.head, options.seed, placement.dtype, place=placement.place)
            return load_eagle_params(self.folder, self.head, placement.dtype, place=placement.place)
        if is_dummy:
            return init_params(self.model, options.seed, placement.dtype, stacked=stacked, place=placement.place)
        return load_params(
            self.folder, self.model, placement.dtype, stacked=stacked, place=placement.place, progress=progress
        )

    def describe_weights(self) -> Params:
        """What `load` gives on a mesh, of jax.ShapeDtypeStruct."""
        placement = self.placement
        if self.head is not None:
            return build_eagle_params(
                self.head, lambda spec, layer: placement.describe(spec, layer, eagle_param_dtype(spec, placement.dtype))
            )
        return build_params(self.model, placement.describe, stacked=self.backend.capabilities.scan_layers)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights on each device."""
        specs = param_specs(self.model) if self.head is None else eagle_specs(self.head)
        return planned_weight_bytes(
            specs.values(), self.model, self.backend.capabilities, self.dtype, self.quantization, self.mesh.size
        )

    @property
    def block_bytes(self) -> int:
        """Bytes of one block of its KV cache on each device, all layers together."""
        return cache_block_bytes(
            self.model,
            self.backend.capabilities,
            self.ops.kv_cache.function,
            self.block_size,
            self.dtype,
            self.mesh.size,
        )

    def cache_arrays(self, num_blocks: int) -> CacheArrays:
        """A KV cache of so many blocks."""
        return CacheArrays.of(
            self.model,
            self.backend.capabilities,
            self.ops.kv_cache.function,
            num_blocks,
            self.block_size,
            self.dtype,
            self.mesh.size,
        )


def wanted_kernels(text: str | None) -> dict[str, str]:
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
