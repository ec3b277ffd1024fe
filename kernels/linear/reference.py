"""Weights as plain arrays, and int8 ones as XLA multiplies them."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from quire.kernels.linear.contract import Weight
from quire.kernels.linear.quantize import quantize_rows, quantize_weight


@flax.struct.dataclass
class QuantizedMatrix:
    """A matrix whose column n is scales[n] x values[:, n]; axes before those two are of several matrices of one shape."""

    values: Any  # [..., K, N] int8
    scales: Any  # [..., N] float32

    def matmul(self, x: jax.Array) -> jax.Array:
        """See `contract.Weight`."""
        rows, row_scales = quantize_rows(x)
        sums = jnp.matmul(rows, self.values, preferred_element_type=jnp.int32)
        return sums.astype(jnp.float32) * (row_scales[:, None] * self.scales[None, :])

    def columns(self, ids: jax.Array, dtype: Any) -> jax.Array:
        """See `contract.Weight`."""
        ids = jnp.clip(ids, 0, self.values.shape[1] - 1)
        values = jnp.take(self.values, ids, axis=1).T.astype(jnp.float32)
        return (values * self.scales[ids][:, None]).astype(dtype)


def prepare(matrix: np.ndarray, quantization: str) -> jax.Array | Weight:
    """The reference of `contract.PrepareWeight`: the array itself, or int8 with its scales."""
    if quantization == "none":
        return jnp.asarray(np.ascontiguousarray(matrix))
    values, scales = quantize_weight(matrix)
    return QuantizedMatrix(jnp.asarray(np.ascontiguousarray(values)), jnp.asarray(scales))
