"""The engines of a core, and which of them an instruction runs on."""

from __future__ import annotations

from enum import Enum

from quire.kernels.nki.checks import check_gpsimd
from quire.kernels.nki.rules import refuse
from quire.kernels.nki.tensor import NkiTensor


class Engine(Enum):
    """`nki.isa.engine`."""

    tensor = "tensor"
    vector = "vector"
    scalar = "scalar"
    gpsimd = "gpsimd"
    dma = "dma"
    sync = "sync"
    unknown = "unknown"


def choose_engine(wanted: Engine, what: str, *allowed: Engine, tensors: tuple[NkiTensor, ...]) -> Engine:
    """`wanted`, or the first of those that `what` is documented for. GpSimd, asked for or alone, must reach its operands."""
    if wanted is not Engine.unknown and wanted not in allowed:
        names = ", ".join(engine.value for engine in allowed)
        refuse("engine", f"{what} does not run on {wanted.value}; it runs on {names}")
    chosen = allowed[0] if wanted is Engine.unknown else wanted
    if chosen is Engine.gpsimd:
        check_gpsimd(*tensors)
    return chosen
