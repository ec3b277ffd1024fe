"""The parts of a decoder layer that touch one token at a time: projections, norms, the gated MLP.

Legend: T tokens, D hidden size, I and O widths in and out, F MLP width. Weights are stored [in, out].
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from quire.kernels.linear.contract import Weight, matmul
from quire.models.parallel import Parallel

_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


def activate(x: Array, activation: str) -> Array:
    """The named activation (see `config.ACTIVATIONS`), computed in float32, x's dtype out."""
    y: Array = _ACTIVATIONS[activation](x.astype(jnp.float32))
    return y.astype(x.dtype)


def linear(x: Array, weight: Array | Weight, bias: Array | None = None, is_used: Array | None = None) -> Array:
    """x [T, I] times weight [I, O], plus bias [O]; summed in float32, x's dtype out.

    Rows that `is_used` [T] bool leaves out may hold anything.
    """
    y = matmul(x, weight, is_used)
    if bias is not None:
        y = y + bias.astype(jnp.float32)[None, :]
    return y.astype(x.dtype)


def linear_of_parts(x: Array, weight: Array | Weight, bias: Array | None, parallel: Parallel) -> Array:
    """`linear` where each device holds some of the I inputs and their rows of the weight: partial products, then their sum."""
    if parallel.size == 1:
        return linear(x, weight, bias)
    y = parallel.sum(matmul(x, weight).astype(x.dtype))
    return y if bias is None else (y.astype(jnp.float32) + bias.astype(jnp.float32)[None, :]).astype(x.dtype)


def rms_norm(x: Array, weight: Array, *, eps: float, unit_offset: bool) -> Array:
    """x / rms(x) · weight over the last axis (· (1 + weight) with `unit_offset`), in float32, x's dtype out.

    x is [..., D], weight [D]. Source: Zhang and Sennrich 2019.
    """
    x32 = x.astype(jnp.float32)
    scale = weight.astype(jnp.float32) + jnp.float32(1 if unit_offset else 0)
    normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + jnp.float32(eps))
    y: Array = normed * scale.reshape((1,) * (x.ndim - 1) + scale.shape)
    return y.astype(x.dtype)


def soft_cap(x: Array, cap: float | None) -> Array:
    """cap · tanh(x / cap): keeps x inside (-cap, cap). None leaves x as it is. Source: Gemma 2 report, section 2."""
    if cap is None:
        return x
    return jnp.asarray(cap, x.dtype) * jnp.tanh(x / jnp.asarray(cap, x.dtype))


def gated_mlp(x: Array, layer: Mapping[str, Any], activation: str, parallel: Parallel) -> Array:
    """down(act(gate(x)) · up(x)) for x [T, D]. Source: Shazeer 2020 (GLU variants)."""
    gate = activate(linear(x, layer["gate_proj"], layer.get("gate_bias")), activation)  # [T, F]
    up = linear(x, layer["up_proj"], layer.get("up_bias"))
    return linear_of_parts(gate * up, layer["down_proj"], layer.get("down_bias"), parallel)
