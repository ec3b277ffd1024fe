"""The set of operations handed to the compiled step: each field is one implementation, chosen by the backend at start."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import quire.kernels.decoder_layer.cpu as decoder_layer_cpu
import quire.kernels.draft_head.cpu as draft_head_cpu
import quire.kernels.experts.grouped as experts_grouped
import quire.kernels.experts.reference as experts_reference
import quire.kernels.linear.cpu as linear_cpu
import quire.kernels.linear.reference as linear_reference
import quire.kernels.paged_attention.cpu as attention_cpu
import quire.kernels.paged_attention.nki as attention_nki
import quire.kernels.paged_attention.reference as attention_reference
import quire.kernels.paged_attention.tpu as attention_tpu
import quire.kernels.sampling.cpu as sampling_cpu
import quire.kernels.sampling.reference as sampling_reference
from quire.kernels.decoder_layer.contract import DecoderLayer
from quire.kernels.draft_head.contract import HeadEntries
from quire.kernels.errors import KernelUnavailableError
from quire.kernels.experts.contract import RunExperts
from quire.kernels.linear.contract import PrepareWeight
from quire.kernels.native import library
from quire.kernels.op import Choice, Implementation, Op, OpContext
from quire.kernels.paged_attention.contract import CacheFormat, PagedAttention, TokenMajor, WriteKV
from quire.kernels.sampling.contract import Sample

REFERENCE = "reference"
WEIGHT_ONLY = "weight_only"
COMPOSED = "composed"
PALLAS_TPU = "pallas_tpu"
NKI = "nki"
NKI_EMULATED = "nki_emulated"


def _native(
    function: Callable[..., Any], refuses: Callable[[str, OpContext], str | None] = library.refuses
) -> tuple[Implementation[Any], ...]:
    """The C++ implementation of an op, once for each instruction set."""
    return tuple(
        Implementation(f"native_{name}", partial(function, name), partial(refuses, name))
        for name in library.INSTRUCTION_SETS
    )


def _nki(function: Callable[..., Any]) -> tuple[Implementation[Any], ...]:
    """The NKI kernel of an op, on the device, and on the emulator by the strictest generation's rules, on any device."""
    emulated = partial(function, launch=attention_nki.on_emulator("gen2"))
    return (
        Implementation(NKI, function, attention_nki.refuses),
        Implementation(NKI_EMULATED, emulated, attention_nki.refuses_model, by_name_only=True),
    )


def _composed(*_: Any, **__: Any) -> Any:
    raise AssertionError("the model composes it itself")


LINEAR: Op[PrepareWeight] = Op(
    "linear",
    (
        *_native(linear_cpu.prepare),
        Implementation(WEIGHT_ONLY, linear_reference.prepare_weight_only, linear_reference.refuses_weight_only),
        Implementation(REFERENCE, linear_reference.prepare, linear_reference.refuses),
    ),
)
HELD_AS_ARRAYS = frozenset({REFERENCE, WEIGHT_ONLY})
"""Implementations of `linear` whose weights are plain arrays, which can be cut, stacked and described without values."""
KV_CACHE: Op[CacheFormat] = Op(
    "kv_cache",
    (
        *(
            Implementation[CacheFormat](
                f"native_{name}", attention_cpu.NativeCache(name), partial(library.refuses, name)
            )
            for name in library.INSTRUCTION_SETS
        ),
        Implementation[CacheFormat](PALLAS_TPU, attention_tpu.HeadMajor(), attention_tpu.refuses),
        Implementation(REFERENCE, TokenMajor()),
    ),
)
WRITE_KV: Op[WriteKV] = Op(
    "write_kv",
    (
        *_native(attention_cpu.write_kv),
        Implementation(PALLAS_TPU, attention_tpu.write_kv, attention_tpu.refuses),
        *_nki(attention_nki.write_kv),
        Implementation(REFERENCE, attention_reference.write_kv),
    ),
)
PAGED_ATTENTION: Op[PagedAttention] = Op(
    "paged_attention",
    (
        *_native(attention_cpu.paged_attention),
        Implementation(PALLAS_TPU, attention_tpu.paged_attention, attention_tpu.refuses),
        *_nki(attention_nki.paged_attention),
        Implementation(REFERENCE, attention_reference.paged_attention),
    ),
)
DECODER_LAYER: Op[DecoderLayer] = Op(
    "decoder_layer",
    (*_native(decoder_layer_cpu.decoder_layer), Implementation(COMPOSED, _composed)),
)
HEAD_ENTRIES: Op[HeadEntries] = Op(
    "head_entries",
    (*_native(draft_head_cpu.head_entries), Implementation(COMPOSED, _composed)),
)
EXPERTS: Op[RunExperts] = Op(
    "experts",
    (
        Implementation("grouped", experts_grouped.run_experts, experts_grouped.refuses),
        Implementation(REFERENCE, experts_reference.run_experts),
    ),
)
SAMPLE: Op[Sample] = Op(
    "sample",
    (
        *_native(sampling_cpu.sample, library.refuses_any_model),
        Implementation(REFERENCE, sampling_reference.sample),
    ),
)
OPS: tuple[Op[Any], ...] = (LINEAR, KV_CACHE, WRITE_KV, PAGED_ATTENTION, DECODER_LAYER, HEAD_ENTRIES, EXPERTS, SAMPLE)


CACHE_OPS: tuple[Op[Any], ...] = (KV_CACHE, WRITE_KV, PAGED_ATTENTION)
"""Those that must mean the same format of the cache: `HeadMajor` for pallas_tpu, `TokenMajor` for all others."""


