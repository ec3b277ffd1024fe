"""int8: weights per column, activations per row, both symmetric around zero.

A column of a weight is scale x int8 with scale = largest / 127; a row of activations likewise, at run time. Their products are summed in
integers, exactly, so every implementation gives the same bits.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

# XLA turns a division by a constant into this product, whose last bit may be another; so it is one everywhere.
_OF_127 = np.float32(1) / np.float32(127)


def quantize_weight(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A matrix [..., K, N] as (int8 [..., K, N], a single one in the same memory order, scales float32 [..., N])."""
    if matrix.ndim > 2:  # one at a time: all of a large model's layers as float32 would be several times the model
        values, scales = np.empty(matrix.shape, np.int8), np.empty((*matrix.shape[:-2], matrix.shape[-1]), np.float32)
        for idx in range(len(matrix)):
            values[idx], scales[idx] = quantize_weight(matrix[idx])
        return values, scales
    floats = matrix.astype(np.float32)
    largest = np.abs(floats).max(axis=0, initial=0.0)
    scales = (largest / np.float32(127)).astype(np.float32)
    floats /= np.where(scales > 0, scales, np.float32(1))[None, :]
    return np.rint(floats).astype(np.int8), scales


def quantize_rows(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Activations [T, K] as (int8 [T, K], scales float32 [T])."""
    values = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(values), axis=1)
    inverse = jnp.where(largest > 0, np.float32(127) / largest, np.float32(0))
    rounded = jnp.clip(jnp.round(values * inverse[:, None]), np.float32(-127), np.float32(127))
    return rounded.astype(jnp.int8), largest * _OF_127
