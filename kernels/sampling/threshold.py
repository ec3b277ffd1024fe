"""Thresholds that cut a row after its k largest values, or after its most probable tokens, without sorting it.

The threshold is built bit by bit from the top: a bit stays set while the values at or above the number so far still
hold what is asked for. Floats are ordered as their bit patterns are (negative ones reversed), so 32 steps give the
exact float, whatever the values, with one comparison and one sum over the row in each.

Shapes: R rows, V tokens.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_SIGN = np.uint32(0x80000000)
_TINY = np.float32(1e-30)


def top_k_threshold(values: jax.Array, top_k: jax.Array) -> jax.Array:
    """The k-th largest value of each row: values [R, V] float32, finite; top_k [R] int32 in [1, V] -> [R] float32.

    Exactly that value: `values >= threshold` holds for the k largest and for those equal to the k-th. Subnormal values
    count as zero where the device flushes them.
    """
    needed = top_k.astype(jnp.float32)

    def holds(candidate: jax.Array) -> jax.Array:
        at_least = values >= _ordered_to_float(candidate)[:, None]
        return jnp.sum(at_least.astype(jnp.float32), axis=1) >= needed

    return _ordered_to_float(_largest(holds, values.shape[0], num_bits=32))


def top_p_threshold(weights: jax.Array, top_p: jax.Array) -> jax.Array:
    """The weight of the last token that top_p keeps: weights [R, V] float32 in [0, 1], not normalised, with a largest
    weight of 1; top_p [R] float32 -> [R] float32.

    Exactly the largest weight of the row at which `weights >= threshold` sums, in float32, to top_p of the row's sum;
    tokens of that very weight are all kept.
    """
    needed = jnp.maximum(top_p * jnp.sum(weights, axis=1), _TINY)

    def holds(candidate: jax.Array) -> jax.Array:
        threshold = lax.bitcast_convert_type(candidate, jnp.float32)[:, None]
        return jnp.sum(jnp.where(weights >= threshold, weights, np.float32(0)), axis=1) >= needed

    # Weights are not negative and at most 1, so their bit patterns are ordered as they are and take 30 bits.
    return lax.bitcast_convert_type(_largest(holds, weights.shape[0], num_bits=30), jnp.float32)


def _largest(holds: Callable[[jax.Array], jax.Array], num_rows: int, *, num_bits: int) -> jax.Array:
    """The largest number of `num_bits` bits that holds, for each row; `holds` must be true up to it and false above."""

    def set_bit(step: jax.Array, found: jax.Array) -> jax.Array:
        bit = lax.shift_right_logical(np.uint32(1 << (num_bits - 1)), step.astype(jnp.uint32))
        return jnp.where(holds(found | bit), found | bit, found)

    found: jax.Array = lax.fori_loop(0, num_bits, set_bit, jnp.zeros((num_rows,), jnp.uint32))
    return found


def _ordered_to_float(ordered: jax.Array) -> jax.Array:
    """The float32 whose place among all floats is `ordered`: negative floats below 2**31, positive ones above."""
    bits = jnp.where(ordered >= _SIGN, ordered ^ _SIGN, ~ordered)
    return lax.bitcast_convert_type(bits, jnp.float32)
