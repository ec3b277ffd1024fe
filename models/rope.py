"""Rotary position embedding: frequencies, tables for the positions of a step, and the rotation.

Legend: T tokens, N heads, H head dimension, R rotated dimensions (R <= H), P distinct sets of frequencies.

The pairs are (i, i + R/2), the "rotate half" layout of Hugging Face checkpoints. Source: Su et al. 2021 (RoFormer).
"""

import math

import jax.numpy as jnp
import numpy as np
from jax import Array

from quire.models.config import ModelConfig, RopeConfig


def inverse_frequencies(rope: RopeConfig) -> np.ndarray:
    """The angle per token of each rotated pair, float32 [R/2]."""
    # float32 throughout, as in the code the checkpoints were trained with: at position 100,000 a rounding of the
    # frequency is already visible in the angle.
    exponent = np.arange(0, rope.rotary_dim, 2, dtype=np.float32) / np.float32(rope.rotary_dim)
    powers = np.float32(rope.theta) ** exponent
    if rope.scaling == "longrope":
        powers = powers * np.asarray(rope.frequency_divisors, np.float32)
    plain = np.float32(1) / powers
    if rope.scaling == "linear":
        plain = plain / np.float32(rope.factor)
    if rope.scaling == "llama3":
        plain = _llama3(rope, plain)
    if rope.scaling == "yarn":
        plain = _yarn(rope, plain)
    return np.asarray(plain, np.float32)


def _llama3(rope: RopeConfig, plain: np.ndarray) -> np.ndarray:
    """Llama 3.1: long wavelengths are stretched, short ones are not, with a linear ramp between them."""
    turns = np.float32(rope.original_max_position_embeddings) * plain / np.float32(2 * math.pi)
    ramp = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    kept = np.clip(ramp, 0.0, 1.0)
    return _stretched(plain, kept, rope.factor)


def _yarn(rope: RopeConfig, plain: np.ndarray) -> np.ndarray:
    """YaRN, Peng et al. 2023, equations 17 to 20: a ramp over dimensions by how often each one turns."""

    def dimension_turning(times: float) -> float:
        spread = math.log(rope.original_max_position_embeddings / (times * 2 * math.pi))
        return rope.rotary_dim * spread / (2 * math.log(rope.theta))

    low, high = dimension_turning(rope.beta_fast), dimension_turning(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.rotary_dim - 1)
    width = max(high - low, 0.001)
    kept = 1 - np.clip((np.arange(rope.rotary_dim // 2) - low) / width, 0.0, 1.0)
    return _stretched(plain, kept, rope.factor)


def _stretched(plain: np.ndarray, kept: np.ndarray, factor: float) -> np.ndarray:
    """Frequencies divided by `factor` where `kept` is 0, as they are where it is 1."""
    return np.asarray(kept * plain + (1 - kept) * plain / factor, np.float32)


def rope_tables(config: ModelConfig, positions: Array) -> tuple[Array, Array]:
    """Cosines and sines of positions int32 [T], for every set of frequencies: two float32 arrays [P, T, R/2]."""
    inv_freq = np.stack([inverse_frequencies(rope) for rope in config.ropes])  # [P, R/2]
    factors = np.asarray([rope.attention_factor for rope in config.ropes], np.float32)[:, None, None]
    angles = positions.astype(jnp.float32)[None, :, None] * inv_freq[:, None, :]  # [P, T, R/2]
    return jnp.cos(angles) * factors, jnp.sin(angles) * factors


def apply_rope(x: Array, cos: Array, sin: Array) -> Array:
    """Rotates the first R dimensions of x [T, N, H] by float32 tables [T, R/2]; computed in float32, x's dtype out."""
    half = cos.shape[-1]
    cos, sin = cos[:, None, :], sin[:, None, :]  # [T, 1, R/2]
    first = x[..., :half].astype(jnp.float32)
    second = x[..., half : 2 * half].astype(jnp.float32)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
    if 2 * half == x.shape[-1]:
        return turned
    return jnp.concatenate([turned, x[..., 2 * half :]], axis=-1)
