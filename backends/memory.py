"""Where an engine's arrays live: in jax's arrays, or in tensors of another runtime that the host holds by a handle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from quire.kernels.paged_attention.contract import CacheFormat

Read = Callable[[tuple[slice, ...]], np.ndarray]
"""Gives a part of an array, the part of one device."""


class DeviceMemory(Protocol):
    """Puts arrays on the devices of a mesh. What it gives has a shape, a dtype and a sharding, and is handed to programs."""

    def put(self, mesh: Mesh, spec: PartitionSpec, shape: tuple[int, ...], dtype: np.dtype, read: Read) -> Any:
        """An array of the host, cut as `spec` says; each device's part is read by itself."""
        ...

    def allocate(
        self, mesh: Mesh, spec: PartitionSpec, shape: tuple[int, ...], dtype: np.dtype, cache_format: CacheFormat
    ) -> Any:
        """An array of the KV cache, whose content has no meaning yet."""
        ...


class JaxMemory:
    """jax's arrays."""

    def put(self, mesh: Mesh, spec: PartitionSpec, shape: tuple[int, ...], dtype: np.dtype, read: Read) -> jax.Array:
        """See `DeviceMemory`."""
        if mesh.size == 1:
            whole = read(tuple(slice(0, size) for size in shape))
            placed: jax.Array = jax.device_put(whole, mesh.devices.flat[0])
            return placed

        def read_part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            return read(index)

        return jax.make_array_from_callback(shape, NamedSharding(mesh, spec), read_part)

    def allocate(
        self, mesh: Mesh, spec: PartitionSpec, shape: tuple[int, ...], dtype: np.dtype, cache_format: CacheFormat
    ) -> jax.Array:
        """See `DeviceMemory`."""
        if mesh.size == 1:
            with jax.default_device(mesh.devices.flat[0]):
                return cache_format.allocate(shape, dtype)
        make = jax.jit(lambda: cache_format.allocate(shape, dtype), out_shardings=NamedSharding(mesh, spec))
        allocated: jax.Array = make()
        return allocated
