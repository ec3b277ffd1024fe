"""Tensor parallelism: what each device of a group holds of every parameter, and how partial results become whole ones.

A program is written for one device and runs on all of them at once (`jax.shard_map`): it sees its own part of each parameter, and says
itself where parts are summed. Heads, key/value heads, the MLP's width, experts and the vocabulary are cut; the residual stream is whole
everywhere. Where there are fewer key/value heads than devices each is held by several, and a vocabulary that cannot be cut evenly is
padded with zeros. Source of the cut: Shoeybi et al. 2019 (Megatron-LM).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, PartitionSpec

from quire.kernels.errors import InvalidConfigError
from quire.models.config import ModelConfig
from quire.models.params import HostTensor, ParamSpec

MODEL_AXIS = "model"
"""The mesh axis over which one model is spread."""
_CUT_AXES = ("heads", "kv_heads", "mlp", "vocab")


def model_mesh(devices: Sequence[Any] | None, size: int) -> jax.sharding.Mesh:
    """The first `size` devices, for one model; without devices a mesh that can be compiled for and holds no array."""
    if devices is None:
        abstract: Any = AbstractMesh((size,), (MODEL_AXIS,))
        mesh: jax.sharding.Mesh = abstract
        return mesh
    return jax.sharding.Mesh(np.array(devices[:size]), (MODEL_AXIS,))


@dataclass(frozen=True)
class Parallel:
    """The devices that run a program together; of one alone, every operation here is the identity."""

    size: int = 1

    def sum(self, x: jax.Array) -> jax.Array:
        """The sum of every device's `x`, on every device."""
        return jax.lax.psum(x, MODEL_AXIS) if self.size > 1 else x

    def gather(self, x: jax.Array, axis: int) -> jax.Array:
        """Every device's `x` one after the other along `axis`, on every device."""
        return jax.lax.all_gather(x, MODEL_AXIS, axis=axis, tiled=True) if self.size > 1 else x

    def offset(self, count: int) -> jax.Array | int:
        """Where a device's part begins along an axis of which each holds `count`."""
        return jax.lax.axis_index(MODEL_AXIS) * count if self.size > 1 else 0


ALONE = Parallel()


def check_divisible(config: ModelConfig, size: int) -> None:
    """Raises InvalidConfigError with the numbers and a size that works, where `size` devices cannot share the model."""

    def refusal(size: int) -> str | None:
        widths = {"num_attention_heads": config.num_heads}
        if config.moe is None:
            widths["intermediate_size"] = config.intermediate_size
        elif config.moe.num_experts % size:
            widths["moe_intermediate_size"] = config.moe.intermediate_size
        for name, width in widths.items():
            if width % size:
                return f"{name}={width} is not a multiple of it"
        if config.num_kv_heads % size and size % config.num_kv_heads:
            return f"num_key_value_heads={config.num_kv_heads} neither divides it nor is a multiple of it"
        return None

    if reason := refusal(size):
        fitting = [str(n) for n in range(1, 2 * size) if refusal(n) is None]
        raise InvalidConfigError(f"tensor_parallel_size={size}: {reason}; sizes that fit: {', '.join(fitting)}")


def num_held_kv_heads(config: ModelConfig, size: int) -> int:
    """Key/value heads that `size` devices hold together, repeated ones included."""
    return max(config.num_kv_heads, size)


def held_shape(spec: ParamSpec, config: ModelConfig, size: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of what the devices hold together of a parameter whose own is `shape`."""
    sizes = dict(zip(_last(spec.axes, len(shape)), shape, strict=True))
    if "kv_heads" in sizes:
        sizes["kv_heads"] = num_held_kv_heads(config, size) * config.head_dim
    if "vocab" in sizes:
        sizes["vocab"] = -(-sizes["vocab"] // size) * size
    return tuple(sizes.values())


def partition(spec: ParamSpec, config: ModelConfig, size: int, num_axes: int) -> PartitionSpec:
    """Which of a parameter's last `num_axes` axes is cut."""
    cut = _cut_axis(spec, config, size)
    return PartitionSpec(*(MODEL_AXIS if axis == cut else None for axis in _last(spec.axes, num_axes)))


def _cut_axis(spec: ParamSpec, config: ModelConfig, size: int) -> str | None:
    # Whole experts, where they can be shared out: a part of a narrow one would not fill the device's registers.
    if spec.num_experts is not None and config.moe is not None and config.moe.num_experts % size == 0:
        return "experts"
    return next((axis for axis in spec.axes if axis in _CUT_AXES), None)


def read_held(
    tensor: HostTensor, spec: ParamSpec, config: ModelConfig, size: int, index: tuple[slice, ...]
) -> np.ndarray[Any, Any]:
    """The part `index` of what the devices hold together, made from the parameter as it is; reads no more of it than needed."""
    axes = _last(spec.axes, len(tensor.shape))
    bounds = [s.indices(n)[:2] for s, n in zip(index, held_shape(spec, config, size, tensor.shape), strict=True)]
    for axis, name in enumerate(axes):
        first, end = bounds[axis]
        if name == "kv_heads" and size > config.num_kv_heads:
            head_dim = config.head_dim
            heads = np.arange(first // head_dim, -(-end // head_dim)) * config.num_kv_heads // size
            columns = (heads[:, None] * head_dim + np.arange(head_dim)).reshape(-1)
            columns = columns[first - first // head_dim * head_dim :][: end - first]
            bounds[axis] = (int(columns[0]), int(columns[-1]) + 1)
            repeated: np.ndarray[Any, Any] = np.take(tensor[_slices(bounds)], columns - columns[0], axis=axis)
            return repeated
        if name == "vocab" and end > tensor.shape[axis]:
            bounds[axis] = (min(first, tensor.shape[axis]), tensor.shape[axis])
            part = tensor[_slices(bounds)]
            missing = [(0, 0)] * len(axes)
            missing[axis] = (0, end - first - part.shape[axis])
            return np.pad(part, missing)
    return tensor[_slices(bounds)]


def _last(axes: tuple[str, ...], count: int) -> tuple[str, ...]:
    return axes[len(axes) - count :]


def _slices(bounds: list[tuple[int, int]]) -> tuple[slice, ...]:
    return tuple(slice(*pair) for pair in bounds)
