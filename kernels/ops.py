"""The set of operations handed to the compiled step: each field is one implementation, chosen by the backend at start."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from quire.kernels.errors import KernelUnavailableError
from quire.kernels.op import Choice, Implementation, Op, OpContext
from quire.kernels.paged_attention.contract import PagedAttention, WriteKV
from quire.kernels.paged_attention.reference import paged_attention, write_kv
from quire.kernels.sampling.contract import Sample
from quire.kernels.sampling.reference import sample

WRITE_KV: Op[WriteKV] = Op("write_kv", (Implementation("reference", write_kv),))
PAGED_ATTENTION: Op[PagedAttention] = Op("paged_attention", (Implementation("reference", paged_attention),))
SAMPLE: Op[Sample] = Op("sample", (Implementation("reference", sample),))
OPS: tuple[Op[Any], ...] = (WRITE_KV, PAGED_ATTENTION, SAMPLE)


@dataclass(frozen=True)
class Ops:
    """One chosen implementation per op."""

    write_kv: Choice[WriteKV]
    paged_attention: Choice[PagedAttention]
    sample: Choice[Sample]

    def describe(self) -> str:
        """One line per op: what runs, and why not something else."""
        return "\n".join(choice.describe() for choice in (self.write_kv, self.paged_attention, self.sample))


def choose_ops(context: OpContext, wanted: dict[str, str] | None = None) -> Ops:
    """Chooses every op for `context`; `wanted` maps an op's name to the implementation that must serve it.

    Raises KernelUnavailableError when a wanted implementation cannot serve or the op's name is unknown.
    """
    wanted = dict(wanted or {})
    ops = Ops(
        write_kv=WRITE_KV.choose(context, wanted.pop(WRITE_KV.name, None)),
        paged_attention=PAGED_ATTENTION.choose(context, wanted.pop(PAGED_ATTENTION.name, None)),
        sample=SAMPLE.choose(context, wanted.pop(SAMPLE.name, None)),
    )
    if wanted:
        raise KernelUnavailableError(f"unknown op {', '.join(wanted)}; there are: {', '.join(op.name for op in OPS)}")
    return ops
