"""Weights as plain arrays, and int8 ones as XLA multiplies them: in integers, or, on devices without integer products, in floats."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from quire.kernels.linear.contract import Weight
from quire.kernels.linear.quantize import quantize_rows, quantize_weight
from quire.kernels.op import OpContext


def _form(name: str) -> Any:
    """A static field that tells two forms with the same arrays apart.

    By their class alone JAX does not: it compares tree structures of registered dataclasses by their fields (jaxlib 0.10.2), and where
    the hashes meet too, seldom and differently in every process, it runs the program of the one form with the other.
    """
    return flax.struct.field(pytree_node=False, default=name)  # type: ignore[no-untyped-call]


@flax.struct.dataclass
class QuantizedMatrix:
    """A matrix whose column n is scales[n] x values[:, n]; axes before those two are of several matrices of one shape."""

    values: Any  # [..., K, N] int8
    scales: Any  # [..., N] float32
    form: str = _form("integers")

    def matmul(self, x: jax.Array, is_used: jax.Array | None = None) -> jax.Array:
        """See `contract.Weight`: computes every row."""
        rows, row_scales = quantize_rows(x)
        sums = jnp.matmul(rows, self.values, preferred_element_type=jnp.int32)
        return sums.astype(jnp.float32) * (row_scales[:, None] * self.scales[None, :])

    def columns(self, ids: jax.Array, dtype: Any) -> jax.Array:
        """See `contract.Weight`."""
        return _columns(self.values, self.scales, ids, dtype)


@flax.struct.dataclass
class WeightOnlyMatrix:
    """The same matrix, multiplied by activations as they are: integers up to 127 are exact in every float type, and scales come last."""

    values: Any  # [..., K, N] int8
    scales: Any  # [..., N] float32
    form: str = _form("weight_only")

    def matmul(self, x: jax.Array, is_used: jax.Array | None = None) -> jax.Array:
        """See `contract.Weight`; summed in float32. Computes every row."""
        sums = jnp.matmul(x, self.values.astype(x.dtype), preferred_element_type=jnp.float32)
        return sums * self.scales[None, :]

    def columns(self, ids: jax.Array, dtype: Any) -> jax.Array:
        """See `contract.Weight`."""
        return _columns(self.values, self.scales, ids, dtype)


def _columns(values: jax.Array, scales: jax.Array, ids: jax.Array, dtype: Any) -> jax.Array:
    ids = jnp.clip(ids, 0, values.shape[1] - 1)
    columns = jnp.take(values, ids, axis=1).T.astype(jnp.float32)
    return (columns * scales[ids][:, None]).astype(dtype)


def refuses(context: OpContext) -> str | None:
    """Why `prepare` cannot serve a context, None when it can."""
    if _lacks_integer_products(context) and context.quantization == "int8":
        return f"{context.platform} has no products of integers"
    return None


def refuses_weight_only(context: OpContext) -> str | None:
    """Why `prepare_weight_only` cannot serve a context, None when it can."""
    if context.quantization == "none":
        return "weights are not quantized"
    if not _lacks_integer_products(context):
        return "for devices without products of integers; here they are exact"
    return None


def _lacks_integer_products(context: OpContext) -> bool:
    return context.platform == "neuron"


def prepare(matrix: np.ndarray, quantization: str) -> jax.Array | Weight:
    """The reference of `contract.PrepareWeight`: the array itself, or int8 with its scales."""
    if quantization == "none":
        return jnp.asarray(np.ascontiguousarray(matrix))
    values, scales = quantize_weight(matrix)
    return QuantizedMatrix(jnp.asarray(np.ascontiguousarray(values)), jnp.asarray(scales))


def prepare_weight_only(matrix: np.ndarray, quantization: str) -> jax.Array | Weight:
    """`contract.PrepareWeight` for devices that multiply no integers."""
    if quantization == "none":
        return prepare(matrix, quantization)
    values, scales = quantize_weight(matrix)
    return WeightOnlyMatrix(jnp.asarray(np.ascontiguousarray(values)), jnp.asarray(scales))
