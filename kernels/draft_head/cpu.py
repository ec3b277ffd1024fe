"""A head's entries in C++ (cpu.cc), through jax.ffi."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from quire.kernels.draft_head.contract import HeadSpec
from quire.kernels.native.library import FORMATS, load_library
from quire.kernels.paged_attention.contract import StepPlaces

_NORMS = ("hidden_norm", "input_norm")
_MATRICES = ("fc", "k_proj", "v_proj")
_BIASES = ("k_bias", "v_bias")


def head_entries(
    instruction_set: str,
    weights: Mapping[str, Any],
    captured: jax.Array,
    embeddings: jax.Array,
    rope: tuple[jax.Array, jax.Array],
    kv_cache: jax.Array,
    places: StepPlaces,
    is_used: jax.Array,
    spec: HeadSpec,
) -> tuple[jax.Array, jax.Array]:
    """`contract.HeadEntries`."""
    assert len({weights[name].format for name in _MATRICES}) == 1, "the matrices of a head are packed alike"
    call = jax.ffi.ffi_call(
        load_library(instruction_set).target("quire_head_entries"),
        (
            jax.ShapeDtypeStruct(embeddings.shape, embeddings.dtype),
            jax.ShapeDtypeStruct(kv_cache.shape, kv_cache.dtype),
        ),
        input_output_aliases={2: 1},
    )
    buffers = [*rope, places.write_blocks, places.write_offsets, *(weights[name] for name in _NORMS)]
    for name in _MATRICES:
        buffers += weights[name].buffers
    if spec.qkv_bias:
        buffers += [weights[name] for name in _BIASES]
    features, written = call(
        captured,
        embeddings,
        kv_cache,
        is_used,
        *buffers,
        format=np.int64(FORMATS[weights["fc"].format]),
        has_bias=np.int64(spec.qkv_bias),
        half_rotary=np.int64(rope[0].shape[-1]),
        eps=np.float32(spec.norm_eps),
        norm_offset=np.float32(spec.norm_unit_offset),
    )
    return features, written
