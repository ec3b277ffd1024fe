"""The ops of `contract` in Pallas for TPUs: what they can serve. See tpu_format, tpu_write and tpu_attention for what they do."""

from __future__ import annotations

from quire.kernels.op import OpContext
from quire.kernels.paged_attention.tpu_attention import paged_attention, tuning_of
from quire.kernels.paged_attention.tpu_format import GROUP, HeadMajor
from quire.kernels.paged_attention.tpu_write import write_kv

__all__ = ["HeadMajor", "paged_attention", "refuses", "tuning_of", "write_kv"]

DTYPES = ("bfloat16", "float32")
MAX_HEAD_DIM = 256


def refuses(context: OpContext) -> str | None:
    """Why the three cannot serve; they mean the same cache, so it is one answer for all."""
    if context.platform != "tpu":
        return "needs a TPU"
    if context.dtype not in DTYPES:
        return f"has no code for {context.dtype}"
    if context.block_size % GROUP:
        return f"needs a block size that is a multiple of {GROUP}, not {context.block_size}"
    if context.head_dim % 8 or context.head_dim > MAX_HEAD_DIM:
        return f"needs a head_dim that is a multiple of 8 up to {MAX_HEAD_DIM}, not {context.head_dim}"
    if context.num_heads % context.num_kv_heads:
        return f"needs query heads that are a multiple of the {context.num_kv_heads} key/value heads"
    return None