@dataclass(frozen=True)
class Ops:
    """One chosen implementation per op."""

    linear: Choice[PrepareWeight]
    kv_cache: Choice[CacheFormat]
    write_kv: Choice[WriteKV]
    paged_attention: Choice[PagedAttention]
    decoder_layer: Choice[DecoderLayer]
    head_entries: Choice[HeadEntries]
    experts: Choice[RunExperts]
    sample: Choice[Sample]

    @property
    def fused_layer(self) -> DecoderLayer | None:
        """The op that runs a whole layer; None where the model composes it from the others."""
        return None if self.decoder_layer.name == COMPOSED else self.decoder_layer.function

    @property
    def fused_head_entries(self) -> HeadEntries | None:
        """The op that makes all of a draft head's entries; None where it is composed of the others."""
        return None if self.head_entries.name == COMPOSED else self.head_entries.function

    @property
    def is_padding_free(self) -> bool:
        """Whether a step costs what is in it: fused layers compute real tokens only, and attend to real keys only."""
        return self.fused_layer is not None

    @property
    def attends_in_place(self) -> bool:
        """Whether attention reads blocks where they lie, rather than gather all that a row could have."""
        return self.is_padding_free or self.paged_attention.name != REFERENCE

    @property
    def is_random_free(self) -> bool:
        """Whether a greedy row costs the same where others are sampled: a native sampler looks at each row by itself."""
        return self.sample.name != REFERENCE

    def names(self) -> dict[str, str]:
        """Which implementation serves each op."""
        return {field.name: getattr(self, field.name).name for field in dataclasses.fields(self)}

    def describe(self) -> str:
        """One line per op: what runs, and why not something else."""
        return "\n".join(getattr(self, field.name).describe() for field in dataclasses.fields(self))


def choose_ops(context: OpContext, wanted: dict[str, str] | None = None) -> Ops:
    """Chooses every op for `context`; `wanted` maps an op's name to the implementation that must serve it.

    Raises KernelUnavailableError when a wanted implementation cannot serve or the op's name is unknown.
    """
    wanted = dict(wanted or {})
    if unknown := sorted(set(wanted) - {op.name for op in OPS}):
        raise KernelUnavailableError(f"unknown op {', '.join(unknown)}; there are: {', '.join(op.name for op in OPS)}")
    linear = LINEAR.choose(context, wanted.get(LINEAR.name))
    layer, head = (_choose_fused(op, context, wanted, linear.name) for op in (DECODER_LAYER, HEAD_ENTRIES))
    # Packed experts are multiplied by the fused layer alone.
    if layer.name == COMPOSED and linear.name not in HELD_AS_ARRAYS and context.has_experts:
        if LINEAR.name in wanted:
            raise KernelUnavailableError(f"linear={linear.name} packs experts, which need a native decoder_layer too")
        linear = LINEAR.choose(context, REFERENCE)
        head = _choose_fused(HEAD_ENTRIES, context, wanted, linear.name)
    kv_cache, write_kv, paged_attention = _choose_cache_ops(context, wanted)
    if paged_attention.name == PALLAS_TPU:
        tuned = partial(paged_attention.function, tuning=attention_tpu.tuning_of(context.device_kind))
        paged_attention = dataclasses.replace(paged_attention, function=tuned)
    return Ops(
        linear=linear,
        kv_cache=kv_cache,
        write_kv=write_kv,
        paged_attention=paged_attention,
        decoder_layer=layer,
        head_entries=head,
        experts=EXPERTS.choose(context, wanted.get(EXPERTS.name)),
        sample=SAMPLE.choose(context, wanted.get(SAMPLE.name)),
    )


def _choose_fused(op: Op[Any], context: OpContext, wanted: dict[str, str], linear: str) -> Choice[Any]:
    """An op that multiplies packed weights, composed where `linear` does not pack them."""
    choice = op.choose(context, wanted.get(op.name))
    if choice.name == COMPOSED or linear not in HELD_AS_ARRAYS:
        return choice
    if op.name in wanted:
        raise KernelUnavailableError(f"{op.name}={choice.name} needs a native linear too, not {linear}")
    return op.choose(context, COMPOSED)


def _choose_cache_ops(context: OpContext, wanted: dict[str, str]) -> list[Choice[Any]]:
    """One implementation of each of `CACHE_OPS`, all of one format: what was asked for by name decides which."""
    chosen = [op.choose(context, wanted.get(op.name)) for op in CACHE_OPS]
    if len({choice.name == PALLAS_TPU for choice in chosen}) == 1:
        return chosen
    asked = {op.name: wanted[op.name] for op in CACHE_OPS if op.name in wanted}
    named = ", ".join(f"{op}={name}" for op, name in asked.items())
    if len({name == PALLAS_TPU for name in asked.values()}) > 1:
        raise KernelUnavailableError(f"{named}: they hold keys and values in different formats")
    if PALLAS_TPU in asked.values():
        return [op.choose(context, PALLAS_TPU) for op in CACHE_OPS]
    reason = f"{named} holds keys and values in another format"
    return [_without(op, PALLAS_TPU, reason).choose(context, wanted.get(op.name)) for op in CACHE_OPS]


def _without(op: Op[Any], name: str, reason: str) -> Op[Any]:
    """The op with one of its implementations refusing everything."""
    return Op(
        op.name,
        tuple(
            dataclasses.replace(implementation, refuses=lambda _: reason)
            if implementation.name == name
            else implementation
            for implementation in op.implementations
        ),
    )
