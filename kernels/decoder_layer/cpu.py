"""The decoder layer in C++ (cpu.cc), through jax.ffi."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from quire.kernels.decoder_layer.contract import LayerSpec
from quire.kernels.native.library import FORMATS, load_library
from quire.kernels.paged_attention.contract import StepPlaces

_ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2}  # `Activation` in row_ops.h
_ATTENTION_MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP_MATRICES = ("gate_proj", "up_proj", "down_proj")
_EXPERT_MATRICES = ("router", "experts_gate_proj", "experts_up_proj", "experts_down_proj")


def decoder_layer(
    instruction_set: str,
    weights: Mapping[str, Any],
    x: jax.Array,
    rope: tuple[jax.Array, jax.Array],
    kv_cache: jax.Array,
    places: StepPlaces,
    spec: LayerSpec,
) -> tuple[jax.Array, jax.Array]:
    """`contract.DecoderLayer`."""
    call = jax.ffi.ffi_call(
        load_library(instruction_set).target("quire_decoder_layer"),
        (jax.ShapeDtypeStruct(x.shape, x.dtype), jax.ShapeDtypeStruct(kv_cache.shape, kv_cache.dtype)),
        input_output_aliases={1: 1},
    )
    buffers = [*rope, places.write_blocks, places.write_offsets]
    for rows in places.rectangles:
        buffers += [rows.block_tables, rows.seq_lens, rows.query_lens]
    buffers += [weights[name] for name in _vectors(spec)]
    for name in (*_ATTENTION_MATRICES, *(_EXPERT_MATRICES if spec.num_experts else _MLP_MATRICES)):
        buffers += weights[name].buffers
    buffers += [weights[name] for name in _biases(spec)]
    out, written = call(
        x,
        kv_cache,
        *buffers,
        format=np.int64(FORMATS[weights["q_proj"].format]),
        activation=np.int64(_ACTIVATIONS[spec.activation]),
        flags=np.int64(_flags(spec)),
        num_heads=np.int64(spec.num_heads),
        num_kv_heads=np.int64(spec.num_kv_heads),
        head_dim=np.int64(spec.head_dim),
        mlp=np.int64(spec.intermediate_size),
        half_rotary=np.int64(rope[0].shape[-1]),
        num_experts=np.int64(spec.num_experts),
        experts_per_token=np.int64(spec.num_experts_per_tok),
        sliding_window=np.int64(spec.sliding_window or 0),
        scale=np.float32(spec.attention_scale),
        soft_cap=np.float32(spec.attention_soft_cap or 0.0),
        eps=np.float32(spec.norm_eps),
        norm_offset=np.float32(spec.norm_unit_offset),
        widths=np.array([rows.width for rows in places.rectangles], np.int64),
    )
    return out, written


def _vectors(spec: LayerSpec) -> list[str]:
    """Norm weights in the order that `read` in cpu.cc takes them."""
    names = ["input_norm", "pre_mlp_norm"]
    if spec.post_norms:
        names += ["post_attention_norm", "post_mlp_norm"]
    if spec.qk_norm:
        names += ["q_norm", "k_norm"]
    return names


def _biases(spec: LayerSpec) -> list[str]:
    names = []
    if spec.qkv_bias:
        names += ["q_bias", "k_bias", "v_bias"]
    if spec.o_bias:
        names += ["o_bias"]
    if spec.mlp_bias:
        names += ["gate_bias", "up_bias", "down_bias"]
    return names


def _flags(spec: LayerSpec) -> int:
    """`Flags` in cpu.cc."""
    bits = (spec.qkv_bias, spec.o_bias, spec.mlp_bias, spec.qk_norm, spec.post_norms, spec.norm_topk_prob)
    return sum(1 << idx for idx, bit in enumerate(bits) if bit)
