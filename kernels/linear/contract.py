"""The contract of the linear op: a weight matrix goes in once, as the checkpoint has it, and comes out in the form that is multiplied.

T rows of activations, K values each; N columns of the matrix. A weight in a special form is a pytree that says what it is, so that
programs are traced for it as for any array and nobody has to carry along how to use it.
"""

from __future__ import annotations

from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

QUANTIZATIONS = ("none", "int8")


class Weight(Protocol):
    """A matrix [K, N] in a form of its own."""

    def matmul(self, x: jax.Array, is_used: jax.Array | None = None) -> jax.Array:
        """x [T, K] times the matrix, summed in float32 (int8: in integers, exactly, but for `weight_only`): [T, N] float32.

        Rows that `is_used` [T] bool leaves out may hold anything.
        """
        ...

    def columns(self, ids: jax.Array, dtype: Any) -> jax.Array:
        """Columns of the matrix as rows: ids [T] int32, clipped to [0, N) -> [T, K] in `dtype`."""
        ...


class PrepareWeight(Protocol):
    """Turns a weight into the form that an implementation multiplies; called once per matrix, when the model is loaded."""

    def __call__(self, matrix: np.ndarray, quantization: str) -> jax.Array | Weight:
        """`matrix` is [K, N] float32 or bfloat16 in any memory order, or [..., K, N]: several of one shape, layers or experts.
        `quantization` is one of QUANTIZATIONS."""
        ...


def matmul(x: jax.Array, weight: jax.Array | Weight, is_used: jax.Array | None = None) -> jax.Array:
    """x [T, K] times weight [K, N], in whatever form that is: [T, N] float32; anything in rows that `is_used` [T] bool leaves out."""
    if isinstance(weight, jax.Array):
        return jnp.matmul(x, weight, preferred_element_type=jnp.float32)
    return weight.matmul(x, is_used)


def matmul_each(x: jax.Array, weights: jax.Array | Weight) -> jax.Array:
    """x [T, K], or [G, T, K], times each of G weights [G, K, N]: [G, T, N] float32."""
    return jax.vmap(matmul, in_axes=(0 if x.ndim == 3 else None, 0))(x, weights)
