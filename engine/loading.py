"""Loading a model: every weight in the form that the chosen kernels multiply, on the devices that hold a part of it.

Each device's part is read from the files by itself, so host memory holds one part of one parameter at a time, and a host reads
only what its own devices hold.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from quire.backends.base import Capabilities
from quire.backends.memory import DeviceMemory
from quire.kernels.linear.quantize import quantize_weight
from quire.kernels.linear.reference import QuantizedMatrix, WeightOnlyMatrix
from quire.kernels.ops import HELD_AS_ARRAYS, WEIGHT_ONLY, Ops
from quire.models.config import ModelConfig
from quire.models.parallel import held_shape, partition, read_held
from quire.models.params import HostTensor, ParamSpec


@dataclass(frozen=True)
class WeightPlacement:
    """How and where the parameters of one model are held. `place` is a `quire.models.params.Place`."""

    model: ModelConfig
    dtype: np.dtype
    ops: Ops
    quantization: str
    mesh: Mesh
    memory: DeviceMemory

    def place(self, spec: ParamSpec, tensor: HostTensor) -> Any:
        """A parameter from the host in its form, on its devices."""
        if not self._is_prepared(spec):
            return self._put(spec, tensor)
        if spec.name == "embed_tokens":  # [V, D] in the checkpoint
            spec, tensor = _transposed(spec), np.asarray(tensor).T
        quantization = self._quantization_of(spec)
        if self.ops.linear.name not in HELD_AS_ARRAYS:
            return self.ops.linear.function(np.asarray(tensor), quantization)
        if quantization == "none":
            return self._put(spec, tensor)
        values, scales = quantize_weight(np.asarray(tensor))
        return self._quantized(self._put(spec, values), self._put(_without_inputs(spec), scales))

    def describe(self, spec: ParamSpec, layer: int | None, dtype: Any = None) -> Any:
        """What `place` makes of a parameter on a mesh, of jax.ShapeDtypeStruct with shardings: for lowering without weights.

        Whole where `layer` is None; `dtype` takes the place of the weights' own.
        """
        assert self.ops.linear.name in HELD_AS_ARRAYS, "packed weights are made of real ones"
        shape = spec.shape if layer is None else spec.layer_shape
        if not self._is_prepared(spec) or self._quantization_of(spec) == "none":
            return self._abstract(spec, shape, dtype or self.dtype)
        if spec.name == "embed_tokens":
            spec, shape = _transposed(spec), shape[::-1]
        scales_shape = (*shape[:-2], shape[-1])
        return self._quantized(
            self._abstract(spec, shape, np.int8), self._abstract(_without_inputs(spec), scales_shape, np.float32)
        )

    def _is_prepared(self, spec: ParamSpec) -> bool:
        """Whether the linear op decides on the form. An embedding that is read row by row as well stays as it is."""
        if spec.name == "embed_tokens" and self.ops.linear.name in HELD_AS_ARRAYS and self.quantization == "none":
            return False
        return spec.is_product_weight(self.model)

    def _quantized(self, values: Any, scales: Any) -> QuantizedMatrix | WeightOnlyMatrix:
        form = WeightOnlyMatrix if self.ops.linear.name == WEIGHT_ONLY else QuantizedMatrix
        return form(values, scales)

    def _quantization_of(self, spec: ParamSpec) -> str:
        # Which expert a token goes to hangs on small differences.
        return "none" if spec.key == "router" else self.quantization

    def _put(self, spec: ParamSpec, tensor: HostTensor) -> Any:
        size = self.mesh.size

        def read(index: tuple[slice, ...]) -> np.ndarray:
            return np.asarray(tensor) if size == 1 else read_held(tensor, spec, self.model, size, index)

        shape = held_shape(spec, self.model, size, tensor.shape)
        return self.memory.put(self.mesh, partition(spec, self.model, size, len(shape)), shape, tensor.dtype, read)

    def _abstract(self, spec: ParamSpec, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        held = held_shape(spec, self.model, self.mesh.size, shape)
        return jax.ShapeDtypeStruct(held, dtype, sharding=self._sharding(spec, len(shape)))

    def _sharding(self, spec: ParamSpec, num_axes: int) -> NamedSharding:
        return NamedSharding(self.mesh, partition(spec, self.model, self.mesh.size, num_axes))


def planned_weight_bytes(
    specs: Iterable[ParamSpec],
    model: ModelConfig,
    capabilities: Capabilities,
    dtype: str,
    quantization: str,
    num_devices: int,
) -> int:
    """Bytes that each of the devices will hold of the parameters, padding of its memory layout included."""
    total = 0
    for spec in specs:
        held = held_shape(spec, model, num_devices, spec.shape)
        cut = [axis is not None for axis in partition(spec, model, num_devices, len(held))]
        local = tuple(size // num_devices if is_cut else size for size, is_cut in zip(held, cut, strict=True))
        is_quantized = quantization == "int8" and spec.is_product_weight(model) and spec.key != "router"
        itemsize = 1 if is_quantized else jnp.dtype(dtype).itemsize
        total += capabilities.padded_elements(local if len(local) > 1 else (1, *local)) * itemsize
    return total


def _transposed(spec: ParamSpec) -> ParamSpec:
    return replace(spec, axes=spec.axes[::-1], shape=spec.shape[::-1])


def _without_inputs(spec: ParamSpec) -> ParamSpec:
    """The spec of a matrix's scales, one per output."""
    return replace(spec, axes=(*spec.axes[:-2], spec.axes[-1]), shape=(*spec.shape[:-2], spec.shape[-1]))
